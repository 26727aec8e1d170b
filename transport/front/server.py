"""The sockets that a front listens at, and its connections: how many there may be, and how they come to their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Final

from runner.platform.deadlines import DeadlinesByTime
from transport.front.connection import Connection
from transport.front.exchange import Exchange
from transport.front.forwarded import Forwarded
from transport.gateway.router import Asked
from transport.problem_details import refusal

SURPLUS: Final = 100
"""How many connections beyond the limit are answered with a 503; more are dropped at once."""

_BUSY: Final = "there are too many connections"

_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""Errors of accept(2) that pass: somebody has to close something first."""

_ACCEPT_PAUSE: Final = 1.0
"""Seconds until the next try then."""

_DEFER: Final = 0.01
_DEFERS: Final = 100
"""Seconds that a connection is left to another process, and how often: that one may be stopped, or hang."""

HANDSHAKE_SECONDS: Final = 10.0
"""Seconds that a client has for the handshake of TLS."""

_BACKLOG: Final = 2048
"""Connections that the kernel keeps until they are accepted (listen(2))."""


MakeExchange = Callable[[Connection, Asked], Exchange]
"""What makes the exchange that answers a request."""


class Front:
    """Serves HTTP/1.1, in the running asyncio loop. `make` makes what answers a request.

    At most `most` connections are served. A client that does not take what is sent to it within `send_timeout` seconds
    is dropped. `refused` is told of what is no request: whose, the status, why. `forwarded` tells who the clients are.
    Where `may_accept` says no, another process at the same sockets takes the connection. `after` gives what calls back
    after so many seconds. With `tls` clients speak TLS; another context holds for those that connect from then on.
    """

    def __init__(
        self,
        make: MakeExchange,
        *,
        most: int,
        send_timeout: float,
        refused: Callable[[str, int, str], object] = lambda client, status, reason: None,
        forwarded: Forwarded | None = None,
        may_accept: Callable[[], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.tls = tls
        self.scheme = "http" if tls is None else "https"
        self.forwarded = forwarded
        self.tell_refused = refused
        self._deadlines = DeadlinesByTime(self.loop)
        self.after = self._deadlines.after
        self.stalls = self.after(send_timeout)
        self._send_timeout = send_timeout
        self._dropped = 0
        self.connections: set[Connection] = set()
        self.draining = False
        self.idle_grace = 0.0
        self._make = make
        self._may_accept = may_accept
        self._deferred = 0
        self._deferred_at = 0.0
        self._most = most
        self._listeners: list[socket.socket] = []
        self._arriving: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    def listen(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections at these sockets, from now on. They are closed by `drain`."""
        for sock in sockets:
            sock.setblocking(False)
            sock.listen(_BACKLOG)
            self._listeners.append(sock)
        self._begin_accepting()

    def drain(self, idle_grace: float = 0.0) -> None:
        """Accept nothing more, and end each connection after its answer; the idle ones after so many seconds.

        A client may have sent a request on an idle one that is still on its way.
        """
        self.draining = True
        self.idle_grace = idle_grace
        self._stop_accepting()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                while self._take_one(listener):
                    pass  # who has connected is served, if he has something to say
            listener.close()
        for connection in list(self.connections):
            connection.shut_down()

    def hurry(self, seconds: float) -> None:
        """Break off what is left after so many seconds, whatever it waits for."""
        for connection in list(self.connections):
            self.loop.call_later(seconds, connection.abort)

    async def wait_closed(self, seconds: float) -> None:
        """After `drain`: until there is no connection, or so many seconds; those that are left are broken off."""
        if self._arriving:
            _, late = await asyncio.wait(self._arriving, timeout=max(self.idle_grace, _DEFER))
            for task in late:  # it has not even said whom it wants to speak to
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        try:
            await asyncio.wait_for(self._wait_empty(), seconds)
        except TimeoutError:
            for connection in list(self.connections):
                connection.abort()
            await self._wait_empty()
        self._deadlines.close()

    async def _wait_empty(self) -> None:
        while self.connections:
            self._empty.clear()
            await self._empty.wait()

    # -- accepting -----------------------------------------------------------------------------------

    def _begin_accepting(self) -> None:
        self._pause = None
        for listener in self._listeners:
            self.loop.add_reader(listener, self._accept, listener)

    def _stop_accepting(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for listener in self._listeners:
            self.loop.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take a connection: one at a time, so that other processes at the same socket get theirs."""
        if self._may_accept is not None:
            now = self.loop.time()
            if now > self._deferred_at + 3 * _DEFER:
                self._deferred = 0  # what was left to others was taken
            if not self._may_accept() and self._deferred < _DEFERS:
                self._deferred += 1
                self._deferred_at = now
                self._stop_accepting()
                self._pause = self.loop.call_later(_DEFER, self._begin_accepting)
                return
            self._deferred = 0
        try:
            self._take_one(listener)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self.loop.call_exception_handler({"message": "a connection can't be accepted", "exception": error})
            self._stop_accepting()
            self._pause = self.loop.call_later(_ACCEPT_PAUSE, self._begin_accepting)

    def _take_one(self, listener: socket.socket) -> bool:
        """Accept one that waits; whether there may be more. OSError where nothing can be accepted."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionAbortedError:
            return True
        if len(self._arriving) > self._most + SURPLUS:
            sock.close()
            if not self._dropped:
                self.loop.call_later(1.0, self._tell_dropped)
            self._dropped += 1
            return True
        sock.setblocking(False)
        task = self.loop.create_task(self._take_in(sock))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)
        return True

    def _tell_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        self.tell_refused("", 503, f"{dropped} connections were dropped: too many handshakes are under way")

    async def _take_in(self, sock: socket.socket) -> None:
        if self.tls is not None:
            await self._take_in_by_tls(sock, self.tls)
            return
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self), sock)
        except OSError:  # it has gone already
            sock.close()

    async def _take_in_by_tls(self, sock: socket.socket, tls: ssl.SSLContext) -> None:
        client = ""
        try:
            client = _host_of(sock.getpeername())
            await self.loop.connect_accepted_socket(
                lambda: Connection(self),
                sock,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=self._send_timeout,
            )
        except OSError as error:  # ssl.SSLError is one
            sock.close()
            self.tell_refused(client, 400, f"no TLS: {getattr(error, 'reason', None) or error}")

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

    def take(self, connection: Connection, asked: Asked) -> Exchange:
        """A request of a connection's: what answers it."""
        if len(self.connections) <= self._most:
            return self._make(connection, asked)
        self.tell_refused(asked.client[0] if asked.client else "", 503, _BUSY)
        return _Busy(connection, asked)


class _Busy(Exchange):
    """Answers that there are too many connections."""

    backlog = 0

    def begin(self) -> None:
        """Answer at once, and end the connection."""
        self.keep_alive = False
        head, body = refusal(503, {"detail": _BUSY}, [("retry-after", "1")])
        self.answer(head, b"" if self.asked.method == "HEAD" else body, ended=True)

    def take_body(self, data: bytes) -> None:
        """It is for nobody."""

    def take_body_end(self) -> None:
        """It is for nobody."""

    def abandon(self) -> None:
        """There is nothing under way."""
        self.end()


def _host_of(address: object) -> str:
    """The host of a socket's address; empty on a unix socket."""
    return str(address[0]) if isinstance(address, tuple) else ""
