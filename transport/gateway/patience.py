"""How long a client is waited for that sends its body: it holds a worker meanwhile."""

from __future__ import annotations

import time
from typing import Final

MIN_RATE: Final = 500
"""Bytes that a client has to send for each second that it is waited for, beyond the patience that it begins with."""


class Patience:
    """Seconds that a client may still be waited for. What it sends wins back what was used, MIN_RATE bytes a second."""

    __slots__ = ("_began", "_most", "left")

    def __init__(self, seconds: float) -> None:
        self._most = self.left = seconds
        self._began = 0.0

    def begin(self) -> float:
        """The client is waited for from now on; gives for how long."""
        self._began = time.monotonic()
        return max(self.left, 0.0)

    def end(self, received: int) -> None:
        """It has sent so many bytes."""
        self.left = min(self.left + received / MIN_RATE - (time.monotonic() - self._began), self._most)
