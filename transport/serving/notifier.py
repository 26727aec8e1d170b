"""What systemd is told: that the service is ready, reloads, stops, and lives (sd_notify(3), sd_watchdog_enabled(3))."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import MutableMapping

logger = logging.getLogger("blastdoor")


class Notifier:
    """Tells whoever has started this process, by the socket that it has named; nobody where it has named none."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        """The variables that name it are taken out of `environ`, so that no worker finds them."""
        environ = {} if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        for_us = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        self._interval = int(microseconds) / 2e6 if for_us else 0.0

    def ready(self, status: str) -> None:
        """It serves, anew perhaps."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It reloads, until it is ready."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It takes no more requests."""
        self._tell("STOPPING=1", "STATUS=draining")

    async def keep_alive(self) -> None:
        """Say that the event loop lives, twice in the time that the watchdog allows."""
        while self._interval and self._address:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._interval)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            logger.warning("NOTIFY_SOCKET: %s can't be told: %s", lines[0], error)
