"""Lanes whose callers have left them, and what becomes of them; all of it in the supervisor's thread.

Either the caller left in the middle of a job. Then the lane is read, and its last frame of upload completed, until
its response ends; its handler is told meanwhile. Within the grace time it goes back to work, after it its worker is
killed, or condemned where that has other jobs. Or the response is whole and the handler has background work to do. Then
the lane goes back to work when that has ended, and its worker goes when the job is over the pool's time limit.
"""

from __future__ import annotations

import logging
import math
import selectors
import time
from collections.abc import Callable
from typing import Final

import msgspec

from ..control.zygote_messages import describe_exit
from ..model.limits import over_wall_time
from ..wire.exchange import ResponseExchange
from ..wire.messages import FaultReport
from ..wire.printable import quoted
from .leases import Leases
from .reactor import Reactor
from .record import Lane, Worker

logger = logging.getLogger("blastdoor")

HEARING_LIMIT: Final = 1.0
"""Seconds that a worker of several jobs has to take a cancel, before the grace time: others may hold it up."""

STACKS_LIMIT: Final = 0.05
"""Seconds that a worker has to print its stacks where there is no grace time."""


class Remainder(msgspec.Struct, frozen=True):
    """What is left of a job: the frames still to come, and the time limit in words that it was over, if it was.

    `expires` is when it is over the pool's time limit, on the clock of `time.monotonic`.
    """

    exchange: ResponseExchange
    timed_out: str
    expires: float | None


class AbandonedJobs:
    """The lanes that were left, by their `AbandonedJob`. `await_line` is called where a worker's line has no room."""

    def __init__(
        self,
        reactor: Reactor,
        leases: Leases,
        grace: float,
        wall_seconds: float | None,
        background_seconds: float | None,
        await_line: Callable[[Worker], object],
    ) -> None:
        self._background_seconds = background_seconds
        self._await_line = await_line
        self._reactor = reactor
        self._leases = leases
        self._grace = grace
        self._wall_seconds = wall_seconds
        self._jobs: dict[Lane, AbandonedJob] = {}

    def __contains__(self, lane: object) -> bool:
        return lane in self._jobs

    def holds(self, job: AbandonedJob) -> bool:
        """Whether this is the job of its lane still."""
        return self._jobs.get(job.lane) is job

    def of(self, lane: Lane) -> AbandonedJob | None:
        """The job that this lane was left with."""
        return self._jobs.get(lane)

    def take(self, lane: Lane, remainder: Remainder) -> None:
        """Take over a lane."""
        job = self._jobs[lane] = AbandonedJob(lane, remainder, self)
        worker = lane.worker
        exchange = remainder.exchange
        background = exchange.background
        grace = self._grace or (STACKS_LIMIT if remainder.timed_out else 0)
        if worker.dead:
            self._end_with_worker(job)
            return
        if not grace and not background:
            self.settle(job)
            return
        # First of all the end of it: whatever happens to what follows, the lane is not held for ever.
        self._await_expiry(job)
        if not background:
            hear_until = time.monotonic() + (HEARING_LIMIT if worker.concurrency > 1 else 0)
            self._reactor.after(grace, lambda: self._give_up(job, grace, hear_until, late=False))
        channel = lane.channel
        self._reactor.watch(channel.response_fd, job.look)
        if not channel.flushed:
            self._reactor.watch(channel.request_fd, job.look, selectors.EVENT_WRITE)
        job.look()
        if not self.holds(job) or not exchange.open:
            return  # its end was there already
        if remainder.timed_out:
            self._leases.dump_stacks(worker)
        if not self._leases.cancel(lane, exchange.job):
            words = "job %s: worker %s does not take its cancel: it%s"
            logger.warning(words, job.job_id, worker.pid, job.verdict, extra=job.extra)
            self.settle(job)
        elif not worker.line.flushed:
            self._await_line(worker)

    def flushed(self, lane: Lane) -> None:
        """All that was sent to the worker is in its pipe."""
        self._reactor.unwatch(lane.channel.request_fd)

    def worker_ended(self, worker: Worker) -> None:
        """The worker is dead."""
        for lane in worker.lanes:
            if (job := self._jobs.get(lane)) is not None:
                self._end_with_worker(job)

    def _end_with_worker(self, job: AbandonedJob) -> None:
        if job.exchange.background:
            worker = job.lane.worker
            words = worker.limit_exceeded or f"its worker {worker.pid} {describe_exit(worker.status)[0]}"
            told = job.job_id, words, job.last_words
            logger.error("job %s: %s during its background work%s", *told, extra=job.extra)
        self.settle(job)

    def settle(self, job: AbandonedJob, *, healthy: bool = False) -> None:
        """The lane goes back to work, or it is discarded."""
        lane = job.lane
        if not self.holds(job):
            return  # settled before; a timer may come late, when the lane was left once more
        del self._jobs[lane]
        try:
            self._reactor.unwatch(lane.channel.response_fd)
            self._reactor.unwatch(lane.channel.request_fd)
            lane.worker.log.read()  # so that the next job's lines are not taken for this one's
            if job.timed_out:
                logger.error("job %s: %s%s", job.job_id, job.timed_out, job.last_words, extra=job.extra)
            report = job.exchange.report
            if report is not None and job.exchange.whole:
                log_background_failure(lane.worker, job.job_id, report)
        except BaseException:
            healthy = False
            raise
        finally:
            if healthy:
                self._leases.give_back(lane)
            else:
                self._leases.discard(lane)

    def drop(self, lane: Lane) -> None:
        """Something has failed that should not: the lane goes, whatever it was at."""
        if (job := self._jobs.get(lane)) is not None:
            self.settle(job)
        else:
            self._leases.discard(lane)

    def stream_ended(self, job: AbandonedJob) -> None:
        """The worker has closed its pipe, or died."""
        if job.exchange.background:
            self._reactor.unwatch(job.lane.channel.response_fd)
            self._leases.kill(job.lane.worker)  # `worker_ended` tells of it
        else:
            self.settle(job)

    def _await_expiry(self, job: AbandonedJob) -> None:
        if job.expires is not None and not job.timed_out:
            assert self._wall_seconds is not None
            words = over_wall_time(self._wall_seconds)
            self._reactor.after(max(job.expires - time.monotonic(), 0), lambda: self.over_time(job, words))
        if self._background_seconds is not None:
            limit = self._background_seconds
            # From when it was left: its response may end within the grace time, and its background work begin.
            self._reactor.after(
                limit, lambda: self.over_time(job, f"the job went on for {limit:g} s after its response")
            )

    def _give_up(self, job: AbandonedJob, grace: float, hear_until: float, *, late: bool) -> None:
        if not self.holds(job) or job.exchange.background:  # its response did come to its end
            return
        unheard = time.monotonic() < hear_until and not job.lane.worker.line.heard
        if unheard or late:  # its grace time begins once the worker has taken the cancel
            self._reactor.after(grace, lambda: self._give_up(job, grace, hear_until, late=unheard))
            return
        logger.warning(
            "job %s: %s, and its handler did not end within %s s: worker %s%s",
            job.job_id,
            job.timed_out or "its caller has left",
            self._grace,
            job.lane.worker.pid,
            job.verdict,
            extra=job.extra,
        )
        self.settle(job)

    def over_time(self, job: AbandonedJob, words: str) -> None:
        """It is over a time limit: it has a moment to say where it stands."""
        if self.holds(job) and not job.timed_out:
            job.timed_out = f"in its background work {words}" if job.exchange.background else words
            self._leases.dump_stacks(job.lane.worker)
            self._reactor.after(STACKS_LIMIT, lambda: self.settle(job))


