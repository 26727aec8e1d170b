"""The signals between a pool and its workers, and a cancel as it crosses its pipe."""

from __future__ import annotations

import os
import signal
import struct
from typing import Final

SIGNAL: Final = signal.SIGRTMIN + 12
"""Tells a worker to look at its cancel pipe. A real-time signal: applications have uses for the others."""

STACKS_SIGNAL: Final = SIGNAL - 1
"""Has a worker print its stacks. Real-time signals are delivered lowest first: this one before the other."""

_NUMBER: Final = struct.Struct("<I")
_MOST: Final = 4096

pack_cancel = _NUMBER.pack
"""A cancel as it crosses the pipe: the job's number. So short a write goes whole or not at all (pipe(7))."""


def read_cancel(fd: int) -> int | None:
    """The number of the last job that was cancelled since the last look, None where there is none.

    EOFError where the host has closed its end.
    """
    try:
        data = os.read(fd, _MOST)
    except BlockingIOError:
        return None
    if not data:
        raise EOFError
    return int(_NUMBER.unpack(data[-_NUMBER.size :])[0])
