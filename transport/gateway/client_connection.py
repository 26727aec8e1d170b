"""The client of one request at the ASGI gateway: its body as the job takes it, and its going away.

A client that sends too slowly, or too much, is cut off: its body holds a worker. Its server tells of its going only to
who receives: `listen`, in a task, does so all the time, so that a little of the body is received ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final

import anyio

from transport.gateway.patience import Patience
from transport.gateway.router import BodyTooLarge, BodyTooSlow

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_AHEAD: Final = 256 * 1024


class ClientGone(Exception):
    """The client went away before the end of its body."""


class ClientConnection:
    """A client. `leave` is called once it has gone.

    `patience` is how many seconds it may be waited for, `most` how many bytes its body may have. With `hold` nothing is
    received before it is wanted (RFC 9110, 10.1.1: Expect). `asked` tells whether any of it was.
    """

    def __init__(
        self, receive: Receive, leave: Callable[[], object], patience: float, most: int | None, *, hold: bool
    ) -> None:
        self._receive = receive
        self._leave = leave
        self._patience = Patience(patience)
        self._most = most
        self._received = 0
        self._ended = False
        self.asked = False
        self.gone = False
        self._pieces: deque[tuple[bytes, bool]] = deque()
        self._waiting = 0
        self._arrived = anyio.Event()
        self._taken = anyio.Event()
        self._wanted = anyio.Event()
        if not hold:
            self._wanted.set()

    async def listen(self) -> None:
        """Take what the client sends, until it goes away."""
        await self._wanted.wait()
        more = True
        while not self.gone:
            self.asked = True
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._lost()
                return
            if not more:
                return  # a server that does not wait for the client to go: it is not heard of
            piece, more = message.get("body", b""), message.get("more_body", False)
            self._waiting += len(piece)
            self._pieces.append((piece, more))
            self._arrived.set()
            while self._waiting > _AHEAD:
                self._taken = anyio.Event()
                await self._taken.wait()

    def want(self) -> None:
        """Begin to listen, if that was held."""
        self._wanted.set()

    async def whole(self) -> bytes:
        """All of a small body. Raises what `body` raises."""
        return b"".join([piece async for piece in self.body()])

    async def body(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BodyTooSlow, BodyTooLarge and ClientGone."""
        while not self._ended:
            piece = await self._next_in_time()
            self._received += len(piece)
            if self._most is not None and self._received > self._most:
                raise BodyTooLarge
            if piece:
                yield piece

    def _lost(self) -> None:
        if not self.gone:
            self.gone = True
            self._leave()

    async def _next_in_time(self) -> bytes:
        with anyio.move_on_after(self._patience.begin()):
            piece = await self._next()
            self._patience.end(len(piece))
            return piece
        raise BodyTooSlow

    async def _next(self) -> bytes:
        self.want()
        while not self._pieces:
            if self.gone:
                raise ClientGone
            self._arrived = anyio.Event()
            await self._arrived.wait()
        piece, more = self._pieces.popleft()
        self._ended = not more
        self._waiting -= len(piece)
        self._taken.set()
        return piece
