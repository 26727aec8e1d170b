"""A front in its parent: its process, one after the other, and the line to it."""

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
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, Protocol

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
from transport.serving.settings import Settings

logger = logging.getLogger("blastdoor")

_HOME: Final = str(Path(__file__).parents[2])
_ANSWER: Final = 3.0
"""Seconds that a front may take to tell its status."""

_RELOAD: Final = 600.0
"""Seconds that a front may take to reload."""


class ParentProtocol(Protocol):
    """What a front's handle knows of the parent."""

    loop: asyncio.AbstractEventLoop

    def setup(self, index: int, settings: Settings) -> Setup:
        """What a front is told first."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done, and log what it raises."""

    def take(self, pid: int, numbers: Numbers) -> None:
        """A front has told its numbers."""

    def gone(self, index: int, pid: int) -> None:
        """A front has ended."""


class FrontHandle:
    """A front, by its number: the process that it is now, if any, and what that has told."""

    def __init__(self, parent: ParentProtocol, index: int) -> None:
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
        setup = self._parent.setup(self.index, settings)
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
            self._parent.gone(self.index, pid)
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
