"""A worker's stdout and stderr: text streams onto the log pipe that note when something was printed.

The note goes to the host with the job's end, which then reads the log pipe before the next job begins: so
each line gets its own job's id. What is written past these streams, straight to the descriptors, is read a
moment later, and may carry the id of the job that has begun by then.

Where several jobs print at once, each line goes out whole, with a tag that says whose it is. Lines are put together for
each job: what one prints in pieces is not torn by others. What has no job, a thread of the app's own say, has no tag.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

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


current_tag: Final[ContextVar[bytes]] = ContextVar("blastdoor_job", default=b"")
"""The tag of the job that is under way here (`control/output_tags`); empty for none."""

_MOST_BEGUN: Final = 10_000
"""Lines that are begun at most: what jobs that are over go on printing has no other end."""

_LONGEST: Final = select.PIPE_BUF - 32


class TaggedOutput(OutputFlag):
    """The same for jobs that run at once: which of them have printed something."""

    __slots__ = ("_files", "_tags")

    def __init__(self) -> None:
        super().__init__()
        self._tags: set[bytes] = set()
        self._files: list[_TaggedFile] = []

    def note(self) -> None:
        if len(self._tags) > _MOST_BEGUN:
            self._tags.clear()
        self._tags.add(current_tag.get())

    def take(self) -> bool:
        """Whether the job that is under way here has printed something; it is all in the log pipe then."""
        tag = current_tag.get()
        if tag not in self._tags:
            return False
        self._tags.discard(tag)
        for file in self._files:
            file.end_line(tag)
        return True

    def stream(self, fd: int) -> io.TextIOWrapper:
        """A text stream onto a descriptor, for all jobs."""
        file = _TaggedFile(fd, self.note)
        self._files.append(file)
        binary: Any = file
        return io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", write_through=True)


class _TaggedFile(io.RawIOBase):
    """The descriptor, to which whole lines go, each with its job's tag, in one write each (pipe(7), PIPE_BUF)."""

    def __init__(self, fd: int, note: Callable[[], None]) -> None:
        self._fd = fd
        self._note = note
        self._begun: dict[bytes, bytes] = {}
        self._lock = threading.RLock()  # threads of one job have one tag; reentrant, since a finalizer may print
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        text = bytes(data)
        self._note()
        tag = current_tag.get()
        with self._lock:
            *lines, rest = (self._begun.pop(tag, b"") + text).split(b"\n")
            for line in lines:
                self._put(tag, line)
            if len(rest) > _LONGEST or len(self._begun) > _MOST_BEGUN:
                self._put(tag, rest)
            elif rest:
                self._begun[tag] = self._begun.get(tag, b"") + rest  # of what a finalizer has printed meanwhile
        return len(text)

    def end_line(self, tag: bytes) -> None:
        """The job ends: what it has printed of a line is one."""
        with self._lock:
            if rest := self._begun.pop(tag, b""):
                self._put(tag, rest)

    def close(self) -> None:
        """Do nothing but end the line of nobody: the descriptor stays open as long as the process."""
        self.end_line(b"")

    def _put(self, tag: bytes, line: bytes) -> None:
        for start in range(0, max(len(line), 1), _LONGEST):
            os.write(self._fd, b"%b%b\n" % (tag, line[start : start + _LONGEST]))