class AbandonedJob:
    """A lane, and the frames that nobody waits for."""

    __slots__ = ("_jobs", "exchange", "expires", "job_id", "lane", "timed_out")

    began = math.inf  # its wall time is not for the inspection to look at: timers run

    def __init__(self, lane: Lane, remainder: Remainder, jobs: AbandonedJobs) -> None:
        self.lane = lane
        self.timed_out = remainder.timed_out
        self.exchange = remainder.exchange
        self.expires = remainder.expires
        self.job_id = lane.job_id
        self._jobs = jobs

    @property
    def settled(self) -> bool:
        """Whether its lane is held no more."""
        return not self._jobs.holds(self)

    @property
    def extra(self) -> dict[str, object]:
        """What a log record about it carries, for structured logs."""
        return {"job_id": self.job_id, "worker": self.lane.worker.pid}

    @property
    def verdict(self) -> str:
        """What becomes of its worker, to be told."""
        if self.lane.worker.running <= 1:
            return " is killed"
        return " gets no more jobs, and is killed once those that it has are over"

    @property
    def last_words(self) -> str:
        """The last lines that it has printed, to be told."""
        tail = self.lane.worker.log.tail(self.job_id)
        return f"; what it printed last:\n{quoted(tail)}" if tail else ""

    def over_time(self, detail: str) -> None:
        """End it: it is over a time limit of the pool, with these words."""
        self._jobs.over_time(self, detail)

    def look(self) -> None:
        """Read and write what can be, and settle where that brings the end."""
        channel, exchange = self.lane.channel, self.exchange
        try:
            channel.flush()
        except BrokenPipeError:
            channel.drop_unsent()
        frames = channel.receive() if exchange.unfinished else []
        if frames is None:
            self._jobs.stream_ended(self)
            return
        exchange.receive(frames)
        exchange.body.clear()
        if exchange.violation:
            self._jobs.settle(self)
        elif channel.flushed:
            self._jobs.flushed(self.lane)
            if not exchange.unfinished:
                self._jobs.settle(self, healthy=channel.clean)


def log_background_failure(worker: Worker, job_id: str, report: FaultReport) -> None:
    """Tell of what a handler raised after the end of its response: nobody else hears of it."""
    if report.kind not in ("raised", "memory"):
        return  # it has cut its own end off
    text = quoted(report.traceback)
    if worker.log.charge(len(text.encode())):
        extra = {"job_id": job_id, "worker": worker.pid}
        logger.error("job %s: the handler raised after its response\n%s", job_id, text, extra=extra)
