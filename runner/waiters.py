"""A caller that waits in the queue for a worker: a thread, or a task of an event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.worker_record import Worker


class Waiter:
    """What was found for a caller: a worker, or an error. Guarded by the lock of `Leases`, as is `wake`."""

    __slots__ = ("error", "provider", "worker")

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.worker: Worker | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether something was found."""
        return self.worker is not None or self.error is not None

    def wake(self) -> None:
        """Something was found. Called once, from any thread."""
        raise NotImplementedError


class ThreadWaiter(Waiter):
    """A thread that waits."""

    __slots__ = ("_ready",)

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self._ready = threading.Lock()
        self._ready.acquire()

    def wake(self) -> None:
        self._ready.release()

    def wait(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds."""
        self._ready.acquire(timeout=-1 if timeout is None else max(timeout, 0))


class TaskWaiter(Waiter):
    """A task that waits, of asyncio or trio."""

    __slots__ = ("_call", "_event")

    def __init__(self, provider: str) -> None:
        import anyio
        from anyio.lowlevel import current_token

        super().__init__(provider)
        self._event = anyio.Event()
        loop: Any = current_token().native_token
        self._call: Callable[[Callable[[], object]], object] = (
            loop.run_sync_soon if hasattr(loop, "run_sync_soon") else loop.call_soon_threadsafe
        )

    def wake(self) -> None:
        try:
            self._call(self._event.set)
        except RuntimeError:
            pass  # its loop has ended; the task's own clean-up gives the worker back

    async def wait(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds."""
        import anyio

        if timeout is None:
            await self._event.wait()
        else:
            with anyio.move_on_after(max(timeout, 0)):
                await self._event.wait()
