"""What every pool is to those that use one: `runner.Pool` on this machine, `runner.cluster.ClusterPool` on many.

Transports, the gateway, the server and the metrics know these protocols (PEP 544) and nothing more. Each method's
contract is in the docstring of `runner.Pool` and of its `Job`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

from .events import Batch, JobTime, PoolStats, Subscriber, WorkerInfo
from .model.request import Request
from .wire.messages import JobContext, ResponseHead


class OpenJob(Protocol):
    """A job whose response's head is there: what `AnyPool.open` and `AnyPool.aopen` give have this in common."""

    head: ResponseHead
    job_id: str

    @property
    def settled(self) -> bool: ...

    @property
    def finished(self) -> bool: ...

    def close(self, cause: BaseException | None = None) -> None: ...


class AnyJob(OpenJob, Protocol):
    """A job of a thread. A context manager."""

    def read(self) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class AnyAsyncJob(OpenJob, Protocol):
    """A job of a task. An async context manager."""

    async def read(self) -> bytes: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class AnyPool(Protocol):
    """A pool. A context manager, also an async one."""

    debug: bool
    overload: str

    @property
    def ready(self) -> bool: ...

    def start(self) -> Self: ...

    def close(self, drain: float | None = None) -> None: ...

    async def aclose(self, drain: float | None = None) -> None: ...

    def open(
        self,
        request: Request,
        *,
        context: JobContext = ...,
        lease_timeout: float | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> AnyJob: ...

    async def aopen(
        self,
        request: Request,
        *,
        context: JobContext = ...,
        lease_timeout: float | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> AnyAsyncJob: ...

    def subscribe(self, subscriber: Subscriber, *, healthy: bool = True) -> Callable[[], None]: ...

    def note_times(self, batch: Batch[JobTime]) -> Callable[[], None]: ...

    def stats(self) -> PoolStats: ...

    def workers(self) -> list[WorkerInfo]: ...
