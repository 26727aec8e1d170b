"""Whose line it is, where several jobs of a worker print at once: a tag before each, lane and job by their numbers.

What a worker says of its own jobs may be wrong, if it is not honest; of another worker's it can say nothing.
"""

from __future__ import annotations

from typing import Final

_MARK: Final = b"\0"
_MOST: Final = 24


def tag_of(lane: int, job: int) -> bytes:
    """What stands before each line of this job."""
    return b"\0%d.%d\0" % (lane, job)


def split_tag(line: bytes) -> tuple[tuple[int, int] | None, bytes]:
    """Lane and job of a line, None where it has no tag; and the line without it."""
    if not line.startswith(_MARK):
        return None, line
    end = line.find(_MARK, 1, _MOST)
    lane, dot, job = line[1 : max(end, 1)].partition(b".")
    if not dot or not (lane.isdigit() and job.isdigit()):
        return None, line
    return (int(lane), int(job)), line[end + 1 :]
