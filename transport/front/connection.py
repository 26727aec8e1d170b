"""One connection of a client: its requests are answered one after the other, each in its time.

| state | what is awaited | no longer than | then |
| --- | --- | --- | --- |
| IDLE | the first byte of a head | `KEEP_ALIVE`; for the first one `HEAD_SECONDS` | HEAD |
| HEAD | the rest of a head | `HEAD_SECONDS` | BODY, or ANSWER where there is no body |
| BODY | the rest of the request; the answer may have begun | the exchange's patience | ANSWER; LINGER if answered |
| ANSWER | the end of the answer | `send_timeout`, where the client takes nothing | what has come of the next one |
| LINGER | the rest of a request that is answered, for nobody | `LINGER` | what has come of the next one |
| OVER | nothing: what is left is sent | `send_timeout` | the end |

- At most `PIPELINED` requests wait behind the one that is being answered; nothing is read then.
- What is no request is answered once all before it is, and ends the connection (RFC 9112, 9.3.2 and 2.2).
- A client that has sent all of its request and closed its half of the connection (shutdown(2)) gets its answer. From
  here it looks like one that has gone. Something sent to it tells them apart: the kernel of a client that has gone
  resets the connection, which ends the job. That is an interim response before the head (RFC 9110, 15.2), and after it
  a zero that the next chunk's size begins with (RFC 9112, 7.1). In a body of known length only what the handler writes
  can tell. The same is done where reading is paused and could not tell that the client has gone; before the head every
  `PROBE_SECONDS`, since the end of what it sends may be stuck behind what nobody takes.
- The rest of a body whose request is answered is taken for a while, so that the client can read the answer before the
  connection is reset (RFC 9112, 9.6).
- No answer of the server's own, and no probe, is ever written into another answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Final, Protocol

from runner.wire.messages import Header
from transport.front.disconnect import DisconnectWatch
from transport.front.heads import CONTINUE, Framing, head_bytes
from transport.front.request_reader import NoRequest, RequestReader
from transport.gateway.router import Asked
from transport.problem_details import refusal

if TYPE_CHECKING:
    from runner.platform.deadlines import Deadline, Deadlines
    from transport.front.exchange import Exchange
    from transport.front.forwarded import Forwarded

logger = logging.getLogger("blastdoor")

KEEP_ALIVE: Final = 5.0
_TICK: Final = 0.25
"""Seconds, to which what is left of a connection's idle time is rounded up."""

HEAD_SECONDS: Final = 10.0
PIPELINED: Final = 256
LINGER: Final = 5.0
MOST_DROPPED: Final = 1024 * 1024
"""Bytes that are taken for nobody from a connection that is to end."""

PROBE_SECONDS: Final = 5.0
AHEAD: Final = 64 * 1024
"""Bytes of a body that may wait to be taken; then nothing is read."""

_GOODBYE: Final = 1.0
"""Seconds that a client has for its goodbye by TLS, once all was sent."""

_ZERO: Final = b"0"
_RESET: Final = struct.pack("ii", 1, 0)


