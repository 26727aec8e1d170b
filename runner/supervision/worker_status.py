"""What each worker is doing at this moment, for `Pool.workers`, the status page and `top`. It reads /proc."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from ..events import LaneInfo, WorkerInfo
from ..platform import linux
from .leases import Leases
from .record import Lane, Worker

_MOST_LANES: Final = 32


def describe_workers(workers: Iterable[Worker], leases: Leases) -> list[WorkerInfo]:
    """Those of these workers that have a process now."""
    found = []
    for worker in workers:
        if worker.pid is None:
            continue
        try:
            rss, cpu_seconds = linux.process_usage(worker.pid)
        except (OSError, IndexError):
            continue  # it has ended meanwhile
        now = time.monotonic()
        held = leases.lanes_of(worker)
        lanes = sorted((_describe_lane(lane, now) for lane in held), key=lambda lane: -lane.seconds)
        found.append(
            WorkerInfo(
                worker.pid,
                "busy" if lanes else "idle" if worker.ready else "starting",
                lanes[0].job_id if lanes else "",
                worker.jobs,
                now - worker.ordered_at,
                rss,
                cpu_seconds,
                request=lanes[0].request if lanes else "",
                running=len(lanes),
                concurrency=worker.concurrency,
                leaving=worker.leaving,
                lanes=tuple(lanes[:_MOST_LANES]),
            )
        )
    return found


def _describe_lane(lane: Lane, now: float) -> LaneInfo:
    job = None if lane.job is None else lane.job()
    if job is None:
        return LaneInfo(lane.number, lane.job_id, "", 0.0)
    return LaneInfo(lane.number, lane.job_id, f"{job.method} {job.target}", now - job.began)
