"""A round trip for event loops: a task of asyncio or trio waits for the pipes and does all of it.

At every await the job is either the caller's, and its cancellation ends it, or settled. Nothing has to be
awaited to clean up, so a cancelled task frees its caller at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from ..errors import WorkersUnavailable
from ..wire.frames import Frame
from .job_base import BaseAsyncJob
from .round_trip import EXIT_LIMIT, NOTHING, RoundTrip

if TYPE_CHECKING:
    from ..supervision.record import Lane
    from .prepared import PreparedRequest
    from .supervisor_protocol import SupervisorProtocol


class AsyncJob(RoundTrip, BaseAsyncJob):
    """A request in a worker, and its response: the async twin of `Job`.

    `Pool.aopen` makes it and returns once the head is there. Iterate for the body: each piece as it comes.
    An async context manager; leaving it early, `close`, or dropping the job ends it.
    """

    __slots__ = ()

    @classmethod
    async def open(
        cls,
        lane: Lane,
        supervisor: SupervisorProtocol,
        request: PreparedRequest,
    ) -> AsyncJob:
        """Send the request and wait for the response's head."""
        job = cls.__new__(cls)
        try:
            job.__init__(lane, supervisor, request)  # type: ignore[misc] # a signal's handler may raise in it
            if job._scope is not None:
                job._watch_scope(job._scope)
            job._open_event_fd()
            await job._use(lambda: job._send_head(request))
            while job._exchange.head is None:
                await job._use(job._advance)
                if job._exchange.head is None:
                    job._check_end()
            job._answered(job._exchange.head)
            return job
        except BaseException as error:
            job._fail_to_open(error)
            raise

    async def read(self) -> bytes:
        """The next piece of the body as it comes, b"" at its end.

        Raises a JobFailed where the body ends badly, ReadTimeout, WriteTimeout, and JobClosed once the job was closed.
        """
        while (piece := self._next_piece()) is None:
            await self._use(self._advance)
        return piece

    async def _use(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step on the channel, as the one task that uses it; a close that comes meanwhile follows it."""
        try:
            try:
                self._take_channel(step)
                await step()
            except BaseException as error:
                self._break_off(step, error)
                raise
            finally:
                left = self._release_channel(step)
        except BaseException:
            self._forget_user(step)
            raise
        if left:
            raise self._closed()

    def _open_event_fd(self) -> None:
        try:
            self._channel.event_fd()
        except OSError as error:
            raise WorkersUnavailable(f"no descriptor is left to wait for a worker with: {error}", 1.0) from error

    async def _send_head(self, request: PreparedRequest) -> None:
        self._send_request(request)

    async def _advance(self) -> None:
        """Wait for the next frames of the response and take them; the upload goes on meanwhile."""
        frames = await self._wait_for_frames()
        if frames is None and self._closed_by is not None:
            return  # the worker may have died of that: `_use` has the rest
        if frames is None:
            await self._wait_for_death()
            self._raise_worker_death()
        else:
            self._receive(frames)

    async def _wait_for_frames(self) -> list[Frame] | None:
        """The next frames, none where the job is closed meanwhile; None at the end of the worker's stream."""
        channel = self._channel
        while True:
            dead = self._worker.dead
            patience, write = self._patience(), self._wants_write
            ready = channel.wait(0, write=write)
            if any(ready) or dead:
                await checkpoint()  # a stream that always has more must not keep the loop from its other tasks
            else:
                await _readable(channel.event_fd(write=write), patience)
                ready = channel.wait(0, write=write)
            frames = self._on_ready(ready, dead)
            if frames is not NOTHING or self._closed_by is not None or self._settled:
                return frames

    async def _wait_for_death(self) -> None:
        worker, channel = self._worker, self._channel
        self._leave_refused_lane()
        self._supervisor.leases.kill(worker)  # one that lives on without its pipe is of no use
        event_fd = channel.event_fd()
        channel.stop_listening()
        with anyio.move_on_after(EXIT_LIMIT):
            while not worker.dead:
                await anyio.wait_readable(event_fd)
                channel.wait(0)  # takes the wake-up


async def _readable(fd: int, patience: float | None) -> None:
    if patience is None:
        await anyio.wait_readable(fd)
    else:
        with anyio.move_on_after(patience):
            await anyio.wait_readable(fd)
