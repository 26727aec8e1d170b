"""Failed starts of workers in the log: each failure whole once, and counted while it goes on the same way."""

from __future__ import annotations

import logging
import re
from typing import Final

logger = logging.getLogger("blastdoor")

_PIDS: Final = re.compile(r"worker \d+|line \d+")


class StartFailureLog:
    """What one pool tells of its failed starts. `label` stands before it."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._last = ""
        self._same = 0

    def add(self, why: str, pause: float) -> None:
        """A start has failed, for this reason; the next try is in `pause` seconds."""
        again = f"\nnext try in {pause:.1f} s" if pause else ""
        pattern = _PIDS.sub("worker", why)
        if pattern == self._last:
            self._same += 1
            first = why.splitlines()[0]
            logger.error("%s%s (the same as before, %d times now)%s", self._label, first, self._same, again)
            return
        self._last, self._same = pattern, 1
        logger.error("%s%s%s", self._label, why, again)
