"""What workers print: their stdout and stderr read line by line, within a budget, into the host's logging.

What comes on stdout is logged as INFO, what comes on stderr as WARNING. The supervisor reads the pipes all the time, so
that no print blocks. What is over the budget is not even copied into the host: it is spliced to /dev/null, and counted.

The stack of a crash (faulthandler) is not logged as it comes: whoever tells of the death shows it, once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..control.import_isolation import HOME
from ..control.output_tags import split_tag
from ..wire.printable import printable

logger = logging.getLogger("blastdoor.worker")

BUDGET: Final = 256 * 1024
"""Bytes of output per worker that are logged in a burst; refilled at a quarter of it per second."""

_REFILL: Final = BUDGET / 4
_READ_SIZE: Final = 16 * 1024
_MAX_LINE: Final = 8 * 1024
_ROUNDS: Final = 16
_TAIL: Final = 100

_LINE_COST: Final = 100
"""What a line costs beside its bytes: a record in the log is never smaller."""

_CRASH: Final = "Fatal Python error: "
_STACK: Final = "(most recent call first):"
_FRAME: Final = '  File "'
_OWN_FRAME: Final = re.compile(rf'  File "{re.escape(HOME)}/')


FindJob = Callable[[int, int], str]
"""The id of the job that a lane's number and its job's number there are for; empty where there is none."""


class _Stream:
    """One of the two: what has come of its line, and the last of what was skipped."""

    __slots__ = ("fd", "level", "line", "unlogged")

    def __init__(self, fd: int, level: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.level = level
        self.line = b""
        self.unlogged = b""


class LogPipe:
    """The read ends of one process's stdout and stderr. Any thread may `read`; one at a time does.

    `label` is what stands in the log before each line's job, such as "worker 4711". `job_id` is the job that prints
    now, in a worker of one lane; in others each line has a tag, and `find_job` knows whose it is.
    """

    __slots__ = (
        "_allowance",
        "_crash",
        "_filled_at",
        "_in_own_frames",
        "_in_stack",
        "_lock",
        "_null_fd",
        "_skipped",
        "_streams",
        "_tail",
        "find_job",
        "job_id",
        "label",
        "pid",
    )

    def __init__(self, out_fd: int, err_fd: int, label: str) -> None:
        self._streams = [_Stream(out_fd, logging.INFO), _Stream(err_fd, logging.WARNING)]
        self.label = label
        self.pid: int | None = None
        self.job_id = ""
        self.find_job: FindJob | None = None
        self._allowance = float(BUDGET)
        self._filled_at = time.monotonic()
        self._skipped = 0
        self._null_fd = -1
        # Reentrant: what is logged may drop a job, whose end may come back here.
        self._lock = threading.RLock()
        self._tail: deque[tuple[str, str]] = deque(maxlen=_TAIL)
        self._crash: list[tuple[str, str]] = []
        self._in_stack = self._in_own_frames = False

    @property
    def fds(self) -> list[int]:
        """The descriptors that are open, to be watched."""
        return [stream.fd for stream in self._streams if stream.fd >= 0]

    def read(self) -> list[int]:
        """Log what is there now. Takes a bounded number of steps. Gives the descriptors that are at their end."""
        with self._lock:
            return [stream.fd for stream in self._streams if stream.fd >= 0 and not self._read(stream)]

    def _read(self, stream: _Stream) -> bool:
        for _ in range(_ROUNDS):
            try:
                if self._allow():
                    data = os.read(stream.fd, _READ_SIZE)
                    if not data:
                        return False
                    self._allowance -= len(data)
                    self._take(stream, data)
                elif not self._skip(stream):
                    return False
            except BlockingIOError:
                return True
        return True

    def close(self, *, told: bool = False) -> None:
        """Log what is still in the pipes, over the budget or not: it is little, and it may be a last stack.

        `told` says that whoever tells of the process's end shows the stack of its crash.
        """
        with self._lock:
            if not self.fds:
                return
            lasts = [stream.unlogged.partition(b"\n")[2] for stream in self._streams]
            self._skipped -= sum(map(len, lasts))
            self._report_skipped()
            for stream, last in zip(self._streams, lasts, strict=True):
                self._take_last(stream, last)
                os.close(stream.fd)
                stream.fd = -1
            if self._null_fd >= 0:
                os.close(self._null_fd)
                self._null_fd = -1
            for job_id, text in self._crash:
                self._log(logging.DEBUG if told else logging.WARNING, job_id, text)
            self._crash.clear()

    def _take_last(self, stream: _Stream, last: bytes) -> None:
        self._allowance = float(BUDGET)
        self._take(stream, last)
        self._allowance = float(BUDGET)
        self._read(stream)
        if stream.line:
            self._emit(stream, stream.line)
            stream.line = b""

    def charge(self, size: int) -> bool:
        """Count what is logged of this process beside what it prints; False where that is over its budget as well."""
        with self._lock:
            if self._allow():
                self._allowance -= size + _LINE_COST
                return True
            self._skipped += size
            return False

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors and log nothing."""
        for fd in (*self.fds, self._null_fd):
            if fd >= 0:
                os.close(fd)
        self._null_fd = -1
        for stream in self._streams:
            stream.fd = -1

    def tail(self, job_id: str) -> str:
        """The last lines that were printed during this job.

        What no job has printed may have to do with any, where there are several: the stack of a crash, say.
        """
        nobody = "" if self.find_job is not None else job_id
        return "\n".join(line for job, line in self._tail if job in (job_id, nobody))

    def _allow(self) -> bool:
        if self._allowance > 0 and not self._skipped:
            return True
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._filled_at) * _REFILL, BUDGET)
        self._filled_at = now
        # Once over the budget, stay silent until a fair part of it is there again: fewer, longer gaps.
        if self._allowance < (BUDGET / 8 if self._skipped else 1):
            return False
        self._report_skipped()
        return True

    def _skip(self, stream: _Stream) -> bool:
        """Drop what is over the budget, but for the last of it, which may yet be somebody's last words."""
        waiting = int(struct.unpack("i", fcntl.ioctl(stream.fd, termios.FIONREAD, b"\0" * 4))[0])
        if waiting > _READ_SIZE:
            self._skipped += os.splice(stream.fd, self._null(), waiting - _READ_SIZE)
        data = os.read(stream.fd, _READ_SIZE)
        self._skipped += len(data)
        stream.unlogged = (stream.unlogged + data)[-_READ_SIZE:]
        return bool(data)

    def _report_skipped(self) -> None:
        if self._skipped:
            for stream in self._streams:
                stream.line = stream.unlogged = b""
            logger.warning("%s: %d bytes of output over the budget were dropped", self.label, self._skipped)
            self._skipped = 0

    def _take(self, stream: _Stream, data: bytes) -> None:
        lines = (stream.line + data).split(b"\n")
        stream.line = lines.pop()
        for number, line in enumerate(lines):
            if self._allowance <= 0 and number:
                self._skipped += sum(len(rest) + 1 for rest in lines[number:])
                break
            self._allowance -= _LINE_COST
            self._emit(stream, line)
        if len(stream.line) > _MAX_LINE:
            self._emit(stream, stream.line)
            stream.line = b""

    def _emit(self, stream: _Stream, line: bytes) -> None:
        job_id = self.job_id
        if self.find_job is not None:
            tag, line = split_tag(line)
            job_id = "" if tag is None else self.find_job(*tag)
        text = printable(line[:_MAX_LINE].decode(errors="backslashreplace").rstrip("\r"))
        if stream.level == logging.WARNING and self._is_of_ours(text):
            return
        self._tail.append((job_id, text))
        if stream.level == logging.WARNING and (self._crash or text.startswith(_CRASH)):
            self._keep_of_crash(job_id, text)
        else:
            self._log(stream.level, job_id, text)

    def _is_of_ours(self, text: str) -> bool:
        """Whether this is a frame of a stack of faulthandler's, the innermost first, from our first one on."""
        if text.endswith(_STACK):
            self._in_stack, self._in_own_frames = True, False
        elif self._in_stack:
            self._in_stack = text.startswith(_FRAME)
            self._in_own_frames = self._in_stack and (self._in_own_frames or _OWN_FRAME.match(text) is not None)
        return self._in_own_frames

    def _keep_of_crash(self, job_id: str, text: str) -> None:
        """A line of a crash's stack, which is told with the death."""
        self._crash.append((job_id, text))
        if len(self._crash) > _TAIL:  # it goes on: it was no last word
            for job, line in self._crash:
                self._log(logging.WARNING, job, line)
            self._crash.clear()

    def _log(self, level: int, job_id: str, text: str) -> None:
        extra = {"job_id": job_id, "worker": self.pid}
        logger.log(level, "%s%s: %s", self.label, f" job {job_id}" if job_id else "", text, extra=extra)

    def _null(self) -> int:
        if self._null_fd < 0:
            self._null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        return self._null_fd
