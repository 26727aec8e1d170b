"""A request body that is an async iterable: pulled by a task of its own, a piece ahead of what the worker takes.

The task belongs to no caller's task group: a body may have more to give after `Pool.aopen` has returned. It ends
with the job, however that ends. A source that waits delays nothing: the response is read meanwhile.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import anyio
from anyio.lowlevel import current_token

from ..errors import JobClosed
from ..model.request import PIECE, Body, Upload, as_bytes

logger = logging.getLogger("blastdoor")


class AsyncUpload(Upload):
    """A request body from an async iterable. `wake` is called when there is something to pull."""

    __slots__ = ("_error", "_loop", "_scope", "_slot", "_source", "_taken", "_task", "wake")

    def __init__(self, source: AsyncIterable[object]) -> None:
        super().__init__(None)
        self.wake: Callable[[], object] = lambda: None
        self._source = source
        self._next = bytes  # there may be more to pull, until the end was pulled
        self._slot: bytes | None = None
        self._error: BaseException | None = None
        self._taken = anyio.Event()
        self._scope = anyio.CancelScope()
        self._loop: Any = current_token().native_token
        self._task: object = None

    def on_ready(self, wake: Callable[[], object]) -> None:
        """Have `wake` called when there is something to pull."""
        self.wake = wake

    @property
    def ready(self) -> bool:
        """Whether `pull` has something to give now. The first look starts the pulling."""
        if self._task is None and not self._closed:
            self._task = self._spawn()
        return self._slot is not None or self._error is not None or self._rest is not None

    def pull(self) -> bytes | memoryview:
        """The next piece, which has to be `ready`."""
        rest = self._rest
        if rest is None:
            if self._error is not None:
                raise self._error
            piece, self._slot = self._slot, None
            assert piece is not None
            self.pulled = True
            if not piece:
                self._closed = True
                self._next = None
                return b""
            self._taken.set()
            return self._cut(piece)
        return self._cut(rest)

    def close(self) -> None:
        """End the source; from any thread. It is over soon after."""
        if not self._closed and self._task is not None:
            try:
                if isinstance(self._task, asyncio.Task):
                    self._loop.call_soon_threadsafe(self._task.cancel)  # once, as asyncio has it
                else:
                    self._loop.run_sync_soon(self._scope.cancel)
            except RuntimeError:
                pass  # the loop has ended, and the task with it
        super().close()

    def _spawn(self) -> object:
        if isinstance(self._loop, asyncio.AbstractEventLoop):
            return self._loop.create_task(self._fill())
        import trio

        return trio.lowlevel.spawn_system_task(self._fill, context=contextvars.copy_context())

    async def _fill(self) -> None:
        with self._scope:
            source: AsyncIterator[object] | None = None
            cancelled = anyio.get_cancelled_exc_class()
            try:
                source = aiter(self._source)
                async for piece in source:
                    if data := as_bytes(piece):
                        await self._give(data)
                self._slot = b""
            except cancelled:
                self._error = JobClosed("the source of the request body was cancelled")
                raise
            except BaseException as error:
                if self._closed:  # its answer to being cancelled: there is no caller any more
                    logger.error("closing a request body failed", exc_info=error)
                self._error = error  # it is raised in the caller
            finally:
                self.wake()
                await _close(source)

    async def _give(self, piece: bytes) -> None:
        self._taken = anyio.Event()
        self._slot = piece
        self.wake()
        await self._taken.wait()


async def _close(source: AsyncIterator[object] | None) -> None:
    """Run the source's clean-up. What it raises is nobody's to catch any more, and is logged."""
    close = getattr(source, "aclose", None)
    if close is not None:
        try:
            with anyio.CancelScope(shield=True):
                await close()
        except Exception:
            logger.exception("closing a request body failed")


def upload_of(body: Body) -> Upload:
    """The upload of a body, async or not; what can be both is taken as what is not."""
    read = getattr(body, "read", None)
    if inspect.iscoroutinefunction(read):
        return AsyncUpload(body if isinstance(body, AsyncIterable) else _pieces(read))
    if isinstance(body, AsyncIterable) and not isinstance(body, Iterable) and read is None:
        return AsyncUpload(body)
    return Upload(body)


async def _pieces(read: Callable[[int], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while piece := await read(PIECE):
        yield piece
