"""Cancel scopes: a block whose jobs end when it is cancelled, from any thread, or when its time is up.

    with CancelScope(timeout=30) as scope:
        session.get(...)            # ends at the latest after 30 s
    ...
    scope.cancel(UserLeft())        # from any thread: every job of the block ends now

A job belongs to the scopes that are open when it is opened, and stays theirs for its whole life. The scope
of the running context is a context variable (PEP 567): threads and tasks have their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from ..errors import DeadlineExceeded, JobClosed
from .durations import check_seconds

_current: ContextVar[CancelScope | None] = ContextVar("cancel_scope", default=None)

Watcher = Callable[[BaseException], object]


class CancelScope:
    """A block of jobs that can be cancelled together. `timeout` is its time in seconds, from entering it.

    Scopes nest: cancelling one cancels what lies within, and no job outlasts the nearest deadline. A scope is
    entered once.
    """

    def __init__(self, timeout: float | None = None) -> None:
        check_seconds("the timeout of a scope", timeout, optional=True, endless=True)
        if timeout == math.inf:
            timeout = None
        self._timeout = timeout
        self._lock = threading.RLock()
        self._watchers: dict[object, Watcher] = {}
        self._cause: BaseException | None = None
        self._parent: CancelScope | None = None
        self._token: Token[CancelScope | None] | None = None
        self._own_deadline: float | None = None

    def __enter__(self) -> Self:
        if self._token is not None:
            raise RuntimeError("a CancelScope is entered once: make another one")
        self._parent = _current.get()
        if self._timeout is not None:
            self._own_deadline = time.monotonic() + self._timeout
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)

    @property
    def deadline(self) -> float | None:
        """When its time, or that of a scope around it, is up, on the clock of `time.monotonic`; None for never."""
        outer = self._parent.deadline if self._parent is not None else None
        times = [moment for moment in (self._own_deadline, outer) if moment is not None]
        return min(times, default=None)

    @property
    def cause(self) -> BaseException | None:
        """What it, or a scope around it, was cancelled with; None where it was not."""
        if self._cause is not None:
            return self._cause
        if self._own_deadline is not None and time.monotonic() >= self._own_deadline:
            self.expire()
        return self._cause or (self._parent.cause if self._parent is not None else None)

    @property
    def cancelled(self) -> bool:
        """Whether it, or a scope around it, was cancelled, or its time is up."""
        return self.cause is not None

    def cancel(self, cause: BaseException | str | None = None) -> None:
        """End every job of the block, those that wait for a worker too; from any thread. The first cause stands.

        Callers get a JobClosed whose `__cause__` it is. Nobody waits for the workers here.
        """
        if not isinstance(cause, BaseException):
            cause = JobClosed(cause or "the scope was cancelled")
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            watchers = list(self._watchers.values())
            self._watchers.clear()
        for watcher in watchers:
            watcher(cause)

    def expire(self) -> None:
        """Cancel whichever scope's time is up, this one or one around it."""
        now = time.monotonic()
        scope: CancelScope | None = self
        while scope is not None:
            if scope._own_deadline is not None and scope._own_deadline <= now:
                scope.cancel(DeadlineExceeded(f"the scope's time of {scope._timeout} s is up"))
            scope = scope._parent

    def watch(self, key: object, watcher: Watcher) -> None:
        """Have `watcher` called with the cause when this scope or one around it is cancelled; now, if it was."""
        cause = self.cause
        scope: CancelScope | None = self
        while scope is not None and cause is None:
            with scope._lock:
                cause = scope._cause
                if cause is None:
                    scope._watchers[key] = watcher
            scope = scope._parent
        if cause is not None:
            watcher(cause)

    def unwatch(self, key: object) -> None:
        """End `watch`."""
        scope: CancelScope | None = self
        while scope is not None:
            with scope._lock:
                scope._watchers.pop(key, None)
            scope = scope._parent


def current_scope() -> CancelScope | None:
    """The innermost scope of the running context."""
    return _current.get()
