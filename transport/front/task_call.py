"""A request to a pool that knows no callbacks, such as one on a cluster: a task has it answered, and tells of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from runner.jobs.pushed_upload import PushedUpload

if TYPE_CHECKING:
    from runner.jobs.callback_job import Listener
    from runner.model.request import Request, Upload
    from runner.protocols import AnyAsyncJob, AnyPool
    from runner.wire.messages import JobContext


class TaskCall:
    """What `Pool.open_for` gives, for any pool: `begin` begins, the listener is told what comes."""

    def __init__(
        self,
        pool: AnyPool,
        request: Request,
        upload: Upload | None,
        context: JobContext,
        listener: Listener,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._pool = pool
        if isinstance(upload, PushedUpload):
            request = replace(request, body=self._pieces(upload))
        elif upload is not None:
            request = replace(request, body=upload.inline)
        self._request = request
        self._context = context
        self._listener = listener
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._over = False
        self.job_id = ""
        self.begun = False

    def begin(self) -> None:
        """Open the job, in a task."""
        self._task = self._loop.create_task(self._run())

    def leave(self, cause: BaseException | None = None) -> None:
        """End it: the listener is told nothing more."""
        self._over = True
        if self._task is not None and self._task is not asyncio.current_task(self._loop):
            self._task.cancel()

    def pause(self) -> None:
        """Tell no more of the response, until `resume`."""
        self._free.clear()

    def resume(self) -> None:
        """Tell of the response again."""
        self._free.set()

    async def _run(self) -> None:
        try:
            job = await self._pool.aopen(self._request, context=self._context, write_timeout=math.inf)
            self.job_id = job.job_id
            self.begun = True
            async with job:
                await self._pass_on(job)
        except Exception as error:  # noqa: BLE001 - it is the listener's
            if not self._over:
                self._over = True
                self._listener.on_failure(error)

    async def _pass_on(self, job: AnyAsyncJob) -> None:
        self._listener.on_head(job.head, b"", ended=False)
        ended = False
        while not ended and not self._is_over():
            await self._free.wait()
            piece = await job.read()
            if not self._is_over():
                ended = self._over = not piece or job.finished
                self._listener.on_body(piece, ended=ended)

    def _is_over(self) -> bool:
        """Whether the listener has left, perhaps from within what it was told."""
        return self._over

    async def _pieces(self, upload: PushedUpload) -> AsyncIterator[bytes]:
        """The body as it is pushed."""
        more = asyncio.Event()
        upload.on_ready(more.set)
        while True:
            if upload.ready:
                piece = upload.pull()
                if not piece:
                    return
                yield bytes(piece)
            else:
                more.clear()
                upload.starve()
                await more.wait()
