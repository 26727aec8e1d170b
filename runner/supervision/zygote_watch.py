"""Finding a zygote that was stopped, or hangs: it owes its host a birth or a death, and says nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from .reactor import Reactor

_SILENCE_LIMIT: Final = 5.0
"""Seconds that the zygote may say nothing while it owes us news."""


class ZygoteWatch:
    """Looks only while news are owed. `births_owed` tells whether a birth is; `unreported` are the deaths that are.

    `silent` is called with the seconds of silence once they are too many; in the supervisor's thread, as all of it.
    """

    def __init__(self, reactor: Reactor, births_owed: Callable[[], bool], silent: Callable[[float], object]) -> None:
        self.unreported: set[int] = set()
        self._reactor = reactor
        self._births_owed = births_owed
        self._silent = silent
        self._heard_at = math.inf
        self._owed_since = 0.0
        self._is_due = False

    def begin(self) -> None:
        """A zygote starts: until it has forked its first worker it may import for as long as that takes."""
        self._heard_at = math.inf

    def heard(self) -> None:
        """It has told something."""
        self._heard_at = time.monotonic()

    def expect_news(self) -> None:
        """It is about to owe news: look at it as long as it does."""
        if not self._owed:
            self._owed_since = time.monotonic()
        if not self._is_due:
            self._is_due = True
            self._reactor.after(_SILENCE_LIMIT, self._look)

    @property
    def _owed(self) -> bool:
        return bool(self.unreported) or self._births_owed()

    def _look(self) -> None:
        self._is_due = False
        if not self._owed:
            return
        silence = max(time.monotonic() - max(self._heard_at, self._owed_since), 0)
        if silence >= _SILENCE_LIMIT:
            self._silent(silence)
        else:
            self._is_due = True
            self._reactor.after(_SILENCE_LIMIT - silence, self._look)
