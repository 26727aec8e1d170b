"""What workers print: a worker's log pipe read line by line, within a budget, into the host's logging.

The supervisor reads the pipes all the time, so that no print blocks. What is over the budget is not
even copied into the host: it is spliced to /dev/null, and counted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import termios
import threading
import time
from collections import deque
from typing import Final

from .printable import printable

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


class LogPipe:
    """The read end of one process's stdout and stderr. Any thread may `read`; one at a time does.

    `label` is what stands in the log before each line's job, such as "worker 4711".
    """

    __slots__ = (
        "_allowance",
        "_filled_at",
        "_line",
        "_lock",
        "_null_fd",
        "_skipped",
        "_tail",
        "_unlogged",
        "fd",
        "job_id",
        "label",
        "pid",
    )

    def __init__(self, fd: int, label: str) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.label = label
        self.pid: int | None = None
        self.job_id = ""
        self._line = b""
        self._allowance = float(BUDGET)
        self._filled_at = time.monotonic()
        self._skipped = 0
        self._null_fd = -1
        # Reentrant: what is logged may drop a job, whose end may come back here.
        self._lock = threading.RLock()
        self._unlogged = b""
        self._tail: deque[tuple[str, str]] = deque(maxlen=_TAIL)

    def read(self) -> bool:
        """Log what is there now; False at the end of the pipe. Takes a bounded number of steps."""
        with self._lock:
            if self.fd < 0:
                return False
            for _ in range(_ROUNDS):
                try:
                    if self._allow():
                        data = os.read(self.fd, _READ_SIZE)
                        if not data:
                            return False
                        self._allowance -= len(data)
                        self._take(data)
                    elif not self._skip():
                        return False
                except BlockingIOError:
                    return True
        return True

    def close(self) -> None:
        """Log what is still in the pipe, over the budget or not: it is little, and it may be a last stack."""
        with self._lock:
            if self.fd < 0:
                return
            self._take_last()
            os.close(self.fd)
            self.fd = -1
            if self._null_fd >= 0:
                os.close(self._null_fd)
                self._null_fd = -1

    def _take_last(self) -> None:
        last = self._unlogged.partition(b"\n")[2]
        self._skipped -= len(last)
        self._report_skipped()
        self._allowance = float(BUDGET)
        self._take(last)
        self._allowance = float(BUDGET)
        self.read()
        if self._line:
            self._emit(self._line)
            self._line = b""

    def charge(self, size: int) -> bool:
        """Count what is logged of this process beside what it prints; False where that is over its budget as well."""
        with self._lock:
            if self._allow():
                self._allowance -= size + _LINE_COST
                return True
            self._skipped += size
            return False

    def forget(self) -> None:
        """In a forked child: close the inherited descriptors and log nothing."""
        for fd in (self.fd, self._null_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._null_fd = -1

    def tail(self, job_id: str) -> str:
        """The last lines that were printed during this job."""
        return "\n".join(line for job, line in self._tail if job == job_id)

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

    def _skip(self) -> bool:
        """Drop what is over the budget, but for the last of it, which may yet be somebody's last words."""
        waiting = int(struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, b"\0" * 4))[0])
        if waiting > _READ_SIZE:
            self._skipped += os.splice(self.fd, self._null(), waiting - _READ_SIZE)
        data = os.read(self.fd, _READ_SIZE)
        self._skipped += len(data)
        self._unlogged = (self._unlogged + data)[-_READ_SIZE:]
        return bool(data)

    def _report_skipped(self) -> None:
        if self._skipped:
            self._line = self._unlogged = b""
            logger.warning("%s: %d bytes of output over the budget were dropped", self.label, self._skipped)
            self._skipped = 0

    def _take(self, data: bytes) -> None:
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        for number, line in enumerate(lines):
            if self._allowance <= 0 and number:
                self._skipped += sum(len(rest) + 1 for rest in lines[number:])
                break
            self._allowance -= _LINE_COST
            self._emit(line)
        if len(self._line) > _MAX_LINE:
            self._emit(self._line)
            self._line = b""

    def _emit(self, line: bytes) -> None:
        text = printable(line[:_MAX_LINE].decode(errors="backslashreplace").rstrip("\r"))
        job_id = self.job_id
        self._tail.append((job_id, text))
        extra = {"job_id": job_id, "worker": self.pid}
        logger.info("%s%s: %s", self.label, f" job {job_id}" if job_id else "", text, extra=extra)

    def _null(self) -> int:
        if self._null_fd < 0:
            self._null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        return self._null_fd
