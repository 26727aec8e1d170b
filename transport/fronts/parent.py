"""The parent of several fronts: it serves nobody, starts them, replaces those that die, and passes signals on.

The sockets are its own, and its fronts' by inheritance: a connection that waits to be accepted outlives any front. The
admin address is its own too, and tells of all fronts together.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, PlatformCollector, ProcessCollector
from prometheus_client.registry import Collector

from runner import __version__
from runner.errors import ConfigurationError, StartError
from runner.supervision.backoff import RestartBackoff
from transport.front.forwarded import Forwarded
from transport.front.server import Front
from transport.fronts.front_handle import FrontHandle
from transport.fronts.messages import Numbers, Setup
from transport.fronts.room import Room
from transport.fronts.shares import share
from transport.fronts.sums import Sums, whole_status
from transport.serving.addresses import Listeners, bind_port, name_of
from transport.serving.admin import ADMIN_CONNECTIONS, ADMIN_PATIENCE, make_admin
from transport.serving.background import Background, on_signals
from transport.serving.notifier import Notifier
from transport.serving.server import SETTLE, changed_for_restart
from transport.serving.server_log import log_serving
from transport.serving.settings import Settings
from transport.serving.status import SPAN
from transport.serving.tls import make_tls

logger = logging.getLogger("blastdoor")

_STOP: Final = 15.0
"""Seconds beyond its drain time that a front may take to end."""


class Fronts:
    """All that `blastdoor serve --fronts N` runs. ConfigurationError, or OSError for an address that can't be had."""

    def __init__(
        self,
        settings: Settings,
        fronts: int,
        reread: Callable[[], Settings] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._notifier = Notifier() if notifier is None else notifier
        self._settings = settings
        self._reread = reread
        self._number = fronts
        for front in range(fronts):
            share(settings, front, fronts)
        for path, mount in settings.all_mounts.items():
            mount.mount(path, settings.defaults)  # what makes no sense is told here, and not by each front
        Forwarded(settings.trusted_proxies)
        make_tls(settings.tls_cert, settings.tls_key)
        self._room = Room.make(fronts)
        self._sums = Sums()
        self._fronts = [FrontHandle(self, index) for index in range(fronts)]
        self._draining = False
        self._reload_error = ""
        self._began = time.monotonic()
        self._reloading = asyncio.Lock()
        self._background = Background()
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
            with on_signals(self.stop, lambda: self.spawn(self.reload())):
                await self._start()
                if not self._draining:
                    admin = self._serve_admin()
                    self._log_started()
                    self._notifier.ready(f"serving at {self.listeners}")
                    self.spawn(self._notifier.keep_alive())
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
            await self._background.end()
            self.listeners.close()
            self._room.close()
            if self.admin_socket is not None:
                self.admin_socket.close()
            logger.info("stopped")

    def stop(self) -> None:
        """Drain all fronts, and end; the second time at once. In the event loop's thread."""
        if not self._draining:
            self._draining = True
            self._notifier.stopping()
            self.listeners.close()  # the fronts have theirs; its path goes while nobody can have taken it over
            self._drained.set()
        for front in self._fronts:
            front.signal(signal.SIGTERM)

    async def reload(self) -> bool:
        """Have new pools serve, one front after the other; whether all did. The first that can't ends it."""
        async with self._reloading:
            if self._draining:
                return False
            self._notifier.reloading()
            try:
                return self._read_settings_again() and await self._reload_fronts()
            finally:
                if not self._draining:
                    self._notifier.ready(self._reload_error or f"serving at {self.listeners}")

    async def _reload_fronts(self) -> bool:
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
            # Else a front would keep its certificate, and have a new app, which the others would not.
            make_tls(self._settings.tls_cert, self._settings.tls_key)
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

    async def _keep(self, front: FrontHandle) -> None:
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

    def gone(self, index: int, pid: int) -> None:
        """A front has ended: its numbers stay, its room does not."""
        if self._fronts[index].pid == pid:
            self._room.forget(index)
        self._sums.retire(pid)

    def take(self, pid: int, numbers: Numbers) -> None:
        """A front has told its numbers."""
        self._sums.take(pid, numbers)

    def setup(self, index: int, settings: Settings) -> Setup:
        """What a front is told first."""
        return Setup(settings, index, [sock.fileno() for sock in self.listeners.sockets], self._room.fd)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done, and log what it raises."""
        self._background.spawn(work)

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
        try:
            admin.listen([self.admin_socket])
        except OSError as error:
            raise ConfigurationError(f"the admin address can't be listened at: {error}") from error
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
