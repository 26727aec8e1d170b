"""What a worker and its jobs may use, as data; and how a worker takes the part that the kernel enforces.

Memory is enforced twice: by the kernel's limits on the worker's own address space (setrlimit(2)), which give
the handler a MemoryError, and by the supervisor, which watches what the worker and all that it has started
really take, and kills.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import MutableMapping
from dataclasses import dataclass, fields
from typing import Final

from ..errors import ConfigurationError
from .durations import check_seconds

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B?|B)?\s*", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

_LEAST_MEMORY: Final = 16 << 20

_THREAD_VARIABLES: Final = (
    "BLIS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""The variables that the numeric libraries take their thread counts from, as joblib sets them."""

_ADDRESS_SPACE: Final = 4
"""How much more address space than memory a worker may reserve: threads reserve far more than they use."""


THREAD_STACK: Final = 2 << 20
"""Bytes of stack of a lane's thread where the worker's memory is limited: stacks count as memory (RLIMIT_DATA)."""


def parse_size(size: int | str) -> int:
    """A size in bytes from a number or a text such as "512MiB", "2 GB" or "64k" (KiB and kB are 1024 and 1000)."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise ConfigurationError(f"{size!r} is not a size: give bytes, or a text such as '512MiB'")
    unit = (found[2] or "").lower()
    base = 1000 if unit.endswith("b") and "i" not in unit else 1024
    return int(float(found[1]) * base ** _POWERS[unit.rstrip("b").rstrip("i")])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one worker and of each job in it; None leaves a thing unlimited.

    Sizes are bytes, or texts such as "512MiB"; times are seconds. `memory`: of the worker with all that it has
    started. `cpu_seconds`, `wall_seconds`: of each job; a job that takes longer is a 504. `open_files`,
    `processes` (of the user, and not for root: setrlimit(2)), `file_size`: of the worker. `nice` lowers its
    priority, `cpus` are the cores that it may run on. Raises ConfigurationError for what makes no sense.
    """

    memory: int | str | None = None
    cpu_seconds: float | None = None
    wall_seconds: float | None = None
    open_files: int | None = None
    processes: int | None = None
    file_size: int | str | None = None
    nice: int = 0
    cpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("memory", "file_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_size(value))
        if self.memory is not None and 0 < parse_size(self.memory) < _LEAST_MEMORY:
            raise ConfigurationError(
                f"the limit memory is 16 MiB or more, not {self.memory!r} bytes: a worker takes some itself"
            )
        object.__setattr__(self, "cpus", tuple(self.cpus))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cpus":
                if not set(self.cpus) <= os.sched_getaffinity(0):
                    raise ConfigurationError(
                        f"cpus={self.cpus}: this process may only run on {os.sched_getaffinity(0)}"
                    )
            elif field.name == "nice":
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 19:
                    raise ConfigurationError(f"nice is a number from 0 to 19, not {value!r}")
            elif field.name in ("open_files", "processes") and value is not None and not isinstance(value, int):
                raise ConfigurationError(f"the limit {field.name} is a whole number above zero, or None, not {value!r}")
            elif field.name in ("cpu_seconds", "wall_seconds"):
                check_seconds(f"the limit {field.name}", value, optional=True)
                if value == 0:
                    raise ConfigurationError(f"the limit {field.name} is a time above zero, or None")
            elif value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf")
            ):
                raise ConfigurationError(f"the limit {field.name} is a number above zero, or None, not {value!r}")

    @property
    def memory_bytes(self) -> int | None:
        """The limit of memory in bytes."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def watched(self) -> bool:
        """Whether the supervisor has to look after jobs to enforce them."""
        return self.memory is not None or self.cpu_seconds is not None or self.wall_seconds is not None

    def apply(self, lanes: int = 1) -> None:
        """Take the limits that the kernel enforces on this process, which is a worker before its handler loads.

        Descriptors and stacks of its further lanes are no concern of the handler's: they come on top.
        """
        more = lanes - 1
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        memory = self.memory_bytes
        if memory is not None:
            _limit(resource.RLIMIT_DATA, memory + more * THREAD_STACK)
            _limit(resource.RLIMIT_AS, memory * _ADDRESS_SPACE + 2 * more * THREAD_STACK)
        if self.open_files is not None:
            _limit(resource.RLIMIT_NOFILE, self.open_files + 2 * more)
        if self.processes is not None:
            _limit(resource.RLIMIT_NPROC, self.processes)
        if self.file_size is not None:
            _limit(resource.RLIMIT_FSIZE, parse_size(self.file_size))
        if self.nice:
            os.nice(self.nice)
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def over_wall_time(seconds: float) -> str:
    """What is said of a job over its wall time."""
    return f"the job took longer than {seconds} s"


def share_cores(env: MutableMapping[str, str], workers: int, limits: Limits, *, preload: bool) -> None:
    """Set what keeps as many workers from using more threads than there are cores, where it is not set.

    With a `preload` numeric libraries start none at all: threads do not survive the fork that makes a worker.
    """
    cores = len(limits.cpus or os.sched_getaffinity(0))
    threads = 1 if limits.cpus or preload else max(cores // workers, 1)
    for name in _THREAD_VARIABLES:
        env.setdefault(name, str(threads))
    if limits.memory is not None:
        env.setdefault("MALLOC_ARENA_MAX", "2")
