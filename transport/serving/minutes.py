"""The last hour by minute and mount: how many requests, how many failed, and how long they took."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

MINUTES: Final = 60
"""How many minutes are kept."""

_STEP: Final = math.log(1.1)
"""Times are counted in classes, each 10 % wider than the one before: so a quantile is right to 5 %."""

_SHORTEST: Final = 1e-5
"""Seconds; what took less is counted as this."""

_MOST_MOUNTS: Final = 1000


class _Minute:
    """What ended in one minute: counts of times by their class."""

    __slots__ = ("answers", "at", "classes", "errors")

    def __init__(self, at: int) -> None:
        self.at = at
        self.answers = self.errors = 0
        self.classes: dict[int, int] = {}

    def add(self, seconds: float, *, failed: bool) -> None:
        """One more request."""
        self.answers += 1
        self.errors += failed
        number = round(math.log(max(seconds, _SHORTEST)) / _STEP)
        self.classes[number] = self.classes.get(number, 0) + 1

    def quantile(self, share: float) -> float:
        """The time in seconds that this share of the requests did not exceed."""
        wanted = max(math.ceil(share * self.answers), 1)
        for number in sorted(self.classes):
            wanted -= self.classes[number]
            if wanted <= 0:
                return math.exp(number * _STEP)
        return 0.0

    def tell(self) -> dict[str, float]:
        """As it goes into JSON; `at` is the minute's first second."""
        return {
            "at": self.at,
            "answers": self.answers,
            "errors": self.errors,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
        }


class LastHour:
    """Counts requests by minute and mount. Not safe to use from several threads."""

    def __init__(self) -> None:
        self._mounts: dict[str, deque[_Minute]] = {}

    def add(self, mount: str, now: int, seconds: float, *, failed: bool) -> None:
        """A request of a mount's has ended at `now`, in seconds of Unix time."""
        minutes = self._mounts.get(mount)
        if minutes is None:
            if len(self._mounts) >= _MOST_MOUNTS:
                return
            minutes = self._mounts[mount] = deque(maxlen=MINUTES)
        at = now - now % 60
        if not minutes or minutes[-1].at < at:
            minutes.append(_Minute(at))
        minutes[-1].add(seconds, failed=failed)

    def tell(self, now: int, providers: Mapping[str, str]) -> dict[str, Any]:
        """What is known of each mount, with its provider; minutes without a request are left out."""
        since = now - now % 60 - (MINUTES - 1) * 60
        return {
            mount: {
                "provider": providers.get(mount, ""),
                "minutes": [minute.tell() for minute in minutes if minute.at >= since],
            }
            for mount, minutes in sorted(self._mounts.items())
        }
