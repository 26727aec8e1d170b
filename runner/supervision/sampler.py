"""Looking after jobs under way: which of them is over a limit of memory, processor time or wall time.

Nothing tells when a process grows or a clock runs out, so this is looked at every so often, but only while
jobs run and limits are set. A caller that waits sees its job's wall time by itself; this is for the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import psutil

from ..control.lane_threads import lane_thread_name
from ..model.limits import Limits, over_wall_time
from ..platform import linux
from .record import Lane, Worker

IDLE_SECONDS: Final = 0.5
"""Processor time in seconds that a sandboxed worker may use between two jobs, where it should do nothing."""


_NOT_THERE: Final = 0
_NAMING_LIMIT: Final = 1.0
"""Seconds that the thread of a job may go without its name: it may just be about to start."""


class WatchedJob(Protocol):
    """A job that is looked after: of a caller, or of nobody any more."""

    @property
    def job_id(self) -> str: ...

    @property
    def began(self) -> float: ...

    @property
    def settled(self) -> bool: ...

    def over_time(self, detail: str) -> None: ...


@dataclass(frozen=True)
class LimitViolation:
    """A worker's job is over a limit: which one, and in words."""

    worker: Worker
    job: WatchedJob
    kind: Literal["memory", "timeout"]
    detail: str

    def words(self) -> tuple[str, str, int | None]:
        """Job id, what it is over, and the worker's pid, for the log."""
        return self.job.job_id, self.detail, self.worker.pid


class ProcessSampler:
    """Finds jobs that are over their limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._began: dict[Lane, _Spending] = {}
        self._idle: dict[int, tuple[float, float]] = {}

    def look(self, jobs: Iterable[tuple[Lane, WatchedJob]]) -> list[LimitViolation]:
        """Which of these jobs is over a limit now."""
        found = []
        by_worker: dict[Worker, list[tuple[Lane, WatchedJob]]] = {}
        for lane, job in jobs:
            by_worker.setdefault(lane.worker, []).append((lane, job))
        began, self._began = self._began, {}
        for worker, its_jobs in by_worker.items():
            if worker.pid is None or worker.dead:
                continue
            try:
                process = psutil.Process(worker.pid)
                # First what is ended at once: of two limits that were passed between two looks this one hurts others.
                if (detail := self._over_memory(process, len(its_jobs))) is not None:
                    found.append(LimitViolation(worker, its_jobs[0][1], "memory", detail))
                    continue
                for lane, job in its_jobs:
                    if (detail := self._over_time(lane, job, process, began)) is not None:
                        found.append(LimitViolation(worker, job, "timeout", detail))
            except psutil.Error:
                continue  # it has ended meanwhile, which is told elsewhere
        return found

    def look_at_idle(self, workers: Iterable[Worker]) -> list[tuple[Worker, float, str]]:
        """Which of these workers, that have no job, do what only a job may; with since when it is idle, and words."""
        found = []
        seen: dict[int, tuple[float, float]] = {}
        for worker in workers:
            if worker.pid is None or worker.dead:
                continue
            since = worker.idle_since
            try:
                process = psutil.Process(worker.pid)
                if process.status() == psutil.STATUS_STOPPED:
                    found.append((worker, since, "was stopped"))
                    continue
                used = _processor_time(process)
                limit = self._limits.memory_bytes
                taken = _memory(process, limit) if limit is not None else 0
            except psutil.Error:
                continue
            known, before = self._idle.get(worker.number, (since, used))
            seen[worker.number] = since, used if known != since else before
            if limit is not None and taken > limit:
                found.append((worker, since, f"took {taken >> 20} MiB of memory"))
            elif known == since and used - before > IDLE_SECONDS:
                found.append((worker, since, f"used more than {IDLE_SECONDS} s of processor time"))
        self._idle = seen
        return found

    def _over_memory(self, process: psutil.Process, jobs: int) -> str | None:
        limit = self._limits.memory_bytes
        if limit is None or (taken := _memory(process, limit)) <= limit:
            return None
        who = "the job" if jobs == 1 else f"the worker with its {jobs} jobs"
        return f"{who} took {taken >> 20} MiB of memory, over its limit of {limit >> 20} MiB"

    def _over_time(
        self, lane: Lane, job: WatchedJob, process: psutil.Process, began: dict[Lane, _Spending]
    ) -> str | None:
        """What is to be said of a job that is over a time limit."""
        limits = self._limits
        if limits.wall_seconds is not None and time.monotonic() > job.began + limits.wall_seconds:
            return over_wall_time(limits.wall_seconds)
        worker = lane.worker
        if limits.cpu_seconds is None or (worker.concurrency > 1 and not worker.threads):
            return None  # jobs of one event loop can't be told apart
        spending = began.get(lane)
        if spending is None or spending.job_id != job.job_id:
            thread = None if worker.concurrency == 1 else _thread_of(process.pid, lane, spending)
            if thread == _NOT_THERE and time.monotonic() < job.began + _NAMING_LIMIT:
                return None  # it is looked for again
            if thread == _NOT_THERE:
                thread = None
            spending = _Spending(job.job_id, thread)
            spending.before = spending.used(process, lane)
        self._began[lane] = spending
        if spending.used(process, lane) - spending.before > limits.cpu_seconds:
            return f"the job used more than {limits.cpu_seconds} s of processor time"
        return None


class _Spending:
    """What a job has used of processor time: its lane's thread, or its whole worker where it has no other job.

    A job whose thread goes by another name all at once is measured by its worker from then on.
    """

    __slots__ = ("before", "job_id", "thread")

    def __init__(self, job_id: str, thread: int | None) -> None:
        self.job_id = job_id
        self.thread = thread
        self.before = 0.0

    def used(self, process: psutil.Process, lane: Lane) -> float:
        """So far, in seconds."""
        if self.thread is not None:
            if linux.thread_name(process.pid, self.thread) == lane_thread_name(lane.number):
                return linux.thread_time(process.pid, self.thread)
            self.thread = None
            self.before = _processor_time(process)
        return _processor_time(process)


def _thread_of(pid: int, lane: Lane, last: _Spending | None) -> int | None:
    """The thread that serves a lane, by its name; _NOT_THERE where there is none, None where there are several."""
    wanted = lane_thread_name(lane.number)
    if last is not None and last.thread is not None and linux.thread_name(pid, last.thread) == wanted:
        return last.thread
    found = [thread for thread in linux.threads(pid) if linux.thread_name(pid, thread) == wanted]
    if not found:
        return _NOT_THERE
    return found[0] if len(found) == 1 else None


def _processor_time(process: psutil.Process) -> float:
    """What a worker and all below it have used, in seconds; children that were waited for are in their parents'."""
    used = 0.0
    for member in _family(process):
        try:
            used += sum(member.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return used


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A worker and all below it."""
    family = [process]
    for pid in linux.descendants(process.pid):
        try:
            family.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return family


def _memory(process: psutil.Process, limit: int) -> int:
    """What a worker and all below it take, in bytes; shared pages are shared out where that decides (PSS)."""
    family = _family(process)
    taken = sum(_rss(member) for member in family)
    if taken > limit:
        taken = sum(_pss(member) for member in family)
    return taken


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:  # a sandboxed worker lets nobody of its user look into it (prctl(2), PR_SET_DUMPABLE)
        return _rss(process)
