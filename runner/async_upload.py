"""A request body that is an async iterable: pulled by a task of its own, a piece ahead of what the worker takes.

The task belongs to no caller's task group: a body may have more to give after `Pool.aopen` has returned. It ends
with the job, however that ends. A source that waits delays nothing: the response is read meanwhile.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterable, Callable
from typing import Any

import anyio
from anyio.lowlevel import current_token

from runner.errors import JobClosed
from runner.request import PIECE, Upload, as_bytes


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
            if len(piece) <= PIECE:
                return piece
            rest = memoryview(piece)
        self._rest = rest[PIECE:] if len(rest) > PIECE else None
        return rest[:PIECE]

    def close(self) -> None:
        """End the source; from any thread. It is over soon after."""
        if not self._closed and self._task is not None:
            call = getattr(self._loop, "run_sync_soon", None) or self._loop.call_soon_threadsafe
            try:
                call(self._scope.cancel)
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
            source = aiter(self._source)
            cancelled = anyio.get_cancelled_exc_class()
            try:
                async for piece in source:
                    if data := as_bytes(piece):
                        await self._give(data)
                self._slot = b""
            except cancelled:
                self._error = JobClosed("the source of the request body was cancelled")
                raise
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller
                self._error = error
            finally:
                self.wake()
                close = getattr(source, "aclose", None)
                if close is not None:
                    with anyio.CancelScope(shield=True):
                        await close()

    async def _give(self, piece: bytes) -> None:
        self._taken = anyio.Event()
        self._slot = piece
        self.wake()
        await self._taken.wait()
