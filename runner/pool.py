"""The pool: workers behind one handler, and the way to have a request run by one of them.

Longer than other modules by its docstrings: they are the contract that users read.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from .call_checks import check_request, endless, sized_body, tell_of_dropped
from .control import nested_pools
from .control.zygote_messages import ZygoteConfig
from .errors import PoolClosed, StartError
from .events import Events, PoolStats, WorkerInfo
from .jobs.dispatch import Dispatch, load_async
from .jobs.job import Job
from .model.limits import Limits
from .model.recycle import Recycle
from .model.request import Request, Upload
from .model.retry import Retry
from .model.sandbox import Profile, Sandbox
from .platform import descriptors
from .pool_base import NO_CONTEXT, PoolBase, pool_is_closed, pools
from .pool_options import (
    Environment,
    PoolConfig,
    Queueing,
    Times,
    check_retry,
    recycling,
    size_of,
    zygote_config,
)
from .supervision.leases import Leases
from .supervision.supervisor import Supervisor
from .wire.messages import JobContext, Kind

if TYPE_CHECKING:
    from .jobs.async_job import AsyncJob
    from .jobs.callback_dispatch import CallbackDispatch
    from .jobs.callback_job import Listener
    from .jobs.poller import Poller


class Pool(PoolBase):
    """Worker processes that run one handler, each one job at a time, or up to `concurrency`.

    `handler` is an import string (`"package.module:attribute"`, imported only in the workers) or a callable,
    which is sent by value. A module alone has its `app` or `application`. A factory is called in each worker: with its
    arguments (`"shop:create_app('test')"`), or with none where `factory` says that it is one. `kind` is how the handler
    is called: "native", "wsgi", "asgi", or "auto" to find out. `workers` is
    how many processes there are (default: one per core). With `preload` the handler is imported once, in
    the process that forks the workers; with a list of names just these modules are. `env` is the workers' environment:
    None passes the host's on, with the thread counts of numeric libraries set where they are not; a mapping passes just
    that; `set_env` adds to either. `path` are directories that the handler's modules are looked for in, before the
    host's `sys.path`; after it the working directory is. `root_path` is the path that a WSGI or ASGI app lies under
    (SCRIPT_NAME, `root_path`).
    `spool_uploads` (bytes, or text such as "64MiB") has a WSGI app get each body of unknown length as a file with a
    CONTENT_LENGTH, which Django needs; a longer one is refused with a 413.
    `limits` are those of the workers and their jobs. `sandbox` says what the handler's code may reach; with one, `env`
    None passes nothing of the host's environment on, and the handler is never imported outside it.

    With `concurrency` above 1 a worker runs so many jobs at once, for apps that mostly wait: an async handler on its
    event loop, others in a thread each. Jobs of one worker share its memory and its fate: where it dies all of them
    end. A job that does not end in its grace time has its worker replaced; the other jobs there have `drain` seconds.

    `workers=(2, 32)` grows with the demand and shrinks when a worker was idle for `shrink_after` seconds; `spares` more
    are kept warm, so that a death costs the next caller nothing. `queue` bounds how many callers wait, and
    `queue_timeout` how long; `per_provider` how many jobs of a provider run at once. Where that is exceeded callers
    get an error, or with `overload="answer"` a 503. `recycle` says when a worker is replaced, `retry` which
    requests are done again where their worker dies before it answers.

    Times are in seconds: a job that its caller leaves has `grace` to end before its worker is killed; `close`
    waits up to `drain` for the jobs under way; a worker that is not ready `start_timeout` after its start, an ASGI
    app's lifespan start-up included, is killed, and so is one that has not exited `stop_timeout` after it was told
    to. In `debug` mode fault responses carry the handler's traceback. `label` stands before what its workers print, and
    in their process titles.

    A context manager, also an async one: `with Pool(...) as pool:` starts it and closes it. Without, it starts with its
    first request. Safe to share between threads and tasks. Raises ConfigurationError for what can't work.
    """

    def __init__(
        self,
        handler: str | Callable[..., Any],
        *,
        kind: Kind = "auto",
        factory: bool = False,
        workers: int | tuple[int, int] | None = None,
        concurrency: int = 1,
        spares: int = 0,
        shrink_after: float = 10.0,
        queue: int | None = None,
        queue_timeout: float | None = None,
        per_provider: Mapping[str, int] | None = None,
        overload: Literal["raise", "answer"] = "raise",
        recycle: Recycle | None = None,
        retry: Retry | None = None,
        preload: bool | Sequence[str] = False,
        env: Mapping[str, str] | None = None,
        set_env: Mapping[str, str] | None = None,
        path: Sequence[str] = (),
        root_path: str = "",
        spool_uploads: int | str | None = None,
        limits: Limits | None = None,
        sandbox: Sandbox | Profile | None = None,
        grace: float = 0.25,
        drain: float = 5.0,
        start_timeout: float = 60.0,
        stop_timeout: float = 5.0,
        debug: bool = False,
        label: str = "",
    ) -> None:
        self._config = zygote_config(
            handler,
            kind=kind,
            factory=factory,
            preload=preload,
            path=path,
            root_path=root_path,
            spool_uploads=spool_uploads,
            limits=limits,
            sandbox=sandbox,
            grace=grace,
            debug=debug,
            label=label,
            concurrency=concurrency,
        )
        self._options = PoolConfig(
            size=size_of(workers, spares, shrink_after, concurrency),
            queueing=Queueing(
                queue=queue,
                queue_timeout=queue_timeout,
                per_provider=dict(per_provider or {}),
                overload=overload,
            ),
            times=Times(grace=grace, drain=drain, start_timeout=start_timeout, stop_timeout=stop_timeout),
            environment=Environment(env=env, set_env=set_env or {}),
            recycle=recycling(recycle, self._config.sandbox),
            retry=check_retry(retry),
        )
        self._set_up()

    def _set_up(self) -> None:
        self._set_up_base(self._options)
        self.debug = self._config.debug
        self._leases = self._make_leases()
        self._events = Events()
        self._supervisor: Supervisor | None = None
        pools[self._token] = self

    def _make_leases(self) -> Leases:
        options = self._options
        return Leases(options.queueing.admission(options.size), options.recycle)

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the workers and return once all are ready.

        Raises StartError, with the worker's own traceback, where the handler can't be loaded.
        """
        supervisor = self._begin()
        try:
            supervisor.wait_started()
        except BaseException:
            self._start_over(supervisor)
            raise
        return self

    def _begin(self) -> Supervisor:
        """Begin to start the workers, if that has not been done."""
        self._check_process()
        with self._start_lock:
            if self._closed:
                raise pool_is_closed()
            if self._supervisor is None:
                options, sandbox = self._options, self._config.sandbox
                env = options.environment.of_workers(self._config, options.size.most)
                config = self._within_others(env)
                options.size.make_room(self._token)
                if sandbox is not None and sandbox.protect_host:
                    from .platform import linux  # ctypes is loaded where it is used

                    linux.set_dumpable(dumpable=False)
                try:
                    supervisor = Supervisor(
                        self._leases,
                        self._events,
                        config,
                        options.size,
                        env,
                        options.times.start_timeout,
                        options.times.stop_timeout,
                        options.times.drain,
                    )
                    supervisor.begin()
                except (OSError, RuntimeError) as error:
                    raise StartError(f"the pool can't start its supervisor thread: {error}") from error
                self._supervisor = supervisor
            return self._supervisor

    def _within_others(self, env: Mapping[str, str]) -> ZygoteConfig:
        """What its zygote is told, with the pools that it lies within. ConfigurationError where that has no end."""
        config = self._config
        said = sorted(item for item in env.items() if not item[0].endswith("_NUM_THREADS"))  # which we may have added
        here = config.handler, config.pickle, config.factory, config.path, said, os.getcwd()
        within = nested_pools.refuse_endless(nested_pools.fingerprint(*here), config.handler)
        return msgspec.structs.replace(config, within=within)

    def _start_over(self, failed: Supervisor) -> None:
        """Clear away a start that has failed: the next one begins anew."""
        with self._start_lock:
            if self._supervisor is failed:
                self._leases = self._make_leases()
                self._supervisor = None
                descriptors.release(self._token)
        failed.stop(0)

    def close(self, drain: float | None = None) -> None:
        """Take no more requests, wait up to `drain` seconds for the jobs under way, then end all workers.

        When it returns, no process, thread or descriptor of the pool is left. Closing again does nothing, but that a
        close that another thread is still waiting in takes no longer than this one would.
        """
        if self._forked:
            return
        with self._start_lock:
            self._closed = True
            self._leases.close(pool_is_closed)
            supervisor, self._supervisor = self._supervisor, None
        drain = self._options.times.drain if drain is None else drain
        if supervisor is None:
            self._leases.shorten_drain(drain)
            return
        try:
            self._leases.wait_drained(drain)
        finally:
            for job in self._leases.jobs():
                job.close(PoolClosed("the pool was closed before the job's end"))
            supervisor.stop(self._options.times.stop_timeout)
            descriptors.release(self._token)

    @property
    def _has_begun(self) -> bool:
        return getattr(self, "_supervisor", None) is not None

    def __reduce__(self) -> tuple[Callable[..., Pool], tuple[Any, ...]]:
        # In this process a pickle is a reference; elsewhere it is a pool of its own, set up alike.
        return restore_pool, (self._token, msgspec.msgpack.encode(self._config), self._options)

    def _after_fork_in_child(self) -> None:
        """This is a forked child now: the workers, if there are any, are the parent's."""
        self._start_lock = threading.Lock()  # the old one may be held by a thread that is not here
        if self._supervisor is not None:
            self._forked = True
            self._supervisor.after_fork_in_child()

    # -- what it is doing ----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a worker is there that has loaded the handler, busy or not."""
        return self._leases.has_any

    @property
    def kind(self) -> str:
        """How the handler is called: "native", "wsgi" or "asgi"; empty as long as no worker has loaded it."""
        return "" if self._supervisor is None else self._supervisor.kind

    def workers(self) -> list[WorkerInfo]:
        """The workers of this moment. It reads /proc for each of them."""
        supervisor = self._supervisor
        return [] if supervisor is None or self._forked else supervisor.describe_workers()

    def stats(self) -> PoolStats:
        """The numbers of this moment: workers by state, callers that wait, and how the jobs so far have ended."""
        supervisor = self._supervisor
        starting = 0 if supervisor is None else supervisor.starting
        now = self._leases.numbers()
        lanes = now.serving * self._config.concurrency
        deaths, outcomes = self._events.deaths, self._events.outcomes()
        return PoolStats(starting, now.idle, now.busy, now.waiting, deaths, outcomes, now.running, lanes)

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
        """Run a request in a worker; gives its job once the response's head is there.

        `context` is passed on to the handler, with a job id of the pool's own. Waits up to `lease_timeout`
        seconds for a free worker, up to `read_timeout` for each sign of progress of the response, and up to
        `write_timeout` (None: as `read_timeout`) for the worker to take more of the request's body; None waits for
        ever. Where a CancelScope is open, the job ends with it.

        Raises LeaseTimeout, ReadTimeout, WriteTimeout, JobClosed where the scope was cancelled, WorkersUnavailable, a
        JobFailed where the job ends badly before its head, InvalidRequest for a head over the size cap, PoolClosed,
        PoolForked and StartError.
        """
        check_request(request)
        upload = Upload(sized_body(request))
        return self._open(request, upload, context, self._next_job_id(), lease_timeout, read_timeout, write_timeout)

    def _open(
        self,
        request: Request,
        upload: Upload,
        context: JobContext,
        job_id: str,
        lease_timeout: float | None,
        read_timeout: float | None,
        write_timeout: float | None,
    ) -> Job:
        """As `open`, with a body and a job id of the caller's own."""
        supervisor = self._supervisor
        if supervisor is None or self._forked:
            supervisor = self._begin()
        try:
            call = self._call(Dispatch, request, upload, context, job_id, lease_timeout, read_timeout, write_timeout)
            if supervisor.kind == "wsgi":
                tell_of_dropped(request, job_id)
            return call.run(supervisor)
        except StartError:
            upload.close()
            self._start_over(supervisor)
            raise
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
        """The async twin of `open`, for tasks of asyncio and trio: the event loop is never blocked.

        The request's body may be an async iterable. One that is not is read in the event loop's thread.
        """
        check_request(request)
        supervisor = self._supervisor
        if supervisor is None or self._forked:
            supervisor = self._begin()
        upload = load_async()[1](sized_body(request))
        from .supervision.waiters import in_thread

        try:
            job_id = self._next_job_id()
            call = self._call(Dispatch, request, upload, context, job_id, lease_timeout, read_timeout, write_timeout)
            if supervisor.kind == "wsgi":
                tell_of_dropped(request, job_id)
            return await call.run_async(supervisor)
        except StartError:
            upload.close()
            await in_thread(lambda: self._start_over(supervisor))
            raise
        except BaseException:
            upload.close()
            raise

    def open_for(
        self,
        listener: Listener,
        request: Request,
        poller: Poller,
        upload: Upload | None = None,
        context: JobContext = NO_CONTEXT,
    ) -> CallbackDispatch:
        """The twin of `open` for callbacks of an asyncio loop, without a task: `listener` is told what comes.

        It is, from the moment that `begin` of what this gives is called. `upload` is a body that is pushed, in the
        place of the request's. Raises InvalidRequest for a head over the size cap, PoolForked, PoolClosed and
        StartError; all else is told.
        """
        check_request(request)
        if upload is None:
            upload = Upload(sized_body(request))
        job_id, timeout = self._next_job_id(), endless(self._queue_timeout)
        return self._open_for(listener, request, poller, upload, context, job_id, timeout)

    def _open_for(
        self,
        listener: Listener,
        request: Request,
        poller: Poller,
        upload: Upload,
        context: JobContext,
        job_id: str,
        lease_timeout: float | None,
    ) -> CallbackDispatch:
        """As `open_for`, with a job id of the caller's own."""
        supervisor = self._supervisor
        if supervisor is None or self._forked:
            supervisor = self._begin()
        call = _callback_dispatch()(
            request,
            upload,
            context,
            job_id,
            lease_timeout,
            poller,
            listener,
            supervisor,
            lambda: self._start_over(supervisor),
            0 if self._retry is None else self._retry.of(request.method),
        )
        if supervisor.kind == "wsgi":
            tell_of_dropped(request, call.job_id)
        return call


@functools.cache
def _callback_dispatch() -> type[CallbackDispatch]:
    """What only callbacks of loops need, loaded where it is used, and once."""
    from .jobs.callback_dispatch import CallbackDispatch

    return CallbackDispatch


def restore_pool(token: str, config: bytes, options: PoolConfig) -> Pool:
    """The pool that a pickle stands for: the one with this token in this process, or another with its options."""
    pool = pools.get(token)
    if not isinstance(pool, Pool):
        pool = Pool.__new__(Pool)
        pool._config = msgspec.msgpack.decode(config, type=ZygoteConfig)
        pool._options = options
        pool._set_up()
    return pool
