"""How many descriptors a process may have open, and room for more (getrlimit(2), RLIMIT_NOFILE)."""

from __future__ import annotations

import os
import resource
from typing import Final

_MARGIN: Final = 64
"""Descriptors for what else the process does, where the hard limit has room for them too."""

_reserved: dict[object, int] = {}


def make_room(count: int, owner: object = None) -> int:
    """Have room for so many more descriptors, as far as the hard limit goes; how many there is room for.

    The soft limit is raised where that is needed, and no further. What an `owner` may open is counted until `release`,
    opened or not: others that make room leave room for it.
    """
    if owner is not None:
        _reserved[owner] = count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return count
    try:
        taken = len(os.listdir("/proc/self/fd"))
    except OSError:
        taken = soft  # there is not even one to look with
    wanted = taken + max(count, sum(list(_reserved.values()))) + _MARGIN
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return min(count, soft - taken)


def release(owner: object) -> None:
    """The owner opens no more."""
    _reserved.pop(owner, None)
