"""The agent: an actor on each node that owns an ordinary local pool, and runs there what hosts send it.

Its methods run in threads, in groups, so that none waits behind another kind: `run` and `more` bring a response,
`feed` takes a request's body, `ctl` is for what must always be answered, `life` for what takes long. Each gives bytes
and raises nothing.

Hosts ping their agents. A host that has not been heard of for LEASE seconds is taken for gone, or cut off, and its
jobs are ended: nobody is left who would. An agent without hosts ends.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import msgspec
import ray

from ..errors import BlastdoorError, JobClosed
from ..jobs.job import Job
from ..model.cancel_scope import CancelScope
from ..model.request import Request, Upload
from ..pool import Pool
from ..pool_options import Environment
from ..wire.messages import JobContext, RequestHead
from .agent_outbox import AgentOutbox
from .messages import (
    Heartbeat,
    JobEnd,
    JoinReply,
    ResponseChunk,
    StartJob,
    encode,
    ending_of,
)
from .upload import FedUpload

logger = logging.getLogger("blastdoor")

LEASE: Final = 5.0
"""Seconds without a ping after which a host's jobs are ended."""

ORPHANED: Final = 5.0
"""Seconds without any host after which an agent ends."""

SOON: Final = 0.002
"""Seconds that a response's head waits for the first of its body."""

_END_SOON: Final = 0.0002
"""Seconds that the first of a body waits for the rest: a response that is whole by then costs one call."""

_SMALL: Final = 16 * 1024
"""Bytes of a body from which on its first piece waits for nothing more."""

_TOMBSTONES: Final = 60.0
"""Seconds for which a job that was killed, or is over, is remembered: its order, or a part of its body, may be late."""

_ORDER_PATIENCE: Final = 1.0
"""Seconds that a piece of a body waits for its job's order."""

_LOOK: Final = 0.5

_decode_order = msgspec.msgpack.Decoder(StartJob).decode
_decode_head = msgspec.msgpack.Decoder(RequestHead).decode
_OK: Final = JobEnd("ok")


P = ParamSpec("P")


def _answers(group: str) -> Callable[[Callable[P, bytes]], Callable[P, bytes]]:
    """For a method that hosts call, in a group of threads. An exception that leaves an actor is unpickled in its host:
    none does. It is logged, and b"" says that there was one."""

    def decorate(method: Callable[P, bytes]) -> Callable[P, bytes]:
        @functools.wraps(method)
        def guarded(*arguments: P.args, **named: P.kwargs) -> bytes:
            try:
                return method(*arguments, **named)
            except BaseException:
                logger.exception("the agent failed at %s", method.__name__)
                return b""

        mark: Any = ray.method(concurrency_group=group)
        mark(method)  # Ray looks for its mark at the innermost
        return guarded

    return decorate


class _Running:
    """A job of this agent."""

    __slots__ = ("host", "job", "scope", "upload")

    def __init__(self, host: str, upload: FedUpload | None) -> None:
        self.host = host
        self.scope = CancelScope()
        self.upload = upload
        self.job: Job | None = None


