"""A caller that waits in a queue, for a worker or a node: a thread, or a task or a callback of an event loop."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..model.durations import longest_wait

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Resource = TypeVar("Resource")
Given = TypeVar("Given", contravariant=True)


class Caller(Protocol[Given]):
    """Whoever a resource is for, as far as others may act for it while it waits, or is still to wake up."""

    def dispatch(self, worker: Given, /) -> None:
        """The worker was found: have it begin at once. Called by whoever gave it up."""

    def withdraw(self, worker: Given, /) -> None:
        """The caller waits no more, and was found a worker at the same moment: see to it."""


class Waiter(Generic[Resource]):
    """What was found for a caller: a resource, or an error. Guarded by the lock of its `WaitQueue`, as is `wake`.

    `told` says that it was woken to take it, `left` that it waits no more though something was found.
    """

    __slots__ = ("caller", "error", "found", "left", "provider", "told")

    def __init__(self, provider: str, caller: Caller[Resource] | None = None) -> None:
        self.provider = provider
        self.caller = caller
        self.found: Resource | None = None
        self.error: Exception | None = None
        self.told = False
        self.left = False

    @property
    def done(self) -> bool:
        """Whether something was found."""
        return self.found is not None or self.error is not None

    def result(self) -> Resource:
        """What was found. Raises the error, where it is one."""
        if self.found is None:
            assert self.error is not None
            raise self.error
        return self.found

    def wake(self) -> bool:
        """Something was found; whether there is anybody to take it. Called once, from any thread."""
        raise NotImplementedError


class ThreadWaiter(Waiter[Resource]):
    """A thread that waits."""

    __slots__ = ("_ready",)

    def __init__(self, provider: str, caller: Caller[Resource] | None = None) -> None:
        super().__init__(provider, caller)
        self._ready = threading.Lock()
        self._ready.acquire()

    def wake(self) -> bool:
        self._ready.release()
        return True

    def wait(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds."""
        longest = longest_wait()
        left = math.inf if timeout is None else max(timeout, 0)
        while not self._ready.acquire(timeout=min(left, longest)) and left > longest:
            left -= longest


class TaskWaiter(Waiter[Resource]):
    """A task that waits, of asyncio or trio."""

    __slots__ = ("_call", "_event", "_loop")

    def __init__(self, provider: str, caller: Caller[Resource] | None = None) -> None:
        import anyio
        from anyio.lowlevel import current_token

        super().__init__(provider, caller)
        self._event = anyio.Event()
        loop: Any = current_token().native_token
        self._loop = loop
        self._call: Callable[[Callable[[], object]], object] = (
            loop.run_sync_soon if hasattr(loop, "run_sync_soon") else loop.call_soon_threadsafe
        )

    def wake(self) -> bool:
        try:
            if self._is_here():
                self._event.set()  # by another task of the same loop, which needs no waking
                return True
            self._call(self._event.set)
        except RuntimeError:
            return False  # its loop has ended, and nobody knows when the task will be collected
        return True

    def _is_here(self) -> bool:
        import asyncio  # anyio has loaded it

        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    @property
    def woken(self) -> bool:
        """Whether the wake-up has reached the loop."""
        return self._event.is_set()

    async def wait(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds."""
        import anyio

        if timeout is None:
            await self._event.wait()
        else:
            with anyio.move_on_after(max(timeout, 0)):
                await self._event.wait()


class CallbackWaiter(Waiter[Resource]):
    """A callback of an asyncio loop that waits: `on_found` is called, without arguments, in the loop's next turn."""

    __slots__ = ("_loop", "_on_found", "_thread")

    def __init__(
        self,
        provider: str,
        caller: Caller[Resource] | None,
        loop: AbstractEventLoop,
        on_found: Callable[[], object],
    ) -> None:
        super().__init__(provider, caller)
        self._loop = loop
        self._on_found = on_found
        self._thread = threading.get_ident()

    def wake(self) -> bool:
        try:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._on_found)
            else:
                self._loop.call_soon_threadsafe(self._on_found)
        except RuntimeError:
            return False  # its loop is closed
        return True


async def in_thread(work: Callable[[], object]) -> None:
    """Do what blocks without blocking the event loop. A cancel, of whatever kind, is raised when the work is done."""
    import anyio

    waiter: TaskWaiter[object] = TaskWaiter("")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the task
            errors.append(error)
        finally:
            waiter.wake()

    thread = threading.Thread(target=run, name="blastdoor-work", daemon=True)
    thread.start()
    cancelled: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while not waiter.woken:
            try:
                await waiter.wait(None)
            except anyio.get_cancelled_exc_class() as error:  # asyncio's own cancel knows no shield
                cancelled = error
    thread.join()
    if cancelled is not None:
        raise cancelled
    if errors:
        raise errors[0]
