"""Workers whose callers have left in the middle of a job: what becomes of them.

Each is read, and its last frame of upload completed, until its response ends; its handler is told meanwhile.
Within the grace time it goes back to work, after it it is killed. All of this runs in the supervisor's thread.
"""

from __future__ import annotations

import logging
import selectors
from typing import Final

from runner.exchange import ResponseExchange
from runner.leases import Leases
from runner.reactor import Reactor
from runner.worker_record import Worker

logger = logging.getLogger("blastdoor")

STACKS_LIMIT: Final = 0.05
"""Seconds that a worker has to print its stacks where there is no grace time."""


class LeftJobs:
    """The workers that were left, by their `LeftJob`."""

    def __init__(self, reactor: Reactor, leases: Leases, grace: float) -> None:
        self._reactor = reactor
        self._leases = leases
        self._grace = grace
        self._jobs: dict[Worker, LeftJob] = {}

    def __contains__(self, worker: Worker) -> bool:
        return worker in self._jobs

    def take(self, worker: Worker, exchange: ResponseExchange, timed_out: str) -> None:
        """Take over a worker; `timed_out` says in words what time limit its job was over, if it was."""
        job = self._jobs[worker] = LeftJob(worker, exchange, timed_out, self)
        grace = self._grace or (STACKS_LIMIT if timed_out else 0)
        if worker.dead or not grace:
            self.settle(job)
            return
        channel = worker.channel
        self._reactor.watch(channel.response_fd, job.look)
        if not channel.flushed:
            self._reactor.watch(channel.request_fd, job.look, selectors.EVENT_WRITE)
        job.look()
        if self._jobs.get(worker) is not job:
            return  # its end was there already
        if exchange.open:
            if timed_out:
                self._leases.dump_stacks(worker)
            self._leases.cancel(worker, exchange.job)
        self._reactor.after(grace, lambda: self._give_up(job))

    def flushed(self, worker: Worker) -> None:
        """All that was sent to the worker is in its pipe."""
        self._reactor.unwatch(worker.channel.request_fd)

    def worker_ended(self, worker: Worker) -> None:
        """The worker is dead."""
        if (job := self._jobs.get(worker)) is not None:
            self.settle(job)

    def settle(self, job: LeftJob, *, healthy: bool = False) -> None:
        """The worker goes back to work, or it is discarded."""
        worker = job.worker
        if self._jobs.get(worker) is not job:
            return  # settled before; a timer may come late, when the worker was left once more
        del self._jobs[worker]
        self._reactor.unwatch(worker.channel.response_fd)
        self._reactor.unwatch(worker.channel.request_fd)
        worker.log.read()  # so that the next job's lines are not taken for this one's
        if job.timed_out:
            job_id = worker.log.job_id
            logger.error("job %s: %s; what it printed last:\n%s", job_id, job.timed_out, worker.log.tail(job_id))
        if healthy:
            self._leases.give_back(worker)
        else:
            self._leases.discard(worker)

    def _give_up(self, job: LeftJob) -> None:
        if self._jobs.get(job.worker) is job:
            logger.warning(
                "job %s: its caller has left, and its handler did not end within %s s: worker %s is killed",
                job.worker.log.job_id,
                self._grace,
                job.worker.pid,
            )
            self.settle(job)


class LeftJob:
    """A worker, and the response that nobody waits for."""

    __slots__ = ("_exchange", "_jobs", "timed_out", "worker")

    def __init__(self, worker: Worker, exchange: ResponseExchange, timed_out: str, jobs: LeftJobs) -> None:
        self.worker = worker
        self.timed_out = timed_out
        self._exchange = exchange
        self._jobs = jobs

    def look(self) -> None:
        """Read and write what can be, and settle where that brings the end."""
        channel, exchange = self.worker.channel, self._exchange
        try:
            channel.flush()
        except BrokenPipeError:
            channel.drop_outgoing()
        frames = channel.receive() if exchange.open else []
        if frames is None:
            self._jobs.settle(self)
            return
        exchange.receive(frames)
        exchange.body.clear()
        if exchange.violation:
            self._jobs.settle(self)
        elif channel.flushed:
            self._jobs.flushed(self.worker)
            if not exchange.open:
                self._jobs.settle(self, healthy=channel.clean)
