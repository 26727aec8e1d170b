"""What each worker is doing at this moment, for `Pool.workers`, the status page and `top`. It reads /proc."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil

from ..events import WorkerInfo
from .leases import Leases
from .record import Worker


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
        leased = leases.is_leased(worker)
        job = worker.job() if leased and worker.job is not None else None
        found.append(
            WorkerInfo(
                worker.pid,
                "busy" if leased else "idle" if worker.ready else "starting",
                worker.log.job_id if leased else "",
                worker.jobs,
                time.monotonic() - worker.ordered_at,
                rss,
                times.user + times.system,
                request="" if job is None else f"{job.method} {job.target}",
            )
        )
    return found
