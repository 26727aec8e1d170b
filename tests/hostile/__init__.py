"""Attacks on the sandbox."""
