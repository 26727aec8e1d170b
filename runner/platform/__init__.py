"""Linux, and what the standard library lacks of it."""
