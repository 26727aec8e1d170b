"""The worker's loop for handlers that are coroutines: one event loop for its whole life, and for all its lanes.

What an app has left running on the loop, a poller that its start-up began, say, runs on between jobs. Each lane has a
task that serves it, and each job one of its own, in a context of its own (contextvars). A cancel is
heard by the loop: lane and job come over the line. The handler is asked first, where it has ears for that
(ASGI's `http.disconnect`), and then its task is cancelled, both within the pool's grace time.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from ..control.line_messages import LANE_DESCRIPTORS, OPEN, take
from ..control.output_tags import tag_of
from ..control.signals import SIGNAL, STACKS_SIGNAL
from ..errors import AbortHandler
from ..wire.messages import FaultReport, Header
from . import reaper
from .async_pipes import AsyncPipes, AsyncRequest, AsyncResponse
from .exception_report import describe, report_on
from .forks import disown_forks, end_broken, is_fork, leave, leave_with_result
from .handlers.adapter import AsyncAdapter
from .pipes import HostGone, close_all
from .stdio import OutputFlag, current_tag
from .task_stacks import print_stacks

_ASKING_SHARE: Final = 0.2
"""The share of the grace time that an app has to end by itself, before its task is cancelled."""

_IMPLIED_HEAD: Final[tuple[int, list[Header]]] = (200, [])


class AsyncWorker:
    """One worker's event loop. `start`, then `serve`; both in the main thread."""

    def __init__(self, handler: AsyncAdapter, fds: tuple[int, int, int], prints: OutputFlag, grace: float) -> None:
        self._handler = handler
        self._request_fd, self._response_fd, self._line_fd = fds
        self._prints = prints
        self._asking = grace * _ASKING_SHARE
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._lanes: dict[int, AsyncLane] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._reaping = False

    def start(self) -> None:
        """Get the handler ready; raises what it raises."""
        os.register_at_fork(after_in_child=self._sever)
        signal.signal(SIGNAL, signal.SIG_IGN)  # the line says it all
        faulthandler.unregister(STACKS_SIGNAL)  # or it would take the next line's handler for its own work
        signal.signal(STACKS_SIGNAL, lambda number, frame: print_stacks(self._loop, sys.stderr))
        faulthandler.register(STACKS_SIGNAL, 2, all_threads=True, chain=True)
        self._run(self._handler.start())

    def serve(self) -> None:
        """Run one job after another on each lane; at the end of the request pipes stop the handler."""
        self._run(self._serve())
        self._run(self._handler.stop())
        self._run(self._wind_up())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        while True:
            try:
                return self._loop.run_until_complete(task)
            except (SystemExit, KeyboardInterrupt) as error:
                if is_fork():
                    leave(error)
                if task.done():
                    raise
                # Some other task's, which has come through the loop: it ends that task, not the worker.
                traceback.print_exc()

    def _sever(self) -> None:
        """This process is a handler's fork: the loop is the parent's, so that what comes back to it leaves."""
        for lane in self._lanes.values():
            lane.pipes.sever()
        loop: Any = self._loop
        ready = getattr(loop, "_ready", None)
        if isinstance(ready, deque):
            ready.clear()  # what asyncio would go on with comes after what is to leave; uvloop has none such
        loop.call_soon(leave)
        with contextlib.suppress(AttributeError):
            loop.call_soon_threadsafe = leave_with_result

    def _look_for_orphans(self) -> None:
        reaper.reap()
        self._reaping = reaper.possible
        if reaper.possible:
            self._loop.call_later(reaper.LOOK_SECONDS, self._look_for_orphans)

    async def _serve(self) -> None:
        self._line = socket.socket(fileno=self._line_fd)
        self._line.setblocking(False)
        self._loop.add_reader(self._line_fd, self._hear)
        self._open(0, self._request_fd, self._response_fd)
        while self._serving:
            await asyncio.wait(self._serving, return_when=asyncio.FIRST_COMPLETED)
            self._hear()  # of lanes that were opened just before the end

    def _open(self, number: int, request_fd: int, response_fd: int) -> None:
        lane = AsyncLane(number, AsyncPipes(request_fd, response_fd, self._prints), self._handler, self._asking)
        self._lanes[number] = lane
        if number:
            disown_forks((request_fd, response_fd), lane.pipes.sever)
        task = self._loop.create_task(self._serve_lane(lane))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_lane(self, lane: AsyncLane) -> None:
        try:
            while True:
                await lane.run_next(self._hear)
                if reaper.possible and not self._reaping:
                    self._look_for_orphans()
        except HostGone:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it was
            end_broken(error)

    def _hear(self) -> None:
        """Take what has come over the line: lanes that are opened, and cancels."""
        while True:
            try:
                message = take(self._line)
            except BlockingIOError:
                return
            if message is None:
                self._loop.remove_reader(self._line_fd)  # the end of the request pipes tells the rest
                return
            kind, number, job, fds = message
            if kind == OPEN:
                if len(fds) == LANE_DESCRIPTORS:
                    self._open(number, *fds)
                else:
                    close_all(fds)  # there is no room for more: the host goes elsewhere
            elif number in self._lanes:
                self._lanes[number].cancel(job)

    async def _wind_up(self) -> None:
        """Cancel what is still running, and close what is open, as asyncio.run does."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class AsyncLane:
    """One lane of a worker, and the job that is under way there."""

    def __init__(self, number: int, pipes: AsyncPipes, handler: AsyncAdapter, asking: float) -> None:
        self.pipes = pipes
        self._number = number
        self._handler = handler
        self._asking = asking
        self._loop = pipes.loop
        self._cancelled_early: int | None = None
        self._job: tuple[AsyncRequest, AsyncResponse] | None = None
        self._task: asyncio.Task[FaultReport | None] | None = None

    async def run_next(self, hear: Callable[[], object]) -> None:
        """Wait for a request, and run it to its end. HostGone at the end of the pipe. `hear` looks for cancels."""
        pipes = self.pipes
        request = await pipes.next_request()
        current_tag.set(tag_of(self._number, request.number))
        response = AsyncResponse(pipes, request)
        hear()  # of the job before, or of this one already
        self._job = request, response
        if self._cancelled_early == request.number:
            request.cancel()
        task = self._task = self._loop.create_task(self._call(request, response))
        if request.cancelled:
            task.cancel()
        try:
            report = await task
        except asyncio.CancelledError:  # before its first step
            report = FaultReport("cancelled", "CancelledError")
        self._task = self._job = None
        aborted = report is not None and report.kind == "aborted"
        response.close(report, _IMPLIED_HEAD if aborted else None)
        request.conclude()
        await request.skip()

    async def _call(self, request: AsyncRequest, response: AsyncResponse) -> FaultReport | None:
        try:
            await self._handler(request, response)
        except BaseException as error:  # noqa: BLE001 - it ends the job, not the worker
            if is_fork():
                leave(error)
            if request.cancelled:
                return FaultReport("cancelled", *describe(error))
            return report_on(_unwrapped(error))
        if is_fork():
            leave()
        if request.cancelled and not response.ended:
            return FaultReport("cancelled")
        return None

    def cancel(self, number: int) -> None:
        """The caller of this job has left: it is told if it is under way; a later one, when it begins."""
        job = self._job
        if job is None or number != job[0].number:
            self._cancelled_early = number
        elif not job[1].ended:
            self._tell(job[0])

    def _tell(self, request: AsyncRequest) -> None:
        task = self._task
        request.cancel()
        if task is not None:
            if self._handler.asks_first and self._asking:
                self._loop.call_later(self._asking, task.cancel)  # does nothing once the task is done
            else:
                task.cancel()


def _unwrapped(error: BaseException) -> BaseException:
    """An AbortHandler or MemoryError, also where task groups have wrapped it alone; else the error as it is."""
    inner = error
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner if isinstance(inner, (AbortHandler, MemoryError)) else error