class State(IntEnum):
    """What a connection awaits; see above."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    LINGER = auto()
    OVER = auto()


class FrontProtocol(Protocol):
    """What a connection knows of the front that it is made to."""

    loop: asyncio.AbstractEventLoop
    scheme: str
    forwarded: Forwarded | None
    stalls: Deadlines
    draining: bool
    idle_grace: float
    tell_refused: Callable[[str, int, str], object]

    def add(self, connection: Connection) -> bool:
        """One more; whether it is to be served, or refused, at all."""

    def remove(self, connection: Connection) -> None:
        """One less."""

    def take(self, connection: Connection, asked: Asked) -> Exchange:
        """A request has come: what answers it."""

    def after(self, seconds: float) -> Deadlines:
        """What calls back after so many seconds."""


class Connection(RequestReader):
    """A connection of a client to a front. The first of `_exchanges` is being answered, the others wait behind it."""

    def __init__(self, front: FrontProtocol) -> None:
        super().__init__()
        self._front = front
        self.loop = front.loop
        self._exchanges: deque[Exchange] = deque()
        self._incoming: Exchange | None = None
        self._state = State.HEAD
        self._deadline: Deadline | None = None
        self._stall: Deadline | None = None
        self._idle_since = 0.0
        self._idle_timer: Deadline | None = None
        self._refusal: NoRequest | None = None
        self._client: tuple[str, int] | None = None
        self._behind_proxy = False
        self._server = ("localhost", 80)
        self._reading = True
        self._deaf = self._half_closed = self._probed = False
        self._dropped = 0
        self._held = False
        self.write: Callable[[bytes], None] = _drop
        self._watch: DisconnectWatch | None = None
        self._next_probe: asyncio.TimerHandle | None = None
        self._goodbye: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        """What it awaits."""
        return self._state

    @property
    def waiting(self) -> int:
        """How many requests wait behind the one that is being answered."""
        return max(len(self._exchanges) - 1, 0)

    @property
    def watched(self) -> bool:
        """Whether its going is heard of otherwise than by reading."""
        return self._watch is not None

    # -- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # of a stream
        """A client has connected."""
        self._transport = transport
        self.write = transport.write
        own = transport.get_extra_info("sockname")
        self._client = _address(transport.get_extra_info("peername"))
        if self._front.forwarded is not None:
            self._client, self._behind_proxy = self._front.forwarded.peer(
                self._client, unix=isinstance(own, (str, bytes))
            )
        self._server = _address(own) or self._server
        # So that `pause_writing` tells of anything that has not left. One of TLS takes the limit itself as over it.
        transport.set_write_buffer_limits(high=0 if transport.can_write_eof() else 1)
        if not self._front.add(self):
            self._end()
            transport.abort()
            return
        self._enter(State.IDLE, self._front.idle_grace if self._front.draining else HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Take what has come, of what completes nothing no more than there may be."""
        if self._deaf or self._ended:
            self._dropped += len(data)
            if self._dropped > MOST_DROPPED:
                self._transport.abort()
            return
        self._read(data)
        if self._exchanges or self._refusal is not None:
            self._begin_next()
        elif self._state is State.IDLE and (self._in_head or not self._progress):
            self._enter(State.HEAD, HEAD_SECONDS)

    def eof_received(self) -> bool | None:
        """The client sends no more. Whether the connection stays open for what it is still to be sent."""
        exchanges = self._exchanges
        if not exchanges or self._incoming is not None or self._ended:
            return None
        if not self._transport.can_write_eof():
            return None  # by TLS asyncio closes both halves
        self._deaf = self._deaf or self._in_head  # of a request that is cut off nothing is answered
        self._in_head = False
        current = exchanges[0]
        if not current.started and current.http_1_0:
            return None  # it knows no interim responses, and is taken to have gone
        self._half_closed = True
        if self._refusal is None:  # else that is still to be told, after these
            exchanges[-1].keep_alive = False
        if self._watch is None:
            self._watch = DisconnectWatch(self.loop, self._transport, half_closed=None)
            self._probe()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: whoever works for this client is told."""
        self._end()
        self._end_deadline()
        self._end_stall()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._watch is not None:
            self._watch.end()
        if self._next_probe is not None:
            self._next_probe.cancel()
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._front.remove(self)
        exchanges, self._exchanges = self._exchanges, deque()
        self._incoming = self._parser = None
        for exchange in exchanges:
            if exchange.begun and not exchange.complete:
                exchange.abandon()

    def pause_writing(self) -> None:
        """Something waits to be sent: it has to leave."""
        self._end_stall()
        self._stall = self._front.stalls.start(self._transport.abort)
        self._held = True
        if self._exchanges and self._exchanges[0].begun:
            self._exchanges[0].hold()

    def resume_writing(self) -> None:
        """All has left."""
        self._end_stall()
        self._held = False
        if self._exchanges and self._exchanges[0].begun:
            self._exchanges[0].go_on()
        elif self._exchanges:
            self._begin_soon()

    # -- RequestReader -------------------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        return len(self._exchanges) > PIPELINED

    def _take_request(
        self, method: str, target: str, headers: list[Header], length: int | None, *, http_1_0: bool, keep_alive: bool
    ) -> None:
        front = self._front
        scheme, client = front.scheme, self._client
        if self._behind_proxy and front.forwarded is not None:
            client, scheme = front.forwarded.resolve(client, headers, scheme)
        asked = Asked(method, target.partition("?")[0], target, headers, scheme, self._server, client, length)
        exchange = front.take(self, asked)
        if http_1_0:
            exchange.http_1_0 = True
        else:
            exchange.keep_alive = keep_alive and not front.draining
            if length != 0:
                exchange.expects = asked.header("expect").lower() == "100-continue"
        self._incoming = exchange
        self._exchanges.append(exchange)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._progress = True
        exchange = self._incoming
        if exchange is not None and not exchange.complete and not self._ended:
            exchange.take_body(body)
            if exchange.backlog > AHEAD:
                self.update_reading()

    def _take_end(self) -> None:
        exchange, self._incoming = self._incoming, None
        if exchange is not None and not self._ended:
            exchange.whole = True
            exchange.expects = False  # the body is there: nobody has to be told to send it
            if exchange.complete:  # the rest of a body, after its answer
                self._await_next()
            else:
                exchange.take_body_end()

    def _is_last(self) -> bool:
        last = self._exchanges[-1] if self._exchanges else None
        return last is not None and last.whole and not last.keep_alive

    def _ignore_input(self) -> None:
        self._deaf = True

    def _give_up(self) -> None:
        self._transport.abort()

    def _refuse_input(self, refused: NoRequest) -> None:
        """Refuse once all that has come before is answered."""
        self._refusal = refused
        self._deaf = True
        self._in_head = False
        broken, self._incoming = self._incoming, None
        if broken is None:
            return
        if broken.complete:  # the rest of a request that is answered
            self._refusal = None
            self._close(unread=True)
        elif broken.started:
            self._transport.abort()
        else:
            self._exchanges.pop()
            if broken.begun:
                broken.abandon()

    # -- exchanges -----------------------------------------------------------------------------------

    def on_answered(self, exchange: Exchange) -> None:
        """The answer was written."""
        self._exchanges.popleft()
        if self._transport.is_closing() or self._ended:
            return
        if not exchange.keep_alive or (self._front.draining and not self._exchanges):
            self._close(unread=exchange is self._incoming)
        elif exchange is self._incoming:
            self._enter(State.LINGER, LINGER)
            self.update_reading()
        elif self._exchanges:
            self._begin_soon()
        else:
            self._await_next()

    def break_off(self) -> None:
        """The answer under way comes to no end, and is not to look as if it did: nor is a probe that was sent in it."""
        if self._transport.is_closing():
            return
        current = self._exchanges[0] if self._exchanges else None
        if self._probed or (current is not None and current.framing is Framing.CLOSE):
            sock: socket.socket = self._transport.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
        else:
            self._close()

    def update_reading(self) -> None:
        """Read, unless what has come already waits to be taken."""
        incoming = self._incoming
        read = len(self._exchanges) < 2 and (incoming is None or incoming.complete or incoming.backlog <= AHEAD)
        if read is self._reading or self._transport.is_closing():
            return
        self._reading = read
        if read:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
            self._watch_paused()

    def shut_down(self) -> None:
        """Take no more requests."""
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        elif self._state in (State.IDLE, State.HEAD) and self._front.idle_grace:
            self._enter(self._state, self._front.idle_grace)  # a request may be on its way, and is answered
        elif self._state is not State.OVER:
            self._close()

    def abort(self) -> None:
        """End it now."""
        self._transport.abort()

    def _begin_soon(self) -> None:
        """Have the next one answered: those behind one another take their turns without deep recursion."""
        self.loop.call_soon(self._begin_guarded)

    def _begin_guarded(self) -> None:
        try:
            self._begin_next()
        except Exception:
            logger.exception("a connection is broken off: answering a request failed")
            self._transport.abort()

    def _begin_next(self) -> None:
        """Have the first of the requests answered, if none is."""
        exchanges = self._exchanges
        if self._ended:
            return
        if exchanges and not self._transport.is_closing():
            current = exchanges[0]
            if not current.begun and self._held:
                self._end_deadline()
                self._state = State.ANSWER  # what was answered before has to leave first: see `resume_writing`
            elif not current.begun:
                current.begun = True
                if self._deadline is not None:
                    self._end_deadline()
                self._state = State.ANSWER if current.whole else State.BODY
                current.begin()
            elif current.whole and self._state is State.BODY:
                self._state = State.ANSWER
            if not self._reading or len(exchanges) > 1:
                self.update_reading()
        elif self._refusal is not None:
            self._refuse(self._refusal)

    def _await_next(self) -> None:
        """All that has come is answered."""
        if self._ended:
            return
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self._in_head:
            self._enter(State.HEAD, HEAD_SECONDS)
        else:
            self._idle()
        if not self._reading:
            self.update_reading()

    def _refuse(self, refused: NoRequest) -> None:
        """Answer in the server's own name, and close."""
        if self._transport.is_closing() or self._ended:
            return
        self._front.tell_refused(self._client[0] if self._client else "", refused.status, refused.detail)
        head, body = refusal(refused.status, {"detail": refused.detail})
        written, _, _ = head_bytes(head, head_only=False, chunks=True, keep_alive=False)
        self.write(written + body)
        self._close(unread=True)

    # -- time, and the end ---------------------------------------------------------------------------

    def _enter(self, state: State, seconds: float) -> None:
        self._state = state
        self._end_deadline()
        self._deadline = self._front.after(seconds).start(self._on_time_up)

    def _idle(self) -> None:
        """Nothing is under way. The time of the last request's idleness runs on, and is looked at when it is up."""
        self._end_deadline()
        self._state = State.IDLE
        self._idle_since = time.monotonic()
        if self._idle_timer is None:
            self._idle_timer = self._front.after(KEEP_ALIVE).start(self._on_idle_time_up)

    def _on_idle_time_up(self) -> None:
        self._idle_timer = None
        if self._state is State.IDLE:
            left = self._idle_since + KEEP_ALIVE - time.monotonic()
            if left <= 0:
                self._close()
            else:
                self._end_deadline()
                self._deadline = self._front.after(math.ceil(left / _TICK) * _TICK).start(self._on_time_up)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _on_time_up(self) -> None:
        self._deadline = None
        if self._state is State.HEAD and self._in_head:
            self._refuse(NoRequest(408, f"the request's head took longer than {HEAD_SECONDS:g} s"))
        elif self._state in (State.LINGER, State.OVER):
            self._transport.abort()
        else:
            self._close()

    def _close(self, *, unread: bool = False) -> None:
        """Have what is left sent, and close. Where the client may not have sent all, that is taken for a while."""
        transport = self._transport
        if transport.is_closing() or self._ended:
            return
        self._end()
        if unread and not self._half_closed and transport.can_write_eof():
            self._enter(State.OVER, LINGER)
            try:
                transport.write_eof()
            except OSError:  # it was reset
                transport.abort()
                return
            if not self._reading:
                self._reading = True
                transport.resume_reading()
        else:
            self._end_deadline()
            transport.close()
            if not transport.can_write_eof():
                self._goodbye = self.loop.call_later(_GOODBYE, self._say_no_more)

    def _say_no_more(self) -> None:
        """End a connection by TLS whose client does not say goodbye, as soon as nothing of ours is on its way to it."""
        sock: socket.socket = self._transport.get_extra_info("socket")
        try:
            unsent = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        except (OSError, ValueError):  # it has gone
            return
        if unsent:
            self._goodbye = self.loop.call_later(_GOODBYE, self._say_no_more)
        else:
            self._transport.abort()

    def _end(self) -> None:
        """Nothing more is taken, and nothing more is written."""
        self._state = State.OVER
        self._ended = True
        self.write = _drop

    # -- clients that go -----------------------------------------------------------------------------

    def _watch_paused(self) -> None:
        """Reading is paused: a client that goes away meanwhile is heard of otherwise, from now on."""
        if self._watch is None:
            self._watch = DisconnectWatch(self.loop, self._transport, half_closed=self._probe)
        if self._next_probe is None:
            self._next_probe = self.loop.call_later(PROBE_SECONDS, self._probe_again)

    def _probe_again(self) -> None:
        self._next_probe = None
        if not self._reading and self._exchanges and not self._exchanges[0].started:
            self._probe()
            self._next_probe = self.loop.call_later(PROBE_SECONDS, self._probe_again)

    def _probe(self) -> None:
        """Send what does no harm to a client that listens, and is answered by a reset where nobody does."""
        if not self._exchanges or self._transport.is_closing():
            return
        current = self._exchanges[0]
        if current.started:
            if current.framing is Framing.CHUNKED:
                self._probed = True
                self.write(_ZERO)
        elif not current.http_1_0:
            self.write(CONTINUE)


def _drop(data: bytes) -> None:
    """Write to nobody."""


def _address(told: object) -> tuple[str, int] | None:
    """A host and a port of a socket's address, None on a unix socket."""
    return (told[0], told[1]) if isinstance(told, tuple) and len(told) >= 2 else None
