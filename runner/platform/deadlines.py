"""Calling back after a fixed time, for an asyncio loop: as many as there are for the price of one timer.

A loop's own timer is a heap's entry, which stays in the heap when it is cancelled. Here all wait equally long, so that
they stand in a queue, and one that is cancelled leaves it at once.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections import OrderedDict
from collections.abc import Callable


class Deadlines:
    """Callbacks that come `seconds` after they were asked for, in the loop's thread. They must not raise."""

    __slots__ = ("_clock", "_loop", "_timer", "_waiting", "seconds")

    def __init__(self, loop: AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._clock = loop.time
        self.seconds = seconds
        self._waiting: OrderedDict[object, tuple[float, Callable[[], object]]] = OrderedDict()
        self._timer: TimerHandle | None = None

    def start(self, key: object, callback: Callable[[], object]) -> None:
        """Have `callback` called; `key` may have no other under way here."""
        at = self._clock() + self.seconds
        self._waiting[key] = at, callback
        if self._timer is None:
            self._timer = self._loop.call_at(at, self._look)

    def cancel(self, key: object) -> None:
        """Have it called no more, if it is still to come."""
        self._waiting.pop(key, None)

    def close(self) -> None:
        """Call nothing any more."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        waiting = self._waiting
        now = self._clock()
        while waiting:
            key = next(iter(waiting))
            at, callback = waiting[key]
            if at > now:
                self._timer = self._loop.call_at(at, self._look)
                return
            del waiting[key]
            callback()
