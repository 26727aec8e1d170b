"""The agent: an actor on each node that owns an ordinary local pool, and runs there what hosts send it.

Hosts find it, join it and leave it by Ray; its methods give bytes and raise nothing. Jobs, and all that both tell each
other meanwhile, go over connections of their own: see `agent_server`.

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
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import msgspec
import ray

from ..errors import BlastdoorError
from ..pool import Pool
from ..pool_options import Environment
from .agent_outbox import AgentOutbox
from .agent_server import AgentServer
from .handshake import make_secret
from .messages import Heartbeat, JoinReply, encode
from .tls import ClusterTLS

logger = logging.getLogger("blastdoor")

LEASE: Final = 5.0
"""Seconds without a ping after which a host's jobs are ended."""

ORPHANED: Final = 5.0
"""Seconds without any host after which an agent ends."""

_LOOK: Final = 0.5

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


class Agent:
    """One node's part of a ClusterPool. `payload` is a pickle of the pool: hosts are trusted by their agents.

    `cores` is how many workers there are, where that is the node's concern.
    """

    def __init__(self, payload: bytes, cores: int | None = None, tls: ClusterTLS | None = None) -> None:
        self._payload = payload
        self._tls = tls
        self._cores = cores
        self._lock = threading.Lock()
        self._hosts: dict[str, float] = {}
        self._server: AgentServer | None = None
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
                if self._server is None:
                    server = AgentServer(self, make_secret())
                    self._address = ray.util.get_node_ip_address()
                    server.start(self._address, None if self._tls is None else self._tls.for_agents())
                    self._server = server
            capacity, seen = self._pool._options.size.most_jobs, self._news.since(0)[2]
            server = self._server
            answer = JoinReply(capacity, seen, address=self._address, port=server.port, secret=server.secret)
        except BaseException as error:  # noqa: BLE001 - nothing may leave an actor but bytes
            words = str(error) if isinstance(error, BlastdoorError) else f"{type(error).__name__}: {error}"
            answer = JoinReply(error=words or type(error).__name__)
        with self._lock:
            self._hosts[host] = time.monotonic()
        return encode(answer)

    def heartbeat(self, host: str, seen: int, level: int) -> bytes:
        """What a host is told that has pinged: a Heartbeat, with the news after number `seen`."""
        with self._lock:
            known = host in self._hosts
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
    def answer(self) -> bytes:
        """Say that the actor lives."""
        return b"yes"

    # -- for its server ----------------------------------------------------------------------------

    def pool_for(self, host: str) -> Pool | None:
        """The pool that runs a host's jobs; None where this agent does not know the host, or is about to end."""
        return self._pool if host in self._hosts and not self._ending else None

    def heard_of(self, host: str) -> None:
        """A host lives."""
        with self._lock:
            if host in self._hosts:
                self._hosts[host] = max(self._hosts[host], time.monotonic())

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
        server = self._server
        if server is not None:
            server.end_lanes_of(host, why)

    def _close_pool(self) -> None:
        with self._starting:
            if self._pool is not None:
                self._pool.close(drain=0)
