"""A host's line to one agent: calls whose answers come by callback, kills until they are heard, and a heartbeat."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Protocol

import ray.exceptions

from ..events import Events
from . import ray_connection
from .messages import Heartbeat, decode, decode_event
from .placement import Node, Placement

logger = logging.getLogger("blastdoor")

RequestFinished = Callable[[object], object]
"""Called in a thread of Ray's with the bytes of an answer, or with the exception that came instead."""

SILENT: Final = 2.0
"""Seconds without an answer to a ping after which no new jobs go to an agent."""

GIVE_UP: Final = 4.0
"""Seconds after which its jobs are lost. Less than LEASE, after which it ends them: it never forgets its host first."""

KILL_AGAIN: Final = 1.0
"""Seconds after which a kill that was not acknowledged is sent again."""

_NO_HEARTBEAT: Final = Heartbeat(True, 0, 0, 0, 0, 0, 0, [], [], [], 0)


class AgentJob(Protocol):
    """A job at an agent, as its link knows it."""

    job_id: str

    def node_lost(self, why: str) -> None:
        """Its agent is gone, and it with it."""

    def close(self, cause: BaseException | None = None) -> None:
        """End it."""


class AgentClient:
    """One agent, as its host sees it. `notify` is called when there is news to tell."""

    def __init__(
        self, actor: Any, node: Node, host: ClusterContext, notify: Callable[[], object] = lambda: None
    ) -> None:
        self.actor = actor
        self.node = node
        self.lost = ""
        self.heartbeat = _NO_HEARTBEAT
        self.jobs: dict[str, weakref.ref[AgentJob]] = {}
        self.on_lost: Callable[[AgentClient], object] = lambda link: None
        self._host = host
        self._notify = notify
        self._heard = time.monotonic()
        self._seen = 0
        self._news: deque[Heartbeat] = deque()
        self._lock = threading.RLock()  # reentrant: a finalizer may close a job in the middle of anything
        self._kills: dict[str, tuple[float, Callable[[], object]]] = {}
        self._methods = {name: getattr(actor, name) for name in ("run", "more", "feed", "kill", "ping")}

    def call(self, method: str, *arguments: object, answered: RequestFinished) -> None:
        """Call the agent; it is never waited for here."""
        try:
            if not ray_connection.is_connected():
                raise ConnectionError("this process has left the Ray cluster")
            future: Future[object] = self._methods[method].remote(*arguments).future()
        except Exception as error:  # noqa: BLE001 - Ray has no one root for what it raises here
            answered(error)
            return
        future.add_done_callback(lambda done: answered(_outcome(done)))

    def take(self, job: AgentJob) -> bool:
        """A job is this agent's now; False where the agent is lost.

        A host that was stopped itself finds that here, before its next heartbeat would: a job that it sent now would be
        lost with the agent.
        """
        silence = time.monotonic() - self._heard
        if silence > GIVE_UP:
            self.lose(f"it has not answered for {silence:.1f} s")
        with self._lock:
            if self.lost:
                return False
            self.jobs[job.job_id] = weakref.ref(job)
            return True

    def drop(self, job: AgentJob) -> None:
        """A job is over."""
        self.jobs.pop(job.job_id, None)

    def failed(self, error: BaseException) -> None:
        """A call has failed: where the agent is dead, or out of reach for good, all of its jobs are lost."""
        if isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.NodeDiedError)):
            self.lose("its agent, or the node, has ended")
        elif isinstance(error, ConnectionError):
            self.lose(str(error))

    def lose(self, why: str) -> None:
        """The agent is gone, or can't be reached: its jobs end with a 502, and nothing is sent there any more."""
        with self._lock:
            if self.lost:
                return
            self.lost = why
            jobs, self.jobs = list(self.jobs.values()), {}
            kills, self._kills = list(self._kills.values()), {}
        self._host.placement.remove(self.node)
        logger.error("node %s is lost: %s; %d jobs ran there", self.node.address, why, len(jobs))
        for reference in jobs:
            if (job := reference()) is not None:
                job.node_lost(why)
        for _, done in kills:
            done()
        self.on_lost(self)

    def _retire(self, why: str) -> None:
        """The agent answers, but knows nothing of this host any more: what is under way there it will answer itself."""
        with self._lock:
            jobs, self.jobs = self.jobs, {}
        self.lose(why)
        self.jobs.update(jobs)

    # -- kills -------------------------------------------------------------------------------------

    def kill(self, job_id: str, done: Callable[[], object]) -> None:
        """End a job at its agent, whether its order has come there or not; `done` is called once that is sure."""
        with self._lock:
            lost = self.lost
            if not lost:
                self._kills[job_id] = (time.monotonic(), done)
        if lost:
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

    # -- heartbeat -------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Ping the agent, send again what it has not heard, and give it up where it has been silent for too long."""
        if self.lost:
            return
        now = time.monotonic()
        silence = now - self._heard
        if silence > GIVE_UP:
            self.lose(f"it has not answered for {silence:.1f} s")
            return
        if (silence > SILENT) is not self.node.silent:
            self._host.placement.update(self.node, silent=silence > SILENT)
        level = logger.getEffectiveLevel()
        self.call("ping", self._host.name, self._seen, level, answered=lambda result: self.pulsed(now, result))
        with self._lock:
            again = [job_id for job_id, (sent, _) in self._kills.items() if now - sent > KILL_AGAIN]
        for job_id in again:
            self._send_kill(job_id)

    def pulsed(self, sent: float, result: object) -> None:
        """The answer to a ping that was sent at this moment. It may come in a thread of Ray's: nothing is told here."""
        if isinstance(result, BaseException):
            self.failed(result)
            return
        try:
            heartbeat = decode(result, Heartbeat)
        except ValueError as error:
            logger.error("node %s: a heartbeat can't be read: %s", self.node.address, error)
            return
        if not heartbeat.known:
            self._retire("it had taken this host for gone")
            return
        with self._lock:
            if sent < self._heard and self.heartbeat is not _NO_HEARTBEAT:
                return  # overtaken by a later one
            self._heard = sent
            self.heartbeat = heartbeat
            if heartbeat.seen > self._seen:
                self._seen = heartbeat.seen
                self._news.append(heartbeat)
        self._host.placement.update(self.node, silent=False, others=max(0, heartbeat.running - self.node.running))
        if self._news:
            self._notify()

    def tell_news(self) -> None:
        """Log what the agent has logged, and tell of what has happened to its workers."""
        while self._news:
            heartbeat = self._news.popleft()
            for record in heartbeat.records:
                extra = {**record.extra, "node": self.node.address}
                logger.log(record.level, "node %s: %s", self.node.address, record.message, extra=extra)
            for data in heartbeat.events:
                self._host.events.emit(decode_event(data))


def _outcome(future: Future[object]) -> object:
    if future.cancelled():
        return RuntimeError("the call was cancelled")
    error = future.exception()
    return future.result() if error is None else error


class ClusterContext:
    """What the jobs of one ClusterPool share."""

    def __init__(self, name: str, placement: Placement, events: Events, links: dict[str, AgentClient]) -> None:
        self.name = name
        self.placement = placement
        self.events = events
        self.links = links
        self.closing = False
        self.in_forked_child = False
