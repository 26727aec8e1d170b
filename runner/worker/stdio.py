"""A worker's stdout and stderr: text streams onto the log pipe that note when something was printed.

The note goes to the host with the job's end, which then reads the log pipe before the next job begins: so
each line gets its own job's id. What is written past these streams, straight to the descriptors, is read a
moment later, and may carry the id of the job that has begun by then.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputFlag:
    """Whether the running job has printed something."""

    __slots__ = ("_printed",)

    def __init__(self) -> None:
        self._printed = False

    def note(self) -> None:
        """Something was printed."""
        self._printed = True

    def take(self) -> bool:
        """Whether something was printed since the last call; it is in the log pipe then."""
        if not self._printed:
            return False
        self._printed = False
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                pass  # a handler has put something of its own there, or closed it
        return True


class _LogFile(io.RawIOBase):
    """The descriptor, unbuffered."""

    def __init__(self, fd: int, note: Callable[[], None]) -> None:
        self._fd = fd
        self._note = note

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        self._note()
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            left = left[os.write(self._fd, left) :]
        return size

    def close(self) -> None:
        """Do nothing: the descriptor stays open as long as the process."""


class LogStream(io.TextIOWrapper):
    """A line-buffered text stream onto a descriptor; `note` is called with each write."""

    def __init__(self, fd: int, note: Callable[[], None]) -> None:
        self._note = note
        file: Any = _LogFile(fd, note)
        super().__init__(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def write(self, text: str, /) -> int:
        self._note()
        return super().write(text)
