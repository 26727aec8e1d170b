"""Looking after the workers of a pool while it runs: jobs held to their limits, idle workers to idleness, none lost.

All of it happens in the supervisor's thread, at intervals, and only while there is something to look at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..model.limits import Limits
    from .abandoned_jobs import AbandonedJobs
    from .leases import Leases
    from .reactor import Reactor
    from .record import Lane, Worker
    from .sampler import ProcessSampler, WatchedJob

logger = logging.getLogger("blastdoor")

SAMPLE_INTERVAL: Final = 0.05
"""Seconds between two looks at the jobs under way, where limits are set."""

IDLE_INTERVAL: Final = 0.5
"""Seconds between two looks at the idle workers of a sandboxed pool."""


LOST_INTERVAL: Final = 0.25
"""Seconds between two looks, while there are jobs, for workers that nobody holds: the second one is sure."""


class Watchdog:
    """Ends what is over the pool's limits. `workers` are those in service, none that is to be replaced."""

    def __init__(
        self,
        reactor: Reactor,
        leases: Leases,
        left: AbandonedJobs,
        limits: Limits,
        workers: Callable[[], Iterable[Worker]],
    ) -> None:
        self._workers = workers
        self._looking_for_lost = False
        self._lost_look_is_due = False
        self._lost: dict[Lane, int] = {}
        self._reactor = reactor
        self._leases = leases
        self._abandoned = left
        self._limits = limits
        self._sampler: ProcessSampler | None = None
        self._sampling = False
        self._sample_is_due = False
        self._ended = False

    def look_for_lost(self) -> None:
        """Begin to look for workers that nobody holds; it ends by itself when none is leased.

        May be called from any thread, before a worker is leased.
        """
        if not self._looking_for_lost:
            try:
                self._looking_for_lost = True
                self._reactor.call(self._begin_looking_for_lost)
            except BaseException:  # a signal's handler raised: the next job begins it
                self._looking_for_lost = False
                raise

    def look_after_jobs(self) -> None:
        """Begin to watch the jobs under way, where the limits ask for it; it ends by itself when there are none.

        May be called from any thread, once a worker is leased for a job.
        """
        if not self._looking_for_lost:
            self.look_for_lost()
        if self._limits.watched and not self._sampling:
            try:
                self._sampling = True
                self._reactor.call(self._begin_sampling)
            except BaseException:
                self._sampling = False
                raise

    def look_at_idle(self) -> None:
        """Kill the sandboxed workers that go on without a job, from now on."""
        if self._ended:
            return
        self._reactor.after(IDLE_INTERVAL, self.look_at_idle)
        for worker, since, words in self._make_sampler().look_at_idle(self._leases.idle()):
            if self._leases.evict(worker, since):
                logger.error("worker %s %s without a job, and is killed", worker.pid, words)

    def look_at_stopped(self, worker: Worker) -> None:
        """Kill a worker that was stopped while it is idle: no job's limit would find it until it is given one.

        One that has a job is that job's concern, and is looked at again; one that could get more is condemned.
        """
        if self._ended or worker.dead or not _is_stopped(worker.pid):
            return
        if self._leases.evict(worker, worker.idle_since):
            logger.error("worker %s was stopped without a job, and is killed", worker.pid)
        elif worker.concurrency > 1 and worker.in_service:
            logger.error("worker %s was stopped, and gets no more jobs", worker.pid)
            self._leases.expel(worker)
        else:
            self._reactor.after(IDLE_INTERVAL, lambda: self.look_at_stopped(worker))

    def _begin_looking_for_lost(self) -> None:
        if not self._lost_look_is_due:
            self._look_for_lost()

    def _look_for_lost(self) -> None:
        """Replace the workers whose lanes a signal's handler has left with nobody, and hand over what it held up."""
        self._looking_for_lost = self._lost_look_is_due = False
        if self._ended:
            return
        self._leases.serve_late(LOST_INTERVAL)
        lost = self._leases.lost(self._workers(), self._abandoned)
        for lane, turn in lost.items():
            if self._lost.get(lane) == turn and self._leases.reclaim(lane, turn):
                logger.error("worker %s was lost by a job that was interrupted, and is replaced", lane.worker.pid)
        self._lost = lost
        if lost or self._leases.busy:
            self._looking_for_lost = self._lost_look_is_due = True
            self._reactor.after(LOST_INTERVAL, self._look_for_lost)

    def end(self) -> None:
        """Look no more."""
        self._ended = True

    def _begin_sampling(self) -> None:
        if not self._sample_is_due:  # a caller that came in between two looks began it anew
            self._sample()

    def _sample(self) -> None:
        self._sample_is_due = False
        sampler = self._make_sampler()
        self._sampling = False
        leased = self._leases.leased()
        if not leased or self._ended:
            return  # the next job begins it anew
        self._sampling = True
        self._sample_is_due = True
        self._reactor.after(SAMPLE_INTERVAL, self._sample)
        for violation in sampler.look(self._jobs_of(leased)):
            if violation.kind == "timeout":
                violation.job.over_time(violation.detail)
            elif not violation.job.settled:
                violation.worker.limit_exceeded = violation.detail
                job_id, _, pid = words = violation.words()
                extra = {"job_id": job_id, "worker": pid}
                logger.error("job %s: %s: worker %s is killed", *words, extra=extra)
                self._leases.kill(violation.worker)

    def _make_sampler(self) -> ProcessSampler:
        if self._sampler is None:
            from .sampler import ProcessSampler  # psutil is loaded where limits are set

            self._sampler = ProcessSampler(self._limits)
        return self._sampler

    def _jobs_of(self, lanes: Iterable[Lane]) -> Iterator[tuple[Lane, WatchedJob]]:
        """The jobs that are to be held to the limits. A caller's is held fast before anything is found out about it."""
        for lane in lanes:
            if (left := self._abandoned.of(lane)) is not None:
                yield lane, left
            elif (reference := lane.job) is not None and (job := reference()) is not None:
                yield lane, job


def _is_stopped(pid: int | None) -> bool:
    """Whether a process that is not reaped yet is stopped (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
