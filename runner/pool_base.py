"""What every pool is to whoever holds it: started and closed by hand or as a context manager, and subscribed to.

The base of `runner.Pool` and of `runner.cluster.ClusterPool`: their lives, and what their calls are held to. The pools
of this process end with it, and know when they are in a forked child.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import uuid
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar

from .call_checks import check_timeouts, endless
from .errors import PoolClosed, PoolForked
from .events import Batch, Events, JobTime, Subscriber
from .jobs.dispatch import Dispatch
from .model.request import Request, Upload
from .pool_options import PoolConfig
from .wire.messages import JobContext

NO_CONTEXT: Final = JobContext()

_ENDLESS: Final = (None, None)

D = TypeVar("D", bound=Dispatch)


class PoolBase:
    """A pool's life: a context manager, also an async one, that ends also where it is dropped."""

    _events: Events

    def _set_up_base(self, options: PoolConfig) -> None:
        """What is the same for all. Once the rest is set up too, it is to be put into `pools`."""
        self._token = uuid.uuid4().hex
        self.job_prefix = self._token[:8]
        self._job_numbers = itertools.count(1)
        self.overload: str = options.queueing.overload
        self._queue_timeout = options.queueing.queue_timeout
        self._retry = options.retry
        self._start_lock = threading.Lock()
        self._closed = False
        self._forked = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def _check_process(self) -> None:
        """PoolForked where it is the parent's."""
        if self._forked:
            raise PoolForked(
                "this pool was started before the fork and belongs to the parent process: make one after the fork"
            )

    @abstractmethod
    def _after_fork_in_child(self) -> None:
        """This is a forked child now: what there is is the parent's."""

    @abstractmethod
    def start(self) -> Self: ...

    @abstractmethod
    def close(self, drain: float | None = None) -> None: ...

    @property
    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether there is anything to be closed."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        from .supervision.waiters import in_thread

        try:
            await in_thread(self.start)
        except BaseException:
            await in_thread(lambda: self.close(drain=0))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, drain: float | None = None) -> None:
        """As `close`, without blocking the event loop, and not to be interrupted."""
        from .supervision.waiters import in_thread

        await in_thread(lambda: self.close(drain))

    def __del__(self) -> None:
        if self._has_begun and not self._forked:
            try:
                warnings.warn(
                    "a pool was dropped without being closed: use it in a with block, or call close()",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            finally:
                self.close(drain=0)

    def subscribe(self, subscriber: Subscriber, *, healthy: bool = True) -> Callable[[], None]:
        """Have `subscriber` called with each event of `runner.events`, where it happens; gives what ends that.

        Without `healthy` it hears of jobs only where they end badly, which costs the others nothing.
        """
        return self._events.subscribe(subscriber, healthy=healthy)

    def note_times(self, batch: Batch[JobTime]) -> Callable[[], None]:
        """Have the times of all jobs noted in a batch, which costs them little; gives what ends that."""
        return self._events.note_times(batch)

    # -- calls ---------------------------------------------------------------------------------------

    def _next_job_id(self) -> str:
        return f"{self.job_prefix}-{next(self._job_numbers)}"

    def _call(
        self,
        kind: type[D],
        request: Request,
        upload: Upload,
        context: JobContext,
        job_id: str,
        lease_timeout: float | None,
        read_timeout: float | None,
        write_timeout: float | None,
    ) -> D:
        """A call with these times, held to the pool's own."""
        check_timeouts(lease_timeout, read_timeout, write_timeout)
        if self._queue_timeout is not None and (lease_timeout is None or lease_timeout > self._queue_timeout):
            lease_timeout = self._queue_timeout
        if write_timeout is None:
            write_timeout = read_timeout
        timeouts = _ENDLESS if write_timeout is None else (endless(read_timeout), endless(write_timeout))
        retries = 0 if self._retry is None else self._retry.of(request.method)
        return kind(request, upload, context, job_id, endless(lease_timeout), timeouts, retries)


pools: Final[weakref.WeakValueDictionary[str, PoolBase]] = weakref.WeakValueDictionary()
"""The pools of this process, by their tokens."""


def pool_is_closed() -> PoolClosed:
    """What those get who come too late."""
    return PoolClosed("the pool is closed: open a new one")


def close_all(kind: type[PoolBase] = PoolBase) -> None:
    """Close the pools of this process, or those of a kind, at its end."""
    for pool in list(pools.values()):
        if isinstance(pool, kind):
            pool.close(drain=0)


def _all_after_fork_in_child() -> None:
    for pool in list(pools.values()):
        pool._after_fork_in_child()


atexit.register(close_all)
os.register_at_fork(after_in_child=_all_after_fork_in_child)
