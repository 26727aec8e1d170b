"""How a job hears, in its worker, that its caller has left: an exception in the handler, once.

The host writes the job's number to the line and sends a signal. The signal's handler runs in the main
thread, between two bytecodes of whatever runs there, and raises JobCancelled if the number is the running
job's: so a cancel that comes late touches no other job. In the worker's own dealings with its pipes the
exception waits until they are done, so that no frame is cut. Where jobs have threads, `threads` has its own way.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Protocol

from ..control.line_messages import read_cancel
from ..control.signals import SIGNAL
from ..errors import JobCancelled


class Shield(Protocol):
    """The ear of a job that is a function. A context manager around what must not be interrupted."""

    cancelled: bool

    def begin(self, job: int) -> None:
        """This job's handler runs from now on."""

    def end(self) -> None:
        """The handler has ended: nothing is to be interrupted any more."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Cancellation:
    """That of a worker of one job at a time, which runs in its main thread."""

    __slots__ = ("_fd", "_job", "_main", "_pending", "_shields", "cancelled")

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._job = 0
        self._main = threading.get_ident()
        self._shields = 0
        self._pending = False
        self.cancelled = False

    def install(self) -> None:
        """Listen. To be called in the main thread."""
        signal.signal(SIGNAL, self._hear)

    def begin(self, job: int) -> None:
        self.cancelled = self._pending = False
        self._job = job

    def end(self) -> None:
        self._job = 0

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:  # signals are handled nowhere else
            self._shields += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.get_ident() != self._main:
            return
        self._shields -= 1
        if self._pending and not self._shields:
            self._pending = False
            if kind is None and self._job:
                raise JobCancelled

    def _hear(self, number: int, frame: FrameType | None) -> None:
        try:
            job = read_cancel(self._fd)
        except EOFError:
            return  # the end of the request pipe tells the rest
        if job is None or job != self._job:
            return
        self.cancelled = True
        if self._shields:
            self._pending = True
        else:
            raise JobCancelled
