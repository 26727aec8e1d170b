"""When a worker may be started again after some have died in start-up: a budget, then growing pauses."""

from __future__ import annotations

from collections import deque


class RestartBackoff:
    """Counts deaths in start-up. Times are seconds on any one clock that does not go back.

    The one that makes it `budget` within `window` seconds brings a pause before the next try, `first_pause`
    seconds long; each further one doubles it, up to `longest_pause`. A start that succeeds ends all that.
    """

    def __init__(
        self,
        budget: int = 5,
        window: float = 10.0,
        first_pause: float = 1.0,
        longest_pause: float = 60.0,
    ) -> None:
        self._budget = budget
        self._window = window
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._failures: deque[float] = deque()
        self._pause = 0.0
        self._until = 0.0

    @property
    def engaged(self) -> bool:
        """Whether starts are paused between one try and the next."""
        return self._pause > 0

    def failed(self, now: float) -> None:
        """A worker died in start-up."""
        self._failures.append(now)
        while self._failures[0] <= now - self._window:
            self._failures.popleft()
        if self._pause:
            self._pause = min(self._pause * 2, self._longest_pause)
        elif len(self._failures) >= self._budget:
            self._pause = self._first_pause
        self._until = now + self._pause

    def succeeded(self) -> None:
        """A worker has run a job, or has lived on for a while after it was ready."""
        self._failures.clear()
        self._pause = self._until = 0.0

    def delay(self, now: float) -> float:
        """Seconds until the next start is allowed, 0 where it is allowed now."""
        return max(self._until - now, 0.0) if self._pause else 0.0
