"""A small loop for one thread: watched descriptors, timers, and calls from other threads."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..model.durations import LONGEST_WAIT

logger = logging.getLogger("blastdoor")

Callback = Callable[[], object]

_REPORT_INTERVAL: Final = 1.0
"""Seconds between two reports of errors in callbacks."""


class Reactor:
    """Calls back in the thread that is in `run`, until `finish`. Only `call` may come from other threads."""

    def __init__(self) -> None:
        self._timers: list[tuple[float, int, Callback]] = []
        self._timer_numbers = itertools.count()
        self._calls: deque[Callback] = deque()
        # Reentrant, since `call` may come from a finalizer that runs in the middle of anything.
        self._lock = threading.RLock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._selector = selectors.DefaultSelector()
        except OSError:
            os.close(self._wake_fd)
            raise
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._take_calls)
        self._finished = False
        self._errors = 0
        self._next_report = 0.0

    def call(self, callback: Callback) -> bool:
        """Have `callback` called soon; False where the loop has ended, and it never will be."""
        with self._lock:
            if self._wake_fd < 0:
                return False
            self._calls.append(callback)
            os.eventfd_write(self._wake_fd, 1)
            return True

    def after(self, seconds: float, callback: Callback) -> None:
        """Have `callback` called once, in so many seconds."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), callback))

    def watch(self, fd: int, callback: Callback, events: int = selectors.EVENT_READ) -> None:
        """Have `callback` called whenever the descriptor is ready, until `unwatch`."""
        self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Watch it no more, if it is watched. To be called before the descriptor is closed."""
        if self.watches(fd):
            self._selector.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether the descriptor is watched."""
        return fd >= 0 and fd in self._selector.get_map()

    def run(self) -> None:
        """Wait and call back until `finish`; an error in a callback is logged, and touches no other."""
        try:
            while not self._finished:
                self._guard(self._step)
        finally:
            with self._lock:
                os.close(self._wake_fd)
                self._wake_fd = -1
            self._run_calls()
            self._selector.close()

    def _guard(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:
            now = time.monotonic()
            self._errors += 1
            if now < self._next_report:
                return  # the same callback may fail again and again: its descriptor stays ready
            self._next_report = now + _REPORT_INTERVAL
            # Logging itself may be what raises: a filter or a handler of the application's.
            with contextlib.suppress(Exception):
                logger.exception("the supervisor met an error, its %dth, and goes on", self._errors)

    def abandon(self) -> None:
        """Close the descriptors of a loop whose `run` was never begun."""
        self._selector.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def finish(self) -> None:
        """End `run` after this callback. Calls that have come in are still made."""
        self._finished = True

    def after_fork_in_child(self) -> None:
        """In a forked child, where nobody is in `run`: close the inherited descriptors."""
        self._lock = threading.RLock()  # the old one may be held by a thread that is not here
        self._finished = True
        self._selector.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _step(self) -> None:
        timeout = None
        if self._timers:
            timeout = min(max(self._timers[0][0] - time.monotonic(), 0), LONGEST_WAIT)
        for key, _ in self._selector.select(timeout):
            # An earlier callback of this round may have ended this watch, or begun another on its number.
            if self._selector.get_map().get(key.fd) is key:
                self._guard(key.data)
        now = time.monotonic()
        due = []
        while self._timers and self._timers[0][0] <= now:  # one that is set meanwhile has its turn in the next step
            due.append(heapq.heappop(self._timers)[2])
        for callback in due:
            self._guard(callback)

    def _take_calls(self) -> None:
        os.eventfd_read(self._wake_fd)
        self._run_calls()

    def _run_calls(self) -> None:
        while self._calls:
            self._guard(self._calls.popleft())
