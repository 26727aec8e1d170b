"""A host's line to one agent: calls whose answers come by callback, kills until they are heard, and a pulse."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import ray.exceptions

from runner.cluster.agent import LEASE
from runner.cluster.messages import Pulse, decode, decode_event
from runner.cluster.placement import Node, Placement
from runner.events import Events

if TYPE_CHECKING:
    from runner.cluster.round_trip import ClusterRoundTrip

logger = logging.getLogger("blastdoor")

Answered = Callable[[object], object]
"""Called in a thread of Ray's with the bytes of an answer, or with the exception that came instead."""

SILENT: Final = 2.0
"""Seconds without an answer to a ping after which no new jobs go to an agent."""

KILL_AGAIN: Final = 1.0
"""Seconds after which a kill that was not acknowledged is sent again."""

_NO_PULSE: Final = Pulse(0, 0, 0, 0, 0, [], [], [], 0)


class Link:
    """One agent, as its host sees it."""

    def __init__(self, actor: Any, host: str, node: Node, placement: Placement, events: Events) -> None:
        self.actor = actor
        self.node = node
        self.lost = ""
        self.pulse = _NO_PULSE
        self.jobs: dict[str, weakref.ref[ClusterRoundTrip]] = {}
        self.on_lost: Callable[[Link], object] = lambda link: None
        self._host = host
        self._placement = placement
        self._events = events
        self._heard = time.monotonic()
        self._seen = 0
        self._lock = threading.Lock()
        self._kills: dict[str, tuple[float, Callable[[], object]]] = {}
        self._methods = {name: getattr(actor, name) for name in ("run", "more", "feed", "kill", "ping")}

    def call(self, method: str, *arguments: object, answered: Answered) -> None:
        """Call the agent; it is never waited for here."""
        try:
            future: Future[object] = self._methods[method].remote(*arguments).future()
        except Exception as error:  # noqa: BLE001 - Ray has no one root for what it raises here
            answered(error)
            return
        future.add_done_callback(lambda done: answered(_outcome(done)))

    def take(self, job: ClusterRoundTrip) -> bool:
        """A job is this agent's now; False where the agent is lost."""
        with self._lock:
            if self.lost:
                return False
            self.jobs[job.job_id] = weakref.ref(job)
            return True

    def drop(self, job: ClusterRoundTrip) -> None:
        """A job is over."""
        self.jobs.pop(job.job_id, None)

    def failed(self, error: BaseException) -> None:
        """A call has failed: where the agent is dead, all of its jobs are lost."""
        if isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.NodeDiedError)):
            self.lose(
                "its agent has ended" if "node" not in str(error).lower() else "its node, or its agent, has ended"
            )

    def lose(self, why: str) -> None:
        """The agent is gone, or can't be reached: its jobs end with a 502, and nothing is sent there any more."""
        with self._lock:
            if self.lost:
                return
            self.lost = why
            jobs, self.jobs = list(self.jobs.values()), {}
            kills, self._kills = list(self._kills.values()), {}
        self._placement.remove(self.node)
        logger.error("node %s is lost: %s; %d jobs ran there", self.node.address, why, len(jobs))
        for reference in jobs:
            if (job := reference()) is not None:
                job.node_lost(why)
        for _, done in kills:
            done()
        self.on_lost(self)

    # -- kills -------------------------------------------------------------------------------------

    def kill(self, job_id: str, done: Callable[[], object]) -> None:
        """End a job at its agent, whether its order has come there or not; `done` is called once that is sure."""
        with self._lock:
            if not self.lost:
                self._kills[job_id] = (time.monotonic(), done)
        if self.lost:
            done()
        else:
            self._send_kill(job_id)

    def _send_kill(self, job_id: str) -> None:
        self.call("kill", job_id, answered=lambda result: self._killed(job_id, result))

    def _killed(self, job_id: str, result: object) -> None:
        if isinstance(result, BaseException):
            self.failed(result)
            return  # `beat` sends it again
        with self._lock:
            _, done = self._kills.pop(job_id, (0.0, lambda: None))
        done()

    # -- pulse -------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Ping the agent, send again what it has not heard, and give it up where it has been silent for its lease."""
        if self.lost:
            return
        now = time.monotonic()
        silence = now - self._heard
        if silence > LEASE:
            self.lose(f"it has not answered for {silence:.1f} s")
            return
        if (silence > SILENT) is not self.node.silent:
            self._placement.update(self.node, silent=silence > SILENT)
        self.call("ping", self._host, self._seen, logger.getEffectiveLevel(), answered=self.pulsed)
        with self._lock:
            again = [job_id for job_id, (sent, _) in self._kills.items() if now - sent > KILL_AGAIN]
        for job_id in again:
            self._send_kill(job_id)

    def pulsed(self, result: object) -> None:
        """The answer to a ping."""
        if isinstance(result, BaseException):
            self.failed(result)
            return
        try:
            pulse = decode(result, Pulse)
        except ValueError as error:
            logger.error("node %s: a pulse can't be read: %s", self.node.address, error)
            return
        self._heard = time.monotonic()
        with self._lock:
            news = pulse.seen > self._seen  # else it was overtaken by a later one
            self._seen = max(self._seen, pulse.seen)
            self.pulse = pulse
        self._placement.update(self.node, silent=False, others=max(0, pulse.busy - self.node.running))
        for record in pulse.records if news else ():
            logger.log(
                record.level,
                "node %s: %s",
                self.node.address,
                record.message,
                extra={**record.extra, "node": self.node.address},
            )
        for data in pulse.events if news else ():
            self._events.emit(decode_event(data))


def _outcome(future: Future[object]) -> object:
    if future.cancelled():
        return RuntimeError("the call was cancelled")
    error = future.exception()
    return future.result() if error is None else error
