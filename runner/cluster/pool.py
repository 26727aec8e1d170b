"""The pool of a cluster: what `runner.Pool` is on one machine, on all nodes of a Ray cluster."""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, Unpack

import msgspec

from ..call_checks import check_request, sized_body
from ..errors import ConfigurationError, PoolClosed, StartError
from ..events import Events, PoolStats, WorkerInfo
from ..jobs.dispatch import load_async
from ..jobs.job import Job
from ..model.request import Request, Upload
from ..pool import Pool, restore_pool
from ..pool_base import NO_CONTEXT, PoolBase, close_all, pool_is_closed, pools
from ..pool_options import PoolConfig, PoolOptions, Queueing
from ..supervision.scaling import Size
from ..wire.messages import JobContext
from . import ray_connection
from .host import ClusterHost
from .job import RemoteDispatch
from .nodes import AgentSpec, NodeManager
from .placement import Placement
from .tls import ClusterTLS

if TYPE_CHECKING:
    from ..jobs.async_job import AsyncJob


class ClusterPool(PoolBase):
    """Worker processes on every node of a Ray cluster that run one handler, each one job at a time.

    It takes what `runner.Pool` takes, and stands wherever that does. `workers`, `spares` and `recycle` are each node's
    own, with `workers` None one worker per core of the node; `queue`, `queue_timeout`, `per_provider` and `retry` are
    this pool's, over all nodes. The handler, and blastdoor, have to be installed on the nodes.

    `address` is that of the cluster: None for the one that `ray.init` has connected to, or that runs on this machine;
    "local" starts one here. Pools of several processes that have the same `name`, handler and settings share their
    agents and workers; without a name a pool has its own.

    Jobs go over connections between this process and the nodes, which show each other a secret that Ray has carried;
    with `tls` what is said there is encrypted.

    A job goes to the least loaded node. One whose worker dies fails as on one machine; one whose node is lost fails
    with NodeLost, which clients see as a 502, and is not run again. A node that joins is used as soon as its workers
    are ready; one that drains gets no more jobs, and finishes those that it has.

    A context manager, also an async one: `with ClusterPool(...) as pool:` starts it and closes it. Safe to share
    between threads and tasks. Raises ConfigurationError for what can't work, StartError where there is no cluster.
    """

    def __init__(
        self,
        handler: str | Callable[..., Any],
        *,
        address: str | None = None,
        name: str | None = None,
        tls: ClusterTLS | None = None,
        **options: Unpack[PoolOptions],
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name or ":" in name):
            raise ConfigurationError(f"name is a text without a colon, that pools share their agents by, not {name!r}")
        if address is not None and (not isinstance(address, str) or not address):
            raise ConfigurationError(f"address is that of a Ray cluster, such as 'auto', or None, not {address!r}")
        template = Pool(handler, **options)
        if tls is not None and not isinstance(tls, ClusterTLS):
            raise ConfigurationError(f"tls is a ClusterTLS, not {type(tls).__name__}")
        self._set_up(template, options.get("workers") is None, address, name, tls)

    def _set_up(
        self, template: Pool, by_cores: bool, address: str | None, name: str | None, tls: ClusterTLS | None
    ) -> None:
        options = template._options
        self._made_from = template.__reduce__()[1][1:], by_cores, address, name, tls
        self._set_up_base(options)
        self.debug = template.debug
        self._times = options.times
        self._address = address
        # What is kept here, over all nodes, is not kept there once more.
        queueing = Queueing(overload=options.queueing.overload)
        per_node = msgspec.structs.replace(options, queueing=queueing, retry=None)
        workers = None if by_cores else per_node.size.most
        self._concurrency = per_node.size.concurrency
        self._agents = AgentSpec(
            f"pool-{self._token}" if name is None else f"{name}-{_digest(template, per_node, workers)}",
            pickle.dumps((_pool_of(template, per_node), _path())),
            workers,
            tls,
            shared=name is not None,
        )
        self._placement = Placement(options.queueing.queue, options.queueing.per_provider)
        self._events = Events()
        self._host = ClusterHost(self._token, self._placement, self._events, tls)
        self._node_manager: NodeManager | None = None
        pools[self._token] = self

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Connect to the cluster, and return once every node has its workers ready.

        Raises StartError, with the worker's own traceback, where the handler can't be loaded.
        """
        manager = self._begin()
        try:
            manager.wait_started(self._times.start_timeout + 30)
        except BaseException as error:
            self._start_over(manager, error)
            raise
        return self

    def _begin(self) -> NodeManager:
        self._check_process()
        with self._start_lock:
            if self._closed:
                raise pool_is_closed()
            if self._node_manager is None:
                ray_connection.attach(self._address)
                manager = NodeManager(self._host, self._agents, self._times.start_timeout)
                try:
                    manager.begin()
                except BaseException:
                    ray_connection.detach()
                    raise
                self._node_manager = manager
            return self._node_manager

    def _start_over(self, failed: NodeManager, why: BaseException) -> None:
        """Clear away a start that has failed: the next one begins anew."""
        with self._start_lock:
            if self._node_manager is not failed:
                return
            self._node_manager = None
            # Those who have come meanwhile, and wait for a worker.
            self._placement.refuse(lambda: StartError(f"the pool could not start: {why}"))
        try:
            failed.end()
        finally:
            ray_connection.detach()

    def close(self, drain: float | None = None) -> None:
        """Take no more requests, wait up to `drain` seconds for the jobs under way, then end the workers of all nodes.

        Agents and workers that other processes share go on. Closing again does nothing, but that a close that another
        thread is still waiting in takes no longer than this one would.
        """
        if self._forked:
            return
        with self._start_lock:
            self._closed = True
            self._host.closing = True
            self._placement.close(pool_is_closed)
            manager, self._node_manager = self._node_manager, None
        drain = self._times.drain if drain is None else drain
        if manager is None:
            self._placement.shorten_drain(drain)
            return
        try:
            self._placement.wait_drained(drain)
        finally:
            for job in self._host.leases.jobs():
                job.close(PoolClosed("the pool was closed before the job's end"))
            try:
                manager.end()
            finally:
                ray_connection.detach()

    @property
    def _has_begun(self) -> bool:
        return getattr(self, "_node_manager", None) is not None

    def __reduce__(self) -> tuple[Callable[..., ClusterPool], tuple[Any, ...]]:
        # In this process a pickle is a reference; elsewhere it is a pool of its own, set up alike.
        return _restore, (self._token, *self._made_from)

    def _after_fork_in_child(self) -> None:
        """This is a forked child now: the connection to the cluster is the parent's."""
        self._start_lock = threading.Lock()
        if self._node_manager is not None:
            self._forked = True
            self._host.after_fork_in_child()
            self._placement.after_fork_in_child()
            self._events.after_fork_in_child()

    # -- what it is doing ----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there is a node whose workers are ready, busy or not."""
        return self._placement.has_any

    def workers(self) -> list[WorkerInfo]:
        """The workers of all nodes. They are a second old."""
        manager = self._node_manager
        return [] if manager is None or self._forked else manager.workers()

    def stats(self) -> PoolStats:
        """The numbers of this moment, over all nodes. Workers that start, idle or have died are told of each second."""
        manager = self._node_manager
        starting, idle, busy, deaths = (0, 0, 0, 0) if manager is None else manager.numbers()
        running, waiting = self._placement.numbers()
        lanes = sum(node.capacity for node in self._placement.nodes())
        if self._concurrency == 1:
            busy = running  # which is not a second old
        return PoolStats(starting, idle, busy, waiting, deaths, self._events.outcomes(), running, lanes)

    # -- use -----------------------------------------------------------------------------------------

    def open(
        self,
        request: Request,
        *,
        context: JobContext = NO_CONTEXT,
        lease_timeout: float | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> Job:
        """Run a request in a worker of the least loaded node; gives its job once the response's head is there.

        As `runner.Pool.open`; raises NodeLost too.
        """
        check_request(request)
        upload = Upload(sized_body(request))
        try:
            if self._node_manager is None or self._forked:
                self.start()
            times = lease_timeout, read_timeout, write_timeout
            call = self._call(RemoteDispatch, request, upload, context, self._next_job_id(), *times)
            return call.run(self._host)
        except BaseException:
            upload.close()
            raise

    async def aopen(
        self,
        request: Request,
        *,
        context: JobContext = NO_CONTEXT,
        lease_timeout: float | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> AsyncJob:
        """The async twin of `open`, for tasks of asyncio and trio: the event loop is never blocked."""
        check_request(request)
        upload = load_async()[1](sized_body(request))
        from ..supervision.waiters import in_thread

        try:
            if self._node_manager is None or self._forked:
                await in_thread(self.start)
            times = lease_timeout, read_timeout, write_timeout
            call = self._call(RemoteDispatch, request, upload, context, self._next_job_id(), *times)
            return await call.run_async(self._host)
        except BaseException:
            upload.close()
            raise


def _path() -> list[str]:
    """Where this process finds modules, for the nodes' processes to look at too, after all places of their own."""
    return [os.path.abspath(place) for place in sys.path]


def _digest(template: Pool, options: PoolConfig, workers: int | None) -> str:
    """What tells pools of one name apart that run something else, or otherwise. None: one worker per core of a node."""
    if workers is None:
        options = msgspec.structs.replace(options, size=Size(least=1, most=1))
    settings = msgspec.msgpack.encode((template._config, options), order="deterministic")  # sets have no order
    return hashlib.sha256(settings).hexdigest()[:12]


def _pool_of(template: Pool, options: PoolConfig) -> Pool:
    """A local pool like this one, with these options."""
    return restore_pool("", msgspec.msgpack.encode(template._config), options)


def _restore(
    token: str,
    template: tuple[bytes, PoolConfig],
    by_cores: bool,
    address: str | None,
    name: str | None,
    tls: ClusterTLS | None = None,
) -> ClusterPool:
    pool = pools.get(token)
    if not isinstance(pool, ClusterPool):
        pool = ClusterPool.__new__(ClusterPool)
        pool._set_up(restore_pool("", *template), by_cores, address, name, tls)
    return pool


# Before Ray, which was imported here, leaves its cluster; other pools have their own time.
atexit.register(close_all, ClusterPool)
