"""The sockets that a front listens at, and its connections: how many there may be, and how they come to their end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from runner.platform.deadlines import Deadlines
from transport.front.connection import Connection
from transport.front.exchange import Exchange
from transport.front.forwarded import Forwarded
from transport.gateway.router import Asked
from transport.problem_details import refusal

SURPLUS: Final = 100
"""How many connections beyond the limit are answered with a 503; more are dropped at once."""

_BACKLOG: Final = 2048
"""Connections that the kernel keeps until they are accepted (listen(2))."""


class MakeExchange(Protocol):
    """What makes the exchange that answers a request."""

    def __call__(
        self, connection: Connection, asked: Asked, *, keep_alive: bool, http_1_0: bool, expects: bool
    ) -> Exchange: ...


class Front:
    """Serves HTTP/1.1, in the running asyncio loop. `make` makes what answers a request.

    At most `most` connections are served. A client that does not take what is sent to it within `send_timeout` seconds
    is dropped. `refused` is told of what is no request: whose, the status, why. `forwarded` tells who the clients are.
    """

    def __init__(
        self,
        make: MakeExchange,
        *,
        most: int,
        send_timeout: float,
        refused: Callable[[str, int, str], object] = lambda client, status, reason: None,
        forwarded: Forwarded | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.forwarded = forwarded
        self.tell_refused = refused
        self.stalls = Deadlines(self.loop, send_timeout)
        self.connections: set[Connection] = set()
        self.draining = False
        self._make = make
        self._most = most
        self._deadlines: dict[float, Deadlines] = {}
        self._servers: list[asyncio.Server] = []
        self._empty = asyncio.Event()

    async def listen(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections at these sockets, from now on."""
        for sock in sockets:
            made = await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=_BACKLOG)
            self._servers.append(made)

    def drain(self) -> None:
        """Accept nothing more, end the idle connections, and each other one after its answer."""
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.shut_down()
        if not self.connections:
            self._empty.set()

    async def wait_closed(self, seconds: float) -> None:
        """After `drain`: until there is no connection, or so many seconds; those that are left are broken off."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            for connection in list(self.connections):
                connection.abort()
            await self._empty.wait()
        self.stalls.close()
        for deadlines in self._deadlines.values():
            deadlines.close()

    # -- for its connections -------------------------------------------------------------------------

    def add(self, connection: Connection) -> bool:
        """One more; whether it is to be served, or refused, at all."""
        self.connections.add(connection)
        return len(self.connections) <= self._most + SURPLUS

    def remove(self, connection: Connection) -> None:
        """One less."""
        self.connections.discard(connection)
        if self.draining and not self.connections:
            self._empty.set()

    def take(
        self, connection: Connection, asked: Asked, *, keep_alive: bool, http_1_0: bool, expects: bool
    ) -> Exchange:
        """A request of a connection's: what answers it."""
        make = self._make if len(self.connections) <= self._most else _Busy
        return make(connection, asked, keep_alive=keep_alive, http_1_0=http_1_0, expects=expects)

    def after(self, seconds: float) -> Deadlines:
        """What calls back after so many seconds."""
        deadlines = self._deadlines.get(seconds)
        if deadlines is None:
            deadlines = self._deadlines[seconds] = Deadlines(self.loop, seconds)
        return deadlines


class _Busy(Exchange):
    """Answers that there are too many connections."""

    backlog = 0

    def begin(self) -> None:
        """Answer at once, and end the connection."""
        self.keep_alive = False
        head, body = refusal(503, {"detail": "there are too many connections"}, [("retry-after", "1")])
        self.answer(head, b"" if self.asked.method == "HEAD" else body, ended=True)

    def take_body(self, data: bytes) -> None:
        """It is for nobody."""

    def take_body_end(self) -> None:
        """It is for nobody."""

    def abandon(self) -> None:
        """There is nothing under way."""
        self.end()
