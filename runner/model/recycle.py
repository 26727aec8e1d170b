"""When a worker has served long enough: after so many jobs, above a size, after a time."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ..errors import ConfigurationError
from .durations import check_seconds
from .limits import parse_size


@dataclass(frozen=True, kw_only=True)
class Recycle:
    """Workers are replaced between two jobs when one of these holds; None means never.

    `after_jobs`: it has run so many jobs; each worker's own number is up to `jitter` (a fraction, 0 to 1) larger,
    so that not all go at once. `above_rss`: its resident memory (bytes, or a text such as "300MiB") is above that
    after a job. `after_seconds`: it has lived so long. ConfigurationError for what makes no sense.
    """

    after_jobs: int | None = None
    jitter: float = 0.1
    above_rss: int | str | None = None
    after_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.above_rss is not None:
            object.__setattr__(self, "above_rss", parse_size(self.above_rss))
        for name in ("after_jobs", "above_rss"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not value > 0):
                raise ConfigurationError(f"{name} is a whole number above zero, or None, not {value!r}")
        check_seconds("after_seconds", self.after_seconds, optional=True)
        if self.after_seconds == 0:
            raise ConfigurationError("after_seconds is a time above zero, or None")
        if not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter is a fraction from 0 to 1, not {self.jitter!r}")

    def last_job(self) -> int | None:
        """The number of the job after which a new worker is replaced."""
        if self.after_jobs is None:
            return None
        return self.after_jobs + int(random.random() * self.jitter * self.after_jobs)

    def is_due(self, pid: int | None, jobs: int, last_job: int | None, ready_at: float) -> bool:
        """Whether a worker that has just ended a job is to be replaced."""
        if last_job is not None and jobs >= last_job:
            return True
        if self.after_seconds is not None and time.monotonic() - ready_at > self.after_seconds:
            return True
        return self.above_rss is not None and pid is not None and _resident(pid) > parse_size(self.above_rss)


def _resident(pid: int) -> int:
    import psutil  # loaded where it is used

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0  # it has ended meanwhile
