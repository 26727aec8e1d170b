"""One of several fronts: a process that serves at the sockets it has got, and tells its parent what it does.

It dies with its parent, and its workers with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from runner.errors import BlastdoorError, ConfigurationError
from runner.platform import linux
from transport.fronts.messages import (
    AskNumbers,
    AskStatus,
    Counts,
    Failed,
    Family,
    FromFront,
    Numbers,
    Reload,
    Reloaded,
    Sample,
    Setup,
    Started,
    Told,
    next_for_front,
    packed,
    receive_setup,
)
from transport.fronts.room import Room
from transport.serving.addresses import Listeners
from transport.serving.log_format import set_up_logging
from transport.serving.loops import loop_factory
from transport.serving.server import Service

if TYPE_CHECKING:
    from transport.serving.settings import Settings

logger = logging.getLogger("blastdoor")

PROGRAM: Final = """
import sys
from importlib import util
fd, home, *sys.path[:] = sys.argv[1:]
for name in ('runner', 'transport'):
    place = home + '/' + name
    spec = util.spec_from_file_location(name, place + '/__init__.py', submodule_search_locations=[place])
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
from transport.fronts.front_process import main
main(int(fd))
"""
"""A front's program: our packages from where they lie, whatever the path is, which comes as arguments."""

FAILED: Final = 3
"""Exit code of a front that could not start, and has said why."""

_TELL: Final = 1.0
"""Seconds between two times that a front tells its numbers."""

_LOOK: Final = 0.05
"""Seconds until a front that was full looks whether it still is."""


def main(fd: int) -> None:
    """Serve until it is told to stop."""
    linux.die_with_parent(signal.SIGKILL)
    with socket.socket(fileno=fd) as control:
        control.set_inheritable(False)
        setup = receive_setup(control)
        if setup is None:
            sys.exit(FAILED)  # the parent has died already
        control.setblocking(False)
        _set_title(f"blastdoor: front {setup.index + 1}")
        settings = setup.settings
        try:
            set_up_logging(settings.log_level, settings.log_format, settings.log_config)
        except ConfigurationError as error:
            control.setblocking(True)
            control.sendall(packed(Failed(str(error))))
            sys.exit(FAILED)
        with asyncio.Runner(loop_factory=loop_factory(setup.settings.loop)) as runner:
            sys.exit(runner.run(_FrontProcess(setup, control).run()))


def _set_title(title: str) -> None:
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(title)


class _FrontProcess:
    """A service, and the line to the parent."""

    def __init__(self, setup: Setup, control: socket.socket) -> None:
        self._control = control
        self._index = setup.index
        self._settings: Settings = setup.settings
        self._room = Room(setup.room)
        self._listeners = Listeners([socket.socket(fileno=fd) for fd in setup.listeners])
        for sock in self._listeners.sockets:
            sock.set_inheritable(False)
        os.set_inheritable(setup.room, False)
        self._looks_again = False

    async def run(self) -> int:
        """Serve; gives the exit code."""
        self._loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_connection(sock=self._control)
        tasks = []
        try:
            self._service = Service(self._settings, lambda: self._settings, self._listeners, self._may_accept)
            tasks = [self._spawn(self._hear(reader))]
            await self._service.run(lambda: tasks.append(self._spawn(self._tell_numbers())))
        except (BlastdoorError, OSError) as error:
            if not isinstance(error, BlastdoorError):
                logger.exception("a front can't start")
            self._send(Failed(str(error)))
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            return FAILED
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.close()
        return 0

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Talk to the parent. A front that can't, whatever was raised, ends: the parent has another take its place."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_talk_over)
        return task

    @staticmethod
    def _on_talk_over(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a front can't talk to its parent any more, and ends", exc_info=error)
            os.kill(os.getpid(), signal.SIGKILL)

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        """Do what the parent says. Where it has died this process ends, as its kernel would have it."""
        while (message := await next_for_front(reader)) is not None:
            if isinstance(message, Reload):
                self._settings = message.settings
                self._send(Reloaded(await self._reload()))
            elif isinstance(message, AskStatus):
                self._send(Told(await asyncio.to_thread(self._service.status.tell)))
            elif isinstance(message, AskNumbers):
                self._send(self._numbers())
        os.kill(os.getpid(), signal.SIGKILL)

    async def _reload(self) -> bool:
        try:
            return await self._service.reload()
        except Exception:
            logger.exception("a reload failed")
            return False

    async def _tell_numbers(self) -> None:
        self._send(Started({path: getattr(pool, "kind", "") for path, pool in self._service.gateway.pools.items()}))
        self._room.note(self._index, full=False)
        while True:
            self._send(self._numbers())
            await asyncio.sleep(_TELL)

    def _numbers(self) -> Numbers:
        metrics = [
            Family(
                metric.name,
                metric.documentation,
                metric.type,
                [Sample(sample.name, sample.labels, sample.value) for sample in metric.samples],
            )
            for metric in self._service.registry.collect()
        ]
        counts = {}
        for path, pool in self._service.gateway.pools.items():
            stats = pool.stats()
            counts[path] = Counts(stats.deaths, {str(name): count for name, count in stats.outcomes.items()})
        return Numbers(metrics, counts)

    def _send(self, message: FromFront) -> None:
        if not self._writer.is_closing():
            self._writer.write(packed(message))

    # -- room ----------------------------------------------------------------------------------------

    def _may_accept(self) -> bool:
        """Whether a new connection is for this front: it has room for it, or no other one has."""
        full = self._is_full()
        self._room.note(self._index, full=full)
        if not full:
            return True
        if not self._looks_again:
            self._looks_again = True
            self._loop.call_later(_LOOK, self._look_again)
        return not self._room.is_elsewhere(self._index)

    def _look_again(self) -> None:
        self._looks_again = False
        full = self._is_full()
        self._room.note(self._index, full=full)
        if full:
            self._looks_again = True
            self._loop.call_later(_LOOK, self._look_again)

    def _is_full(self) -> bool:
        """Whether requests wait for a worker, at any mount."""
        for pool in self._service.gateway.pools.values():
            stats = pool.stats()
            if stats.waiting and stats.running >= stats.lanes:
                return True
        return False
