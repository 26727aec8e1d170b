"""The parent of several fronts: it serves nobody, starts them, replaces those that die, and passes signals on.

The sockets are its own, and its fronts' by inheritance: a connection that waits to be accepted outlives any front. The
admin address is its own too, and tells of all fronts together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, PlatformCollector, ProcessCollector
from prometheus_client.registry import Collector

from runner import __version__
from runner.errors import ConfigurationError, StartError
from runner.supervision.backoff import RestartBackoff
from transport.front.forwarded import Forwarded
from transport.front.server import Front
from transport.fronts.front_process import PROGRAM
from transport.fronts.messages import (
    AskNumbers,
    AskStatus,
    Failed,
    Numbers,
    Reload,
    Reloaded,
    Setup,
    Started,
    ToFront,
    Told,
    next_from_front,
    packed,
)
from transport.fronts.room import Room
from transport.fronts.shares import share
from transport.fronts.sums import Sums, whole_status
from transport.serving.addresses import Listeners, bind_port, name_of
from transport.serving.admin import ADMIN_CONNECTIONS, ADMIN_PATIENCE, make_admin
from transport.serving.server import SETTLE, changed_for_restart
from transport.serving.server_log import LoopErrors, log_serving
from transport.serving.settings import Settings
from transport.serving.status import SPAN

logger = logging.getLogger("blastdoor")

_HOME: Final = str(Path(__file__).parents[2])
_ANSWER: Final = 3.0
"""Seconds that a front may take to tell its status."""

_RELOAD: Final = 600.0
"""Seconds that a front may take to reload."""

_STOP: Final = 15.0
"""Seconds beyond its drain time that a front may take to end."""


class Fronts:
    """All that `blastdoor serve --fronts N` runs. ConfigurationError, or OSError for an address that can't be had."""

    def __init__(self, settings: Settings, fronts: int, reread: Callable[[], Settings] | None = None) -> None:
        self._settings = settings
        self._reread = reread
        self._number = fronts
        for front in range(fronts):
            share(settings, front, fronts)
        for path, mount in settings.all_mounts.items():
            mount.mount(path, settings.defaults)  # what makes no sense is told here, and not by each front
        Forwarded(settings.trusted_proxies, unix=False)
        self._room = Room.make(fronts)
        self._sums = Sums()
        self._fronts = [_FrontHandle(self, index) for index in range(fronts)]
        self._draining = False
        self._reload_error = ""
        self._began = time.monotonic()
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._drained = asyncio.Event()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        alive = Gauge("blastdoor_fronts", "Front processes that serve.", registry=self.registry)
        alive.set_function(lambda: sum(front.serves for front in self._fronts))
        self.restarts = Counter("blastdoor_front_restarts_total", "Fronts that were replaced.", registry=self.registry)
        self.registry.register(_SumsCollector(self._refreshed_sums))
        admin = settings.admin_address
        try:
            self.listeners = Listeners.of(settings)
            try:
                self.admin_socket = None if admin is None else bind_port(*admin, "admin", "admin")
            except BaseException:
                self.listeners.close()
                raise
        except BaseException:
            self._room.close()
            raise

    async def run(self, started: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called, or a signal says so.

        StartError where the fronts can't start: nothing is left running then.
        """
        self.loop = asyncio.get_running_loop()
        admin: Front | None = None
        try:
            with self._signals():
                await self._start()
                if not self._draining:
                    admin = self._serve_admin()
                    self._log_started()
                    started()
                await self._drained.wait()
                await self._end_fronts()
                if admin is not None:
                    admin.drain()
                    await admin.wait_closed(1)
        finally:
            for front in self._fronts:
                front.kill()
            await asyncio.gather(*(front.wait_dead() for front in self._fronts))
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.listeners.close()
            self._room.close()
            if self.admin_socket is not None:
                self.admin_socket.close()
            logger.info("stopped")

    def stop(self) -> None:
        """Drain all fronts, and end; the second time at once. In the event loop's thread."""
        if not self._draining:
            self._draining = True
            self.listeners.close()  # the fronts have theirs; its path goes while nobody can have taken it over
            self._drained.set()
        for front in self._fronts:
            front.signal(signal.SIGTERM)

    async def reload(self) -> bool:
        """Have new pools serve, one front after the other; whether all did. The first that can't ends it."""
        async with self._reloading:
            if not self._read_settings_again():
                return False
            for front in self._fronts:
                if self._draining:
                    return False
                if not await front.reload(share(self._settings, front.index, self._number)):
                    self._reload_error = "the last reload failed, and the old app goes on: the log says why"
                    return False
            self._reload_error = ""
            return True

    def _read_settings_again(self) -> bool:
        if self._reread is None:
            return True
        try:
            settings = self._reread()
            for path, mount in settings.all_mounts.items():
                mount.pool_with(path, settings.defaults)
            for front in self._fronts:
                share(settings, front.index, self._number)
        except ConfigurationError as error:
            logger.error("the settings can't be read again, those from before hold: %s", error)
            self._reload_error = "the settings can't be read again, and those from before hold: the log says why"
            return False
        if waits := changed_for_restart(self._settings, settings):
            logger.warning("changed, and taken only by a restart: %s", ", ".join(waits))
        self._settings = settings
        return True

    # -- fronts --------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Have all fronts serve. StartError where one can't."""
        for front in self._fronts:
            front.start(share(self._settings, front.index, self._number))
        first: list[str | None] = await asyncio.gather(*(front.wait_started() for front in self._fronts))
        for error in first:
            if error is not None and not self._draining:
                raise StartError(error)
        for front in self._fronts:
            self.spawn(self._keep(front))

    async def _keep(self, front: _FrontHandle) -> None:
        """Replace a front whenever it dies."""
        backoff = RestartBackoff()
        await front.wait_dead()
        while not self.draining:
            number, how = front.index + 1, front.how_it_ended
            logger.error("front %d (pid %s) %s: another takes its place", number, front.pid, how)
            self.restarts.inc()
            if front.error is not None:
                backoff.failed(time.monotonic())
                logger.error("front %d can't start: %s", number, front.error)
            await asyncio.sleep(backoff.delay(time.monotonic()))
            if self._drained.is_set():
                return
            front.start(share(self._settings, front.index, self._number))
            if await front.wait_started() is None:
                backoff.succeeded()
                logger.info("front %d serves, pid %s", number, front.pid)
            await front.wait_dead()

    async def _end_fronts(self) -> None:
        """All of them have been told to drain."""
        limit = self._settings.drain + SETTLE + _STOP
        ends = [asyncio.create_task(front.wait_dead()) for front in self._fronts]
        _, late = await asyncio.wait(ends, timeout=limit)
        if late:
            logger.error("%d fronts have not ended within %g s, and are killed", len(late), limit)
        for front in self._fronts:
            front.kill()
        await asyncio.gather(*ends)

    def gone(self, front: _FrontHandle, pid: int) -> None:
        """A front has ended: its numbers stay, its room does not."""
        if front.pid == pid:
            self._room.forget(front.index)
        self._sums.retire(pid)

    def take(self, pid: int, numbers: Numbers) -> None:
        """A front has told its numbers."""
        self._sums.take(pid, numbers)

    def setup(self, front: _FrontHandle, settings: Settings) -> Setup:
        """What a front is told first."""
        return Setup(settings, front.index, [sock.fileno() for sock in self.listeners.sockets], self._room.fd)

    def spawn(self, work: Any) -> None:
        """Have something done, and log what it raises."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("something beside the serving failed", exc_info=error)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        self.loop.set_exception_handler(LoopErrors())
        handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: lambda: self.spawn(self.reload()),
        }
        for number, handler in handlers.items():
            self.loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                self.loop.remove_signal_handler(number)

    def _log_started(self) -> None:
        kinds = next((front.kinds for front in self._fronts if front.kinds), {})
        log_serving(self._settings, kinds, str(self.listeners))
        pids = ", ".join(str(front.pid) for front in self._fronts)
        logger.info("%d fronts, pids %s", self._number, pids)
        if self.admin_socket is not None:
            logger.info("status at %s/-/status", name_of(self.admin_socket))

    # -- admin ---------------------------------------------------------------------------------------

    def _serve_admin(self) -> Front | None:
        if self.admin_socket is None:
            return None
        pages = make_admin(self, self.registry, self.admin_socket.getsockname()[0])
        admin = Front(pages, most=ADMIN_CONNECTIONS, send_timeout=ADMIN_PATIENCE)
        admin.listen([self.admin_socket])
        return admin

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._draining

    @property
    def ready(self) -> bool:
        """Whether a front serves."""
        return not self._draining and any(front.serves for front in self._fronts)

    def tell(self) -> dict[str, Any]:
        """What the page of status shows; in another thread than the loop's."""
        told = asyncio.run_coroutine_threadsafe(self._ask_status(), self.loop).result()
        own = {
            "now": int(time.time()),
            "uptime": time.monotonic() - self._began,
            "version": __version__,
            "draining": self._draining,
            "reload_error": self._reload_error,
            "span": SPAN,
            "ready": self.ready and any(one["ready"] for one in told),
            "fronts": [front.shown() for front in self._fronts],
        }
        return whole_status(told, self._sums, own)

    async def _ask_status(self) -> list[dict[str, Any]]:
        told = await asyncio.gather(*(front.ask_status() for front in self._fronts))
        return [status for status in told if status is not None]

    def _refreshed_sums(self) -> Sums:
        """The numbers of this moment; in another thread than the loop's."""
        asyncio.run_coroutine_threadsafe(self._ask_numbers(), self.loop).result()
        return self._sums

    async def _ask_numbers(self) -> None:
        await asyncio.gather(*(front.ask_numbers() for front in self._fronts))


class _SumsCollector(Collector):
    """The metrics of all fronts."""

    def __init__(self, refreshed: Callable[[], Sums]) -> None:
        self._refreshed = refreshed

    def describe(self) -> Iterable[Metric]:
        """Nothing is collected when it is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The sums of this moment."""
        return self._refreshed().metrics()


class _FrontHandle:
    """A front in the parent: its process, one after the other, and the line to it."""

    def __init__(self, parent: Fronts, index: int) -> None:
        self._parent = parent
        self.index = index
        self.pid: int | None = None
        self.error: str | None = None
        self.kinds: dict[str, str] = {}
        self.how_it_ended = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._writer: asyncio.StreamWriter | None = None
        self._dead = asyncio.Event()
        self._dead.set()
        self._ready = asyncio.Event()
        self._began = 0.0
        self._status: asyncio.Future[dict[str, Any]] | None = None
        self._numbers: asyncio.Future[None] | None = None
        self._reloaded: asyncio.Future[bool] | None = None

    @property
    def serves(self) -> bool:
        """Whether it takes requests."""
        return self._ready.is_set() and not self._dead.is_set()

    def start(self, settings: Settings) -> None:
        """Start a process, with these settings."""
        self.error = None
        self._began = time.monotonic()
        setup = self._parent.setup(self, settings)
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), _HOME, *filter(None, map(str, sys.path))],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), setup.room, *setup.listeners),
                start_new_session=True,  # a terminal's signals come to the parent, which passes them on
            )
        except OSError as error:
            ours.close()
            self.error = f"a front can't be started: {error}"
            self.how_it_ended = "was not started"
            self._parent.loop.call_soon(self._ready.set)
            return
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._dead = asyncio.Event()
        self._ready.clear()
        self._parent.loop.add_reader(self._pidfd, self._on_exit)
        self._parent.spawn(self._talk(ours, setup, self._dead, self.pid))

    async def wait_started(self) -> str | None:
        """Until it takes requests; or else why it does not."""
        await self._ready.wait()
        return self.error

    async def wait_dead(self) -> None:
        """Until its process has ended."""
        await self._dead.wait()

    def signal(self, number: int) -> None:
        """Send its process a signal, if it lives."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)

    async def reload(self, settings: Settings) -> bool:
        """Have new pools serve; whether they do. One that is dead, or dies of it, begins with them by itself."""
        while not self._dead.is_set() and not self._ready.is_set():
            await self._ready.wait()  # it starts, and may have read the old code already
        if not self.serves:
            return True
        self._reloaded = self._parent.loop.create_future()
        self._send(Reload(settings))
        try:
            return await asyncio.wait_for(asyncio.shield(self._reloaded), _RELOAD)
        except TimeoutError:
            logger.error("front %d (pid %s) has not reloaded within %g s", self.index + 1, self.pid, _RELOAD)
            return False

    async def ask_status(self) -> dict[str, Any] | None:
        """What its page of status would show; None where it does not say."""
        if not self.serves:
            return None
        if self._status is None or self._status.done():
            self._status = self._parent.loop.create_future()
            self._send(AskStatus())
        try:
            return await asyncio.wait_for(asyncio.shield(self._status), _ANSWER)
        except (TimeoutError, ConnectionError):
            return None

    async def ask_numbers(self) -> None:
        """Have it tell its numbers now. Those from before hold where it does not."""
        if not self.serves:
            return
        if self._numbers is None or self._numbers.done():
            self._numbers = self._parent.loop.create_future()
            self._send(AskNumbers())
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(asyncio.shield(self._numbers), _ANSWER)

    def shown(self) -> dict[str, Any]:
        """It as the page of status shows it."""
        state = "ready" if self.serves else "starting" if not self._dead.is_set() else "gone"
        return {"pid": self.pid, "state": state, "age": time.monotonic() - self._began}

    # ------------------------------------------------------------------------------------------------

    async def _talk(self, ours: socket.socket, setup: Setup, dead: asyncio.Event, pid: int) -> None:
        reader, writer = await asyncio.open_connection(sock=ours)
        self._writer = writer
        try:
            self._send(setup)
            while (message := await next_from_front(reader)) is not None:
                if isinstance(message, Started):
                    self.kinds = message.kinds
                    self._ready.set()
                elif isinstance(message, Failed):
                    self.error = message.error
                elif isinstance(message, Numbers):
                    self._parent.take(pid, message)
                    _settle(self._numbers, None)
                elif isinstance(message, Told):
                    _settle(self._status, message.status)
                elif isinstance(message, Reloaded):
                    _settle(self._reloaded, message.whole)
        finally:
            writer.close()
            if self._writer is writer:
                self._writer = None
            await dead.wait()
            self._parent.gone(self, pid)
            for waiting in (self._numbers, self._status):
                if waiting is not None and not waiting.done():
                    waiting.set_exception(ConnectionError("the front has ended"))
                    waiting.exception()  # somebody may wait for it, and need not
            _settle(self._reloaded, True)

    def _send(self, message: ToFront) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(packed(message))

    def _on_exit(self) -> None:
        assert self._process is not None
        self._parent.loop.remove_reader(self._pidfd)
        status = self._process.wait()
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)
        self.how_it_ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        if not self._ready.is_set() and self.error is None:
            self.error = f"a front {self.how_it_ended} as it started"
        self._dead.set()
        self._ready.set()


def _settle(waiting: asyncio.Future[Any] | None, result: object) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(result)
