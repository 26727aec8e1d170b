"""The two drivers of a round trip to an agent: a thread's, and a task's of asyncio or trio."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from anyio.lowlevel import checkpoint

from ..errors import LeaseTimeout, WorkersUnavailable
from ..jobs.job_base import BaseAsyncJob, BaseJob
from ..supervision.waiters import TaskWaiter
from .agent_client import ClusterContext
from .round_trip import ClusterRoundTrip, NotTakenByNode, remaining

if TYPE_CHECKING:
    from ..jobs.prepared import PreparedRequest


class ClusterJob(ClusterRoundTrip, BaseJob):
    """A request at an agent, and its response, for threads: what `runner.Job` is on one machine."""

    __slots__ = ("_bell",)

    def __init__(self, host: ClusterContext, request: PreparedRequest) -> None:
        super().__init__(host, request)
        self._bell = threading.Lock()  # held while nobody has rung: an Event costs several times as much
        self._bell.acquire()

    @classmethod
    def open(cls, host: ClusterContext, request: PreparedRequest) -> ClusterJob:
        """Send the request and wait for the response's head."""
        job = cls(host, request)
        until = None if request.lease_timeout is None else time.monotonic() + request.lease_timeout
        while True:
            try:
                job._check_time(until)
                slot = host.placement.lease(remaining(until), request.scope, request.context.provider)
            except (LeaseTimeout, WorkersUnavailable) as error:
                job._refused(error)
                raise
            try:
                job._sit(slot, remaining(until))
                while job._head is None and job._failure is None:
                    job._advance()
                break
            except NotTakenByNode:
                continue
            except BaseException as error:
                job.close(error)
                raise
        job._answered()
        return job

    def read(self) -> bytes:
        """The next piece of the body as it comes, b"" at its end. Raises as `runner.Job.read` does, and NodeLost."""
        while (piece := self._next_piece()) is None:
            self._advance()
        return piece

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it has been rung already

    def _advance(self) -> None:
        """Wait for mail and take it, as the one thread that does."""
        self._begin_use()
        try:
            self._push_upload()
            if not self._mail:
                patience = self._patience()
                self._bell.acquire(timeout=-1 if patience is None else patience)
            self._look()
        except NotTakenByNode:
            raise
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            closed = self._end_use()
        if closed:
            raise self._closed()


class ClusterAsyncJob(ClusterRoundTrip, BaseAsyncJob):
    """A request at an agent, and its response, for tasks: what `runner.AsyncJob` is on one machine."""

    __slots__ = ("_waiter",)

    def __init__(self, host: ClusterContext, request: PreparedRequest) -> None:
        super().__init__(host, request)
        self._waiter: TaskWaiter[object] | None = None

    @classmethod
    async def open(cls, host: ClusterContext, request: PreparedRequest) -> ClusterAsyncJob:
        """Send the request and wait for the response's head."""
        job = cls(host, request)
        until = None if request.lease_timeout is None else time.monotonic() + request.lease_timeout
        while True:
            try:
                job._check_time(until)
                slot = await host.placement.lease_async(remaining(until), request.scope, request.context.provider)
            except (LeaseTimeout, WorkersUnavailable) as error:
                job._refused(error)
                raise
            try:
                job._sit(slot, remaining(until))
                while job._head is None and job._failure is None:
                    await job._advance()
                break
            except NotTakenByNode:
                continue
            except BaseException as error:
                job.close(error)
                raise
        job._answered()
        return job

    async def read(self) -> bytes:
        """The next piece of the body as it comes, b"" at its end. Raises as `runner.Job.read` does, and NodeLost."""
        while (piece := self._next_piece()) is None:
            await self._advance()
        return piece

    def _ring(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            waiter.wake()

    async def _advance(self) -> None:
        """Wait for mail and take it, as the one task that does."""
        self._begin_use()
        try:
            self._push_upload()
            waiter = self._waiter = TaskWaiter("")
            if self._mail or self._closed_by is not None:
                await checkpoint()  # a stream that always has more must not keep the loop from its other tasks
            else:
                await waiter.wait(self._patience())
            self._waiter = None
            self._look()
        except NotTakenByNode:
            raise
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            closed = self._end_use()
        if closed:
            raise self._closed()
