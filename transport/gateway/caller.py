"""The client of one request at the gateway: what it sends, and that it goes away.

One task listens to it all the time, so that its going is heard while the handler works; what it sends waits here, a
little of it, until the job takes it. A client that sends too slowly, or too much, is cut off: its body holds a worker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final

import anyio

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MIN_RATE: Final = 500
"""Bytes that a client has to send for each second that it is waited for, beyond the patience that it begins with."""

_AHEAD: Final = 256 * 1024


class BodyTooSlow(Exception):
    """The client sends less of its body than a worker can be kept waiting for."""


class BodyTooLarge(Exception):
    """The client sends more than the gateway takes."""


class ClientGone(Exception):
    """The client went away before the end of its body."""


class Caller:
    """Listens to a client. `leave` is called once it has gone.

    `patience` is how many seconds it may be waited for in all, not counting a second for each MIN_RATE bytes;
    `most` how many bytes its body may have. With `hold` nothing is read before the body is asked for
    (RFC 9110, 10.1.1: Expect).
    """

    def __init__(
        self, receive: Receive, leave: Callable[[], object], patience: float, most: int | None, *, hold: bool
    ) -> None:
        self._receive = receive
        self._leave = leave
        self._patience = patience
        self._most = most
        self._pieces: deque[bytes] = deque()
        self._waiting = 0
        self._received = 0
        self._ended = False
        self.gone = False
        self.held = hold
        self._arrived = anyio.Event()
        self._taken = anyio.Event()
        self._wanted = anyio.Event()
        if not hold:
            self._wanted.set()

    async def listen(self) -> None:
        """Take what the client sends, until it goes away."""
        await self._wanted.wait()
        while not self.gone:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.lost()
                return
            if piece := message.get("body", b""):
                self._received += len(piece)
                self._waiting += len(piece)
                self._pieces.append(piece)
            if not message.get("more_body", False):
                self._ended = True
            self._arrived.set()
            while self._waiting > _AHEAD and not self.gone:
                self._taken = anyio.Event()
                await self._taken.wait()

    def lost(self) -> None:
        """The client has gone; in the event loop's thread."""
        if not self.gone:
            self.gone = True
            self._arrived.set()
            self._taken.set()
            self._leave()

    async def whole(self) -> bytes:
        """All of a small body. Raises what `body` raises."""
        return b"".join([piece async for piece in self.body()])

    async def body(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BodyTooSlow, BodyTooLarge and ClientGone."""
        self._wanted.set()
        while True:
            if self._most is not None and self._received > self._most:
                raise BodyTooLarge
            if self._pieces:
                piece = self._pieces.popleft()
                self._waiting -= len(piece)
                self._taken.set()
                yield piece
            elif self._ended:
                return
            elif self.gone:
                raise ClientGone
            else:
                await self._wait()

    async def _wait(self) -> None:
        began, before = time.monotonic(), self._received
        self._arrived = anyio.Event()
        with anyio.move_on_after(max(self._patience, 0)):
            await self._arrived.wait()
        self._patience += (self._received - before) / MIN_RATE - (time.monotonic() - began)
        if self._patience <= 0 and not self._arrived.is_set():
            raise BodyTooSlow
