"""What each worker is doing at this moment, for `Pool.workers`, the status page and `top`. It reads /proc."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import psutil

from ..events import WorkerInfo
from .leases import Leases
from .record import Lane, Worker


def describe_workers(workers: Iterable[Worker], leases: Leases) -> list[WorkerInfo]:
    """Those of these workers that have a process now."""
    found = []
    for worker in workers:
        if worker.pid is None:
            continue
        try:
            process = psutil.Process(worker.pid)
            with process.oneshot():
                rss, times = process.memory_info().rss, process.cpu_times()
        except psutil.Error:
            continue  # it has ended meanwhile
        lanes = leases.lanes_of(worker)
        lane = min(lanes, key=_begin) if lanes else None
        job = None if lane is None or lane.job is None else lane.job()
        found.append(
            WorkerInfo(
                worker.pid,
                "busy" if lanes else "idle" if worker.ready else "starting",
                "" if lane is None else lane.job_id,
                worker.jobs,
                time.monotonic() - worker.ordered_at,
                rss,
                times.user + times.system,
                request="" if job is None else f"{job.method} {job.target}",
                running=len(lanes),
                concurrency=worker.concurrency,
                leaving=worker.leaving,
            )
        )
    return found


def _begin(lane: Lane) -> float:
    """When its job began, for the longest of several."""
    job = None if lane.job is None else lane.job()
    return math.inf if job is None else job.began
