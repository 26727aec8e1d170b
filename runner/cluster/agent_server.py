"""What an agent serves its hosts over: connections of the pool's own, in one event loop, in a thread of the agent's.

Who connects has to show the secret before a frame of his is looked at, within seconds, and no more than a few may be on
their way at once. A connection is then a lane, which has one job after the other, as a worker's pipes have; or it is
for what is beside the jobs: pings, and cancels, which must not wait behind a body that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from ..jobs.poller import Poller
from .handshake import CONTROL, HELLO_SIZE, NONCE, Stranger, greeting, read_hello, welcome
from .lane_server import AgentProtocol, LaneServer
from .messages import Beside, Cancel

logger = logging.getLogger("blastdoor")

STRANGERS: Final = 256
"""Connections at once that have not shown the secret yet; more are dropped."""

HELLO_SECONDS: Final = 5.0
"""Seconds that a connection has for that."""

MOST_BESIDE: Final = 64 * 1024
"""The cap on a message of a host's that is beside the jobs, in bytes."""

_ACCEPT_PAUSE: Final = 0.2
_LENGTH: Final = struct.Struct("<I")
_decode_beside = msgspec.msgpack.Decoder(Beside).decode


class AgentServer:
    """Serves hosts at a port of this node's own address."""

    def __init__(self, agent: AgentProtocol, secret: bytes) -> None:
        self.agent = agent
        self.secret = secret
        self.lanes: dict[int, LaneServer] = {}
        self.strangers = 0
        self.connections: set[_Connection] = set()
        self._numbers = 0
        self._tell_again = 0.0
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self.port = 0

    def start(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Listen at this address, by TLS where that is given; gives the port. OSError where that can't be."""
        self._tls = tls
        self._thread = threading.Thread(target=self._run, args=(address,), name="blastdoor-wire", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self.port

    def close(self) -> None:
        """Listen no more, and end all connections and the thread."""
        self.call(self._over.set)
        self._thread.join()

    def tell_stranger(self, words: str) -> None:
        """Log that somebody was dropped, no more than once a second: hosts hear of it, and have to hear of others."""
        now = self.loop.time()
        if now >= self._tell_again:
            self._tell_again = now + 1.0
            logger.warning("a connection is dropped: %s", words)

    def call(self, step: Callable[[], object]) -> None:
        """Have something done in the loop's thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(step)

    def end_lanes_of(self, host: str, why: str) -> None:
        """End the jobs of a host, and its connections; from any thread."""

        def end() -> None:
            for lane in [lane for lane in self.lanes.values() if lane.host == host]:
                lane.end(why)

        self.call(end)

    def next_number(self) -> int:
        """A number for one more connection."""
        self._numbers += 1
        return self._numbers

    def in_thread(self, work: Callable[[], bytes], then: Callable[[bytes], object]) -> None:
        """Have something made in another thread, and go on with it in the loop's."""

        async def run() -> None:
            then(await asyncio.to_thread(work))

        self.begin(run())

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done that nobody waits for. In the loop's thread."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self, address: str) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve(address))
        except BaseException as error:
            if self._ready.is_set():
                logger.exception("the agent can't serve its hosts any more, and ends")
                os._exit(1)
            self._error = error
            self._ready.set()

    async def _serve(self, address: str) -> None:
        self.loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.poller = Poller(self.loop)
        listener = socket.create_server((address, 0), backlog=1024)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        accepting = self.loop.create_task(self._accept(listener))
        self._over = asyncio.Event()
        self._ready.set()
        try:
            await self._over.wait()
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            listener.close()
            for connection in list(self.connections):
                connection.abort()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)
            self.poller.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self.loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, say
                self.tell_stranger(str(error))
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if self.strangers >= STRANGERS:
                sock.close()
                continue
            self.strangers += 1
            self.begin(self._take_in(sock))

    async def _take_in(self, sock: socket.socket) -> None:
        """A connection has come: it is a stranger's until it has shown the secret."""
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.connect_accepted_socket(
                lambda: _Connection(self),
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HELLO_SECONDS,
            )
        except OSError as error:  # ssl.SSLError is one
            self.strangers -= 1
            self.tell_stranger(f"no TLS: {error}")
            sock.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return make


class _Connection(asyncio.Protocol):
    """A connection, before it is known what it is for and afterwards."""

    def __init__(self, server: AgentServer) -> None:
        self._server = server
        self._nonce = os.urandom(NONCE)
        self._hello = b""
        self._known: LaneServer | _ControlServer | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # of a stream
        """Somebody has connected."""
        self._transport = transport
        server = self._server
        server.connections.add(self)
        self._late = server.loop.call_later(HELLO_SECONDS, transport.abort)
        transport.write(greeting(self._nonce))

    def data_received(self, data: bytes) -> None:
        """What has come."""
        if self._known is not None:
            self._known.take(data)
            return
        self._hello += data
        if len(self._hello) < HELLO_SIZE:
            return
        try:
            if len(self._hello) > HELLO_SIZE:
                raise Stranger("a connection has said more than a hello")
            kind, host, nonce = read_hello(self._server.secret, self._nonce, self._hello)
        except (Stranger, UnicodeDecodeError) as stranger:
            self._server.tell_stranger(f"{self._transport.get_extra_info('peername')}: {stranger}")
            self._transport.abort()
            return
        self._no_stranger()
        number = self._server.next_number()
        known = _ControlServer if kind == CONTROL else LaneServer
        self._known = known(self._server, self._transport, host, number)
        self._transport.write(welcome(self._server.secret, nonce, number))

    def abort(self) -> None:
        """End it."""
        self._transport.abort()

    def eof_received(self) -> bool:
        """The host sends nothing more: so it has left."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._server.connections.discard(self)
        self._no_stranger()
        if self._known is not None:
            self._known.lost()

    def pause_writing(self) -> None:
        """The host does not take what was sent."""
        if self._known is not None:
            self._known.hold()

    def resume_writing(self) -> None:
        """It has taken it."""
        if self._known is not None:
            self._known.go_on()

    def _no_stranger(self) -> None:
        late, self._late = self._late, None
        if self._known is None and self._hello is not None:
            self._server.strangers -= 1
            self._hello = None  # type: ignore[assignment] # it was counted once
        if late is not None:
            late.cancel()


class _ControlServer:
    """What is beside the jobs, for one host: each message has its length before it."""

    def __init__(self, server: AgentServer, transport: asyncio.Transport, host: str, number: int) -> None:
        self._server = server
        self._transport = transport
        self._host = host
        self._buffer = bytearray()

    def take(self, data: bytes) -> None:
        """What has come."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer)
            if size > MOST_BESIDE:
                logger.warning("host %s has sent a message of %d bytes, over its cap", self._host[:8], size)
                self._transport.abort()
                return
            if len(buffer) < _LENGTH.size + size:
                return
            message = bytes(buffer[_LENGTH.size : _LENGTH.size + size])
            del buffer[: _LENGTH.size + size]
            try:
                self._on_message(_decode_beside(message))
            except msgspec.MsgspecError as error:
                logger.warning("host %s has sent a message that can't be read: %s", self._host[:8], error)
                self._transport.abort()
                return

    def _on_message(self, message: Beside) -> None:
        if isinstance(message, Cancel):
            lane = self._server.lanes.get(message.lane)
            if lane is not None and lane.host == self._host:
                lane.end("its caller has left")
            return
        agent, host = self._server.agent, self._host
        agent.heard_of(host)
        self._server.in_thread(lambda: agent.heartbeat(host, message.seen, message.level), self._send)

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(_LENGTH.pack(len(data)) + data)

    def lost(self) -> None:
        """The connection is over: the host makes another, or its lease will end."""

    def hold(self) -> None:
        """Heartbeats are small, and asked for one by one."""

    def go_on(self) -> None:
        """Nothing was held."""
