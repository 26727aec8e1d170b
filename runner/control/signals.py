"""The signals between a pool and its workers."""

from __future__ import annotations

import signal
from typing import Final

SIGNAL: Final = signal.SIGRTMIN + 12
"""Tells a worker to look at its cancel pipe. A real-time signal: applications have uses for the others."""

STACKS_SIGNAL: Final = SIGNAL - 1
"""Has a worker print its stacks. Real-time signals are delivered lowest first: this one before the other."""
