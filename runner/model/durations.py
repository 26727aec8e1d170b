"""Times in seconds: what may be given as one, and how long to wait at once."""

from __future__ import annotations

import math
import threading
import time
from typing import Final

from ..errors import ConfigurationError

LONGEST: Final = 1e9
"""The longest time that a setting may be, in seconds: some 31 years."""

LONGEST_WAIT: Final = 3600.0
"""Seconds that a thread sleeps at most before it looks again: poll(2) takes no more than 2^31 milliseconds."""


MAIN_THREAD_WAIT: Final = 1.0
"""The same for the main thread. A signal that comes just before it sleeps, or to another thread, wakes nobody: its
handler runs when the main thread looks up (signal(7); Python's `signal`)."""


def longest_wait() -> float:
    """Seconds that this thread sleeps at most before it looks again."""
    return MAIN_THREAD_WAIT if threading.get_ident() == threading.main_thread().ident else LONGEST_WAIT


def check_seconds(name: str, seconds: object, *, optional: bool = False, endless: bool = False) -> None:
    """Refuse what is no time in seconds, from 0 to LONGEST: NaN, a negative number, a text. ConfigurationError.

    None passes where it is `optional`, infinity where the wait may be `endless`.
    """
    if seconds is None and optional:
        return
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if number and (0 <= seconds <= LONGEST or (endless and seconds == math.inf)):  # type: ignore[operator]
        return
    also = ", or None" if optional else ""
    raise ConfigurationError(f"{name} is a time in seconds, from 0 to {LONGEST:g}{also}, not {seconds!r}")


def min_timeout(timeout: float | None, moment: float | None) -> float | None:
    """The shorter of a wait in seconds and what is left until a moment on the monotonic clock."""
    if moment is None:
        return timeout
    left = max(moment - time.monotonic(), 0)
    return left if timeout is None else min(timeout, left)
