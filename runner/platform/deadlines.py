"""Calling back after a fixed time, for an asyncio loop: as many as there are for the price of one timer.

A loop's own timer is an entry of a heap, which stays there when it is cancelled. Here all wait equally long, so that
they stand in a queue.
"""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable
from typing import Final

_SPARE: Final = 256
"""Entries that may be there beyond twice those that count, before the others are thrown away."""


class Deadline:
    """One callback to come."""

    __slots__ = ("_deadlines", "at", "callback")

    def __init__(self, deadlines: Deadlines, at: float, callback: Callable[[], object]) -> None:
        self._deadlines = deadlines
        self.at = at
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """It does not come, if it has not."""
        if self.callback is not None:
            self.callback = None
            self._deadlines.alive -= 1


class Deadlines:
    """Callbacks that come `seconds` after they were asked for, in the loop's thread.

    What one raises is given to the loop's exception handler.
    """

    __slots__ = ("_loop", "_queue", "_timer", "alive", "seconds")

    def __init__(self, loop: AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self.seconds = seconds
        self.alive = 0
        self._queue: deque[Deadline] = deque()
        self._timer: TimerHandle | None = None

    def start(self, callback: Callable[[], object]) -> Deadline:
        """Have `callback` called."""
        deadline = Deadline(self, time.monotonic() + self.seconds, callback)
        queue = self._queue
        self.alive += 1
        queue.append(deadline)
        if self._timer is None:
            self._timer = self._loop.call_later(self.seconds, self._look)
        elif len(queue) > 2 * self.alive + _SPARE:
            self._queue = deque(waiting for waiting in queue if waiting.callback is not None)
        return deadline

    def close(self) -> None:
        """Call nothing any more."""
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._queue:
            deadline = self._queue[0]
            callback = deadline.callback
            if callback is not None and deadline.at > now:
                if self._timer is None:  # a callback may have started it
                    self._timer = self._loop.call_later(deadline.at - now, self._look)
                return
            self._queue.popleft()
            if callback is not None:
                deadline.cancel()
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - the others' time is up all the same
                    context = {"message": "a callback failed when its time was up", "exception": error}
                    self._loop.call_exception_handler(context)


class DeadlinesByTime:
    """`Deadlines` by their seconds, of which there are few: those that are asked for, and all closed together."""

    __slots__ = ("_by_seconds", "_loop")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._by_seconds: dict[float, Deadlines] = {}

    def after(self, seconds: float) -> Deadlines:
        """What calls back after so many seconds."""
        deadlines = self._by_seconds.get(seconds)
        if deadlines is None:
            deadlines = self._by_seconds[seconds] = Deadlines(self._loop, seconds)
        return deadlines

    def close(self) -> None:
        """Call nothing any more."""
        for deadlines in self._by_seconds.values():
            deadlines.close()
