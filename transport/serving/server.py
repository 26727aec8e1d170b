"""`blastdoor serve`: pools, the gateway, the page of status, and the signals that drain and reload them.

The sockets are bound first, so that a port that is taken is told at once; then the pools start; only then is anybody
answered. SIGTERM and SIGINT drain: no new connections, `drain` seconds for the requests under way, then their jobs are
ended. SIGHUP reloads: each mount gets a new pool, which starts before the old one is let go of. Where it does not
start, the old one stays.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector

from runner.errors import BlastdoorError, ConfigurationError, StartError
from runner.jobs.poller import Poller
from runner.metrics import PoolMetrics
from transport.front.forwarded import Forwarded
from transport.front.pool_exchange import PoolExchange
from transport.front.server import Front
from transport.gateway.router import Router
from transport.serving.access_log import AccessLog, log_refused
from transport.serving.addresses import Listeners, bind_port, name_of
from transport.serving.admin import ADMIN_CONNECTIONS, ADMIN_PATIENCE, make_admin
from transport.serving.background import Background, on_signals
from transport.serving.http_metrics import RequestMetrics
from transport.serving.log_format import know_mount
from transport.serving.notifier import Notifier
from transport.serving.server_log import log_serving
from transport.serving.settings import PoolSettings, Settings
from transport.serving.status import Status
from transport.serving.tls import make_tls

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.serving.settings import MountSettings

logger = logging.getLogger("blastdoor")

_PATIENCE: Final = 86400.0
"""Seconds that the jobs of a pool that was replaced may take, unless the service ends."""

_OF_MOUNTS: Final = ("provider", "root", "source", "key_id", "attribution", "trusted_headers")
_OF_THE_SERVER: Final = tuple(
    name for name in Settings.__struct_fields__ if name not in {*PoolSettings.__struct_fields__, "app", "mounts"}
)
"""What only a restart takes: of a mount, and of the server."""

_IDLE_GRACE: Final = 1.0
"""Seconds that an idle connection is kept while the server drains: a request may be on its way on it."""

SETTLE: Final = 5.0
"""Seconds for what is left to be sent once the jobs under way were ended."""


class Service:
    """All that one `blastdoor serve` runs. ConfigurationError, or OSError for an address that can't be had."""

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings] | None = None,
        listeners: Listeners | None = None,
        may_accept: Callable[[], bool] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._notifier = Notifier() if notifier is None else notifier
        self._one_of_several = listeners is not None
        self._may_accept = may_accept
        self._settings = settings
        self._reread = reread
        self._defaults = settings.defaults
        self._mounts = settings.all_mounts
        self.gateway = Router(
            {path: mount.mount(path, self._defaults, settings.drain) for path, mount in self._mounts.items()},
            max_body=settings.max_body_bytes,
            body_timeout=settings.body_timeout,
        )
        self.status = Status(self.gateway, apps={path: mount.app for path, mount in self._mounts.items()})
        self.registry = CollectorRegistry()
        if not self._one_of_several:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
        self._metrics = PoolMetrics(self.registry)
        failed = Gauge(
            "blastdoor_last_reload_failed", "Whether the last reload of an app failed.", registry=self.registry
        )
        failed.set_function(lambda: bool(self.status.reload_error))
        RequestMetrics(self.gateway, self.registry)
        if settings.access_log:
            self.gateway.subscribe(AccessLog(settings.access_log_fields, queries=settings.access_log_queries))
        self._ends: dict[str, list[Callable[[], object]]] = {}
        self._reloading = asyncio.Lock()
        self._background = Background()
        self.front: Front | None = None
        self._served = ""
        self._drained = asyncio.Event()
        self._retired: set[AnyPool] = set()
        admin = None if self._one_of_several else settings.admin_address
        self.listeners = Listeners.of(settings) if listeners is None else listeners
        try:
            self._forwarded = Forwarded(settings.trusted_proxies)
            self._tls = make_tls(settings.tls_cert, settings.tls_key)
            self.admin_socket = None if admin is None else bind_port(*admin, "admin", "admin")
        except BaseException:
            self.listeners.close()
            raise

    @property
    def socket(self) -> socket.socket:
        """The first of the sockets that requests come to."""
        return self.listeners.sockets[0]

    async def run(self, started: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called, or a signal says so where this is the main thread.

        StartError where a handler can't be loaded: nothing is left running then.
        """
        pools = self.gateway.pools
        logger.addHandler(self.status.log)
        about_jobs = logger, logging.getLogger("blastdoor.worker")
        for one in about_jobs:
            one.addFilter(self.gateway.request_ids)
        try:
            with on_signals(self.stop, lambda: self._background.spawn(self.reload())):
                for path, pool in pools.items():
                    self._watch(path, pool)
                    if not self.status.draining:
                        await self._start(path, pool)
                if not self.status.draining:
                    await self._serve(started)
        except BlastdoorError:
            if not self.status.draining:  # else it was told to stop before it had started
                raise
        finally:
            await self._close_pools()
            await self._background.end()
            logger.removeHandler(self.status.log)
            for one in about_jobs:
                one.removeFilter(self.gateway.request_ids)
            self.listeners.close()
            if self.admin_socket is not None:
                self.admin_socket.close()
        if not self._one_of_several:
            logger.info("stopped")

    def stop(self) -> None:
        """Drain, and end; the second time at once. In the event loop's thread."""
        if self.status.draining:
            self._background.spawn(self._end_jobs(0))
            if self.front is not None:
                self.front.hurry(SETTLE)
            logger.warning("stopping at once")
            return
        self.status.draining = True
        self._notifier.stopping()
        self.listeners.unlink()  # now, while nobody can have taken the path over
        if self.front is None:
            logger.info("stopping before the start was over")
            self._background.spawn(self._close_pools())
            return
        self._drained.set()
        self._background.spawn(self._end_jobs(self._settings.drain))
        logger.info("draining: requests under way have %g s", self._settings.drain)

    async def reload(self) -> bool:
        """Have new pools serve the mounts; whether all could be started. One reload at a time, none at the end."""
        async with self._reloading:
            if not self._is_serving():
                return False
            self._notifier.reloading()
            try:
                whole = self._read_settings_again() & self._read_certificate_again()
                for path, mount in self._mounts.items():
                    if not self._is_serving():
                        return False
                    whole &= await self._reload(path, mount)
                if whole:
                    self.status.reload_error = ""
                return whole
            finally:
                if self._is_serving():
                    self._notifier.ready(self.status.reload_error or self._served)

    def _is_serving(self) -> bool:
        return self.front is not None and not self.status.draining

    def _read_settings_again(self) -> bool:
        """Take what the file says now of the pools; whether it makes sense. What else has changed is told."""
        if self._reread is None:
            return True
        try:
            settings = self._reread()
            mounts, defaults = settings.all_mounts, settings.defaults
            for path, mount in mounts.items():
                mount.pool_with(path, defaults)
        except ConfigurationError as error:
            logger.error("the settings can't be read again, those from before hold: %s", error)
            self.status.reload_error = "the settings can't be read again, and those from before hold: the log says why"
            return False
        waits = changed_for_restart(self._settings, settings)
        if waits:
            logger.warning("changed, and taken only by a restart: %s", ", ".join(waits))
        self._defaults = defaults
        self._mounts = {path: mounts.get(path, mount) for path, mount in self._mounts.items()}
        self.status.apps = {path: mount.app for path, mount in self._mounts.items()}
        return True

    def _read_certificate_again(self) -> bool:
        """Have those that connect from now on get the certificate that is in the files now; whether it makes sense."""
        try:
            tls = make_tls(self._settings.tls_cert, self._settings.tls_key)
        except ConfigurationError as error:
            logger.error("the certificate can't be read again, the one from before holds: %s", error)
            self.status.reload_error = "the certificate can't be read again, and the one from before holds"
            return False
        if self.front is not None and tls is not None:
            self.front.tls = tls
        return True

    async def _reload(self, path: str, mount: MountSettings) -> bool:
        began = time.monotonic()
        pool = mount.pool_with(path, self._defaults, self._settings.drain)
        before = self._ends[path]
        self._watch(path, pool)
        try:
            await asyncio.to_thread(pool.start)
        except BaseException as error:
            self._unwatch(self._ends[path])
            self._ends[path] = before
            await pool.aclose(drain=0)
            if not isinstance(error, BlastdoorError):
                raise
            logger.error("%s: the handler can't be reloaded, the old one goes on: %s", path, error)
            self.status.reload_error = f"{path}: the last reload failed, and the old app goes on: the log says why"
            return False
        old = self.gateway.replace(path, pool)
        logger.info("%s: reloaded in %.1f s", path, time.monotonic() - began)
        self._retired.add(old)
        self._background.spawn(self._retire(old, before))
        return True

    # ------------------------------------------------------------------------------------------------

    async def _start(self, path: str, pool: AnyPool) -> None:
        try:
            await asyncio.to_thread(pool.start)
        except StartError as error:
            raise StartError(f"{path}, {self._mounts[path].app}: {error}") from error

    async def _serve(self, started: Callable[[], object]) -> None:
        settings = self._settings
        poller = Poller(asyncio.get_running_loop())
        fronts = [
            Front(
                functools.partial(PoolExchange, self.gateway, poller),
                most=settings.connections,
                send_timeout=settings.send_timeout,
                refused=log_refused if settings.access_log else lambda *_: None,
                forwarded=self._forwarded,
                may_accept=self._may_accept,
                tls=self._tls,
            )
        ]
        try:
            if self.admin_socket is not None:
                pages = make_admin(self.status, self.registry, self.admin_socket.getsockname()[0])
                fronts.append(Front(pages, most=ADMIN_CONNECTIONS, send_timeout=ADMIN_PATIENCE))
                try:
                    fronts[1].listen([self.admin_socket])
                except OSError as error:
                    raise ConfigurationError(f"the admin address can't be listened at: {error}") from error
            try:
                fronts[0].listen(self.listeners.sockets)
            except OSError as error:  # two of its own addresses are one
                raise ConfigurationError(f"{self.listeners} can't be listened at: {error}") from error
            self._served = f"serving at {self.listeners}"
            self.front = fronts[0]
            if settings.reload:
                self._background.spawn(self._reload_on_changes())
            if not self._one_of_several:
                self._log_started()
            self._notifier.ready(self._served)
            self._background.spawn(self._notifier.keep_alive())
            started()
            await self._drained.wait()
            fronts[0].drain(min(_IDLE_GRACE, settings.drain))
            await fronts[0].wait_closed(settings.drain + SETTLE)
            for front in fronts[1:]:
                front.drain()
                await front.wait_closed(1)
        finally:
            poller.close()

    async def _end_jobs(self, seconds: float) -> None:
        """End the jobs that are still under way after so many seconds: their callers are told."""
        await asyncio.sleep(seconds)
        logger.warning("%d requests were not done in time, and are ended", self.gateway.active)
        await self._close_pools()

    async def _close_pools(self) -> None:
        for pool in [*self.gateway.pools.values(), *self._retired]:
            await pool.aclose(drain=0)

    async def _retire(self, pool: AnyPool, ends: list[Callable[[], object]]) -> None:
        """Let the jobs of a pool that was replaced come to their ends, however long they take."""
        await pool.aclose(drain=_PATIENCE)
        self._retired.discard(pool)
        self._unwatch(ends)

    def _watch(self, path: str, pool: AnyPool) -> None:
        known = know_mount(getattr(pool, "job_prefix", ""), path)
        ends: list[Callable[[], object]] = [known, self.status.watch(path, pool), self._metrics.watch(path, pool)]
        if "opentelemetry.trace" in sys.modules:
            from runner.traces import trace_jobs

            ends.append(trace_jobs(pool))
        self._ends[path] = ends

    @staticmethod
    def _unwatch(ends: list[Callable[[], object]]) -> None:
        for end in ends:
            end()

    async def _reload_on_changes(self) -> None:
        from watchfiles import PythonFilter, awatch

        logger.info("files below %s are watched", os.getcwd())
        async for changes in awatch(os.getcwd(), watch_filter=PythonFilter()):
            logger.info("changed: %s", ", ".join(sorted({os.path.relpath(path) for _, path in changes})[:5]))
            await self.reload()

    def _log_started(self) -> None:
        kinds = {path: getattr(pool, "kind", "") for path, pool in self.gateway.pools.items()}
        log_serving(self._settings, kinds, str(self.listeners))
        if self.admin_socket is not None:
            logger.info("status at %s/-/status", name_of(self.admin_socket))


def changed_for_restart(before: Settings, after: Settings) -> list[str]:
    """What has changed in the settings, and only a restart takes."""
    old, new = before.all_mounts, after.all_mounts
    waits = [f"mount {path}" for path in sorted(set(new) ^ set(old))]
    waits += [
        f"{name} of mount {path}"
        for path in sorted(set(new) & set(old))
        for name in _OF_MOUNTS
        if getattr(new[path], name) != getattr(old[path], name)
    ]
    waits += [name for name in _OF_THE_SERVER if getattr(after, name) != getattr(before, name)]
    return waits
