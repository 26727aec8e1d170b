"""What a server does beside the serving: tasks of its own, and what signals ask for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from transport.serving.server_log import LoopErrors

logger = logging.getLogger("blastdoor")


class Background:
    """Tasks of the running loop that nobody waits for. What one raises is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin to do something."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def end(self) -> None:
        """Cancel what is still being done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("something beside the serving failed", exc_info=error)


@contextlib.contextmanager
def on_signals(stop: Callable[[], object], reload: Callable[[], object]) -> Iterator[None]:
    """In this block SIGTERM and SIGINT stop, and SIGHUP reloads: in the main thread, elsewhere nobody is asked."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrors())
    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
    try:
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
    except (ValueError, RuntimeError):  # not in the main thread: `stop` and `reload` are called there
        yield
        return
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