class Agent:
    """One node's part of a ClusterPool. `payload` is a pickle of the pool: hosts are trusted by their agents.

    `cores` is how many workers there are, where that is the node's concern.
    """

    def __init__(self, payload: bytes, cores: int | None = None) -> None:
        self._payload = payload
        self._cores = cores
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._hosts: dict[str, float] = {}
        self._jobs: dict[str, _Running] = {}
        self._over: OrderedDict[str, float] = OrderedDict()
        self._pool: Pool | None = None
        self._starting = threading.Lock()
        self._ending = False
        self._orphaned_since = time.monotonic()
        self._news = AgentOutbox()
        threading.Thread(target=self._watch_hosts, name="blastdoor-lease", daemon=True).start()

    # -- hosts -------------------------------------------------------------------------------------

    @_answers("life")
    def join(self, host: str) -> bytes:
        """A host is there. Starts the pool, if that has not been done; a JoinReply."""
        with self._lock:
            if self._ending:
                return encode(JoinReply(ending=True))
            self._hosts[host] = time.monotonic() + 3600  # until it is told that it has joined
        self._end_jobs_of(host, "their host had given this agent up")  # and comes anew: it waits for none of them
        try:
            with self._starting:
                if self._pool is None:
                    pool = self._make_pool()
                    pool.subscribe(self._news.note_event)
                    pool.start()
                    self._pool = pool
            answer = JoinReply(self._pool._options.size.most_jobs, self._news.since(0)[2])
        except BaseException as error:  # noqa: BLE001 - nothing may leave an actor but bytes
            words = str(error) if isinstance(error, BlastdoorError) else f"{type(error).__name__}: {error}"
            answer = JoinReply(error=words or type(error).__name__)
        with self._lock:
            self._hosts[host] = time.monotonic()
        return encode(answer)

    @_answers("ctl")
    def ping(self, host: str, seen: int, level: int) -> bytes:
        """A host lives, and has news up to number `seen`, and wants records from `level` on; a Heartbeat."""
        with self._lock:
            known = host in self._hosts
            if known:
                self._hosts[host] = max(self._hosts[host], time.monotonic())
        if level < logger.getEffectiveLevel():
            logger.setLevel(level)
        records, events, latest = self._news.since(seen)
        pool = self._pool
        if pool is None:
            return encode(Heartbeat(known, 0, 0, 0, 0, 0, 0, [], records, events, latest))
        stats, workers = pool.stats(), pool.workers()
        numbers = stats.starting, stats.idle, stats.busy, stats.waiting, stats.deaths, stats.running
        return encode(Heartbeat(known, *numbers, workers, records, events, latest))

    @_answers("life")
    def leave(self, host: str) -> bytes:
        """A host goes. b"last" where it was the only one: its pool is closed then, and the actor may be killed."""
        with self._lock:
            self._hosts.pop(host, None)
            self._ending = self._ending or not self._hosts
            last = self._ending
        self._end_jobs_of(host, "its host has closed the pool")
        if last:
            self._close_pool()
        return b"last" if last else b""

    @_answers("ctl")
    def kill(self, job_id: str) -> bytes:
        """The caller of a job has left: it ends, or never begins."""
        self._end_job(job_id, "its caller has left")
        return b""

    # -- jobs --------------------------------------------------------------------------------------

    @_answers("run")
    def run(self, data: bytes) -> bytes:
        """Begin a job; a ResponseChunk, with all of the response where it is whole SOON."""
        job_id = ""
        try:
            order = _decode_order(data)
            job_id = order.job_id
            begun = self._begin(order)
            if isinstance(begun, JobEnd):
                return encode(ResponseChunk(None, None, [], begun))
            running, pool = begun, self._pool
            assert pool is not None
            request, context = _request_of(_decode_head(order.head), order.body)
            with running.scope:
                upload = running.upload or Upload(request.body)
                timeouts = (order.patience, order.read_timeout, order.write_timeout)
                job = running.job = pool._open(request, upload, context, job_id, *timeouts)
        except BaseException as error:  # noqa: BLE001 - nothing may leave an actor but bytes
            self._forget(job_id)
            return encode(ResponseChunk(None, None, [], ending_of(error)))
        return self._deliver(job, with_head=True)

    @_answers("more")
    def more(self, job_id: str) -> bytes:
        """What comes next of a job's response; a ResponseChunk. It waits until there is something."""
        with self._lock:
            running = self._jobs.get(job_id)
        if running is None or running.job is None:
            return encode(ResponseChunk(None, None, [], JobEnd("closed", "it had ended before")))
        return self._deliver(running.job)

    @_answers("feed")
    def feed(self, job_id: str, piece: bytes) -> bytes:
        """The next piece of a job's request body, b"" for its end; b"more" when it was taken, b"stop" when none is.

        b"again" says that the job's order has not come yet.
        """
        running = self._await_order(job_id)
        if running is None:
            return b"again" if job_id not in self._over else b"stop"
        if running.upload is None:
            return b"stop"
        return b"more" if running.upload.feed(piece) else b"stop"

    def _deliver(self, job: Job, *, with_head: bool = False) -> bytes:
        pieces: list[bytes] = []
        end: JobEnd | None = None
        try:
            if with_head and not job.settled:
                job.read_ready(pieces, SOON)
                if not job.settled and sum(map(len, pieces)) < _SMALL:
                    time.sleep(_END_SOON)
                    job.read_ready(pieces, 0)
            else:
                job.read_ready(pieces)
            if job.settled:
                job.read()  # raises how it ended, where that was not well
                end = _OK
        except BaseException as error:  # noqa: BLE001 - nothing may leave an actor but bytes
            end = ending_of(error)
            job.close()
        if end is not None:
            self._forget(job.job_id)
        return encode(ResponseChunk(job.worker_pid, job.head if with_head else None, pieces, end))

    def _begin(self, order: StartJob) -> _Running | JobEnd:
        """Note a job; how it has ended where it was killed before it came, or nobody here may begin it."""
        with self._lock:
            if order.job_id in self._over:
                return JobEnd("closed", "its caller has left")
            if order.host not in self._hosts or self._ending or self._pool is None:
                return JobEnd("busy", "its agent had taken its host for gone")
            running = _Running(order.host, FedUpload() if order.uploads else None)
            self._jobs[order.job_id] = running
            self._arrived.notify_all()
        return running

    def _await_order(self, job_id: str) -> _Running | None:
        """A job, whose order may be on its way still; None where it is over."""
        with self._lock:
            self._arrived.wait_for(lambda: job_id in self._jobs or job_id in self._over, _ORDER_PATIENCE)
            return self._jobs.get(job_id)

    def _forget(self, job_id: str) -> None:
        """A job is over."""
        with self._lock:
            running = self._jobs.pop(job_id, None)
            if running is not None and running.upload is not None:
                self._mark_over(job_id)
        if running is not None and running.upload is not None:
            running.upload.close()

    def _end_job(self, job_id: str, why: str) -> None:
        with self._lock:
            running = self._jobs.pop(job_id, None)
            self._mark_over(job_id)
        if running is not None:
            running.scope.cancel(JobClosed(why))
            if running.upload is not None:
                running.upload.close()

    def _mark_over(self, job_id: str) -> None:
        now = time.monotonic()
        self._over[job_id] = now
        self._arrived.notify_all()
        while self._over:
            oldest = next(iter(self._over))
            if now - self._over[oldest] < _TOMBSTONES:
                break
            del self._over[oldest]

    # -- life --------------------------------------------------------------------------------------

    def _make_pool(self) -> Pool:
        """The pool of this node: with none of Ray's environment for its workers, and by its own number of cores."""
        pool, path = pickle.loads(self._payload)
        sys.path += [place for place in path if place not in sys.path]
        options = pool._options
        if options.environment.env is None and pool._config.sandbox is None:
            env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            environment = Environment(env=env, set_env=options.environment.set_env)
            options = msgspec.structs.replace(options, environment=environment)
        if self._cores is not None:
            size = msgspec.structs.replace(options.size, least=self._cores, most=self._cores)
            options = msgspec.structs.replace(options, size=size)
        pool._options = options
        pool._set_up()
        assert isinstance(pool, Pool)
        return pool

    def _watch_hosts(self) -> None:
        while True:
            time.sleep(_LOOK)
            try:
                self._look_at_hosts()
            except Exception:
                logger.exception("the agent can't look after its hosts' leases")

    def _look_at_hosts(self) -> None:
        now = time.monotonic()
        with self._lock:
            silent = [host for host, heard in self._hosts.items() if now - heard > LEASE]
            for host in silent:
                del self._hosts[host]
            if self._hosts:
                self._orphaned_since = now
            alone = now - self._orphaned_since > ORPHANED
            self._ending = self._ending or alone
        for host in silent:
            self._end_jobs_of(host, f"its host was not heard of for {LEASE:g} s")
        if alone:
            try:
                self._close_pool()
            finally:
                os._exit(0)

    def _end_jobs_of(self, host: str, why: str) -> None:
        with self._lock:
            ended = [job_id for job_id, running in self._jobs.items() if running.host == host]
        if ended:
            logger.warning("%d jobs are ended: %s", len(ended), why)
        for job_id in ended:
            self._end_job(job_id, why)

    def _close_pool(self) -> None:
        with self._starting:
            if self._pool is not None:
                self._pool.close(drain=0)


def _request_of(head: RequestHead, body: bytes) -> tuple[Request, JobContext]:
    request = Request(head.method, head.target, head.headers, body or None, head.scheme, head.server, head.client)
    return request, head.context
