"""One connection of a client, as uvicorn has it, with the bounds that uvicorn leaves to a proxy in front of it.

- A head has to come within `HEAD_SECONDS`; of a head, of trailers or of chunks' sizes `MOST_HEAD` bytes may come that
  make nothing complete. Slow or endless ones are answered and cut off. Trailers are dropped: they are no headers.
- At most `PIPELINED` requests wait behind the one that is being answered.
- A client that does not take what is sent to it within `send_timeout` seconds is dropped, also one that is closed.
- A client that has sent all of its request and closed its half of the connection (shutdown(2)) gets its answer. From
  here it looks like one that has gone. Something sent to it tells them apart: the kernel of a client that has gone
  resets the connection, which ends the job. That is an interim response before the head (RFC 9110, 15.2), and after it
  a zero that the next chunk's size begins with (RFC 9112, 7.1). In a body of known length only what the handler writes
  can tell. The same is done where reading is paused and could not tell that the client has gone; before the head every
  `PROBE_SECONDS`, since the end of what it sends may be stuck behind what nobody takes.
- After an answer that did not wait for the end of the request's body the rest of that is taken for `LINGER` seconds,
  so that the client can read the answer before the connection is reset (RFC 9112, 9.6).
- No answer of the server's own, and no probe, is ever written into another answer.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from transport.gateway.protocol import EXTENSION
from transport.problem_details import refusal
from transport.serving.cycle import Cycle
from transport.serving.disconnect import DisconnectWatch, WatchedFlow

HEAD_SECONDS: Final = 10.0
MOST_HEAD: Final = 64 * 1024
PIPELINED: Final = 256
LINGER: Final = 5.0
PROBE_SECONDS: Final = 5.0

SURPLUS: Final = 100
"""How many connections beyond the limit are answered with a 503; more are dropped at once."""

_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_ZERO: Final = b"0"
_METHOD: Final = re.compile(rb"(?:\r\n)*[!#$%&'*+\-.^_`|~0-9A-Za-z]+ ")
_RESET: Final = struct.pack("ii", 1, 0)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, bounded. What uvicorn gives comes after what is our own."""

    def __init__(
        self,
        send_timeout: float,
        most: int,
        *args: Any,
        told: Callable[[str, int, str], object] = lambda client, status, reason: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._told = told
        self._send_timeout = send_timeout
        self._most = most
        self._stall: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_size = 0
        self._progress = False
        self._fruitless = 0
        self._answered: RequestResponseCycle | None = None
        self._on_lost: Callable[[], object] | None = None
        self._vigil: DisconnectWatch | None = None
        self._next_probe: asyncio.TimerHandle | None = None
        self._complaint: tuple[int, str] | None = None
        self._upgrading = False
        self._replaying = False
        self._data = self._rest = b""

    # -- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: the time of its first head begins."""
        super().connection_made(transport)
        self.flow = WatchedFlow(transport, self._watch)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of anything that has not left
        if len(self.connections) > self._most + SURPLUS:
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come, of what completes nothing no more than there may be."""
        if self._timer is None and self._is_idle():
            self._await_head()
        while data:
            self._progress = False
            self._data, self._rest = data, b""
            super().data_received(data)
            self._fruitless = 0 if self._progress else self._fruitless + len(data)
            if self._fruitless > MOST_HEAD:
                self._refuse(431, f"over {MOST_HEAD} bytes of head, or of trailers")
            data = b"" if self.transport.is_closing() else self._rest  # what follows an upgrade that is not made
        self._data = self._rest = b""

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more. Whether the connection stays open for what it is still to be sent."""
        cycle = self._answered
        if cycle is None or cycle.response_complete or self._in_head or self.cycle.more_body or self.scheme == "https":
            return None
        if not cycle.response_started and cycle.scope["http_version"] == "1.0":
            return None  # it knows no interim responses, and is taken to have gone
        self.cycle.keep_alive = False
        if self._vigil is None:
            self._vigil = DisconnectWatch(self.loop, self.transport, half_closed=None)
            self._probe()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: whoever works for this client is told."""
        self._end_timer()
        self._end_stall()
        if self._vigil is not None:
            self._vigil.end()
        if self._next_probe is not None:
            self._next_probe.cancel()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._lost()

    def pause_writing(self) -> None:
        """Something waits to be sent: it has to leave."""
        super().pause_writing()
        self._end_stall()
        self._stall = self.loop.call_later(self._send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """All has left."""
        self._end_stall()
        super().resume_writing()

    # -- httptools -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._replaying:
            return
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests wait for their turn")  # ends the parsing: see `send_400_response`
        super().on_message_begin()
        self._in_head = True
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        if self._replaying:
            return
        self._add_to_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer, which no handler may take for one."""
        if self._in_head:
            self._add_to_head(len(name) + len(value) + 4)
            super().on_header(name, value.strip(b" \t"))  # RFC 9110, 5.5: the blanks are no part of it

    def on_headers_complete(self) -> None:
        """A head is there."""
        if self._replaying:
            return
        self._check_head()
        self._upgrading = self.parser.should_upgrade()
        self._in_head = False
        self._progress = True
        self._end_timer()
        self._take_authority()
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False
        extensions: dict[str, Any] = {EXTENSION: self}
        self.scope["extensions"] = extensions
        super().on_headers_complete()
        self.cycle.__class__ = Cycle
        if not self.pipeline:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request is there."""
        if self._upgrading:
            return  # it is the end of its head, see `_unsupported_upgrade_warning`
        self._progress = True
        if self.cycle.response_complete:  # the rest of a body, after its answer
            self.cycle.more_body = False
            self._end_timer()
            self._await_head()
        super().on_message_complete()

    # -- uvicorn -------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer was sent."""
        self._on_lost = None
        unread = not self.pipeline and self.cycle.more_body
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if following is not None:
            self._answered = following
        if self.pipeline:
            self.flow.pause_reading()
        if unread:
            self._end_timer()
            self._timer = self.loop.call_later(LINGER, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What has come is no request, or one with too long a head."""
        if self._in_head and self._head_size > MOST_HEAD:
            self._refuse(431, f"the request's head is over {MOST_HEAD} bytes")
        elif self._complaint is not None:
            self._refuse(*self._complaint)
        elif isinstance(sys.exc_info()[1], httptools.HttpParserInvalidMethodError) and _METHOD.match(self._data):
            self._refuse(501, "the method is none that this server knows (RFC 9110, 9.1)")
        else:
            self._refuse(400, msg)

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is asked for is not made: the message goes on as any other (RFC 9110, 7.8).

        The parser takes what follows such a head for another protocol's: a new one reads on, after a head that frames
        the same body, and asks for nothing.
        """
        error = sys.exc_info()[1]
        assert isinstance(error, httptools.HttpParserUpgrade)
        self._rest = self._data[error.args[0] :]
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        version = self.parser.get_http_version().encode()
        head = b"POST / HTTP/%b\r\n%b\r\n" % (version, b"".join(b"%b: %b\r\n" % pair for pair in framing))
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self._replaying = True
        try:
            self.parser.feed_data(head)
        finally:
            self._replaying = False

    # -- transport.gateway.app.Connection ------------------------------------------------------------

    def whole_body(self) -> int | None:
        """How many bytes the body of the request under way has, where all of it has come."""
        cycle = self._answered
        return None if cycle is None or cycle.more_body else len(cycle.body)

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once the connection is lost, during the request under way."""
        self._on_lost = callback
        if self.transport.is_closing():
            self._lost()

    def break_off(self) -> None:
        """The answer under way comes to no end: a probe that was sent in it must not be taken for one."""
        by_close = isinstance(self._answered, Cycle) and self._answered.ended_by_close
        if (self._vigil is not None or by_close) and not self.transport.is_closing():
            sock: socket.socket = self.transport.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()

    # ------------------------------------------------------------------------------------------------

    def _add_to_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MOST_HEAD:
            raise ValueError("the head is too long")

    def _check_head(self) -> None:
        """Refuse what the parser lets pass. ValueError ends the parsing: see `send_400_response`."""
        codings = b",".join(value for name, value in self.headers if name == b"transfer-encoding")
        if codings and codings.strip(b" \t").lower() != b"chunked":
            self._complaint = 501, "of transfer codings only chunked is known (RFC 9112, 6.1)"
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._complaint = 400, f"a request has one Host header, not {hosts} (RFC 9112, 3.2)"
        if self._complaint is not None:
            raise ValueError(self._complaint[1])

    def _take_authority(self) -> None:
        """The host of a target in absolute form counts, whatever the Host header says (RFC 9112, 3.2.2)."""
        if self.url.startswith((b"/", b"*")):
            return
        _, mark, rest = self.url.partition(b"://")
        if mark:
            place = re.split(b"[/?#]", rest, maxsplit=1)[0]
            if not rest[len(place) :].startswith(b"/"):  # no path: RFC 9112, 3.2.4, and RFC 9110, 4.2.3
                whole = self.parser.get_method() == b"OPTIONS" and len(place) == len(rest)
                self.url = b"*" if whole else b"/" + rest[len(place) :]
            authority = place.rpartition(b"@")[2]
            self.headers[:] = [(b"host", authority), *(pair for pair in self.headers if pair[0] != b"host")]

    def _is_idle(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _watch(self) -> None:
        """Reading is paused: a client that goes away meanwhile is heard of otherwise, from now on."""
        if self._vigil is None and self.scheme != "https":
            self._vigil = DisconnectWatch(self.loop, self.transport, half_closed=self._probe)
        if self._next_probe is None:
            self._next_probe = self.loop.call_later(PROBE_SECONDS, self._probe_again)

    def _probe_again(self) -> None:
        self._next_probe = None
        if self.flow.read_paused and self._answered is not None and not self._answered.response_started:
            self._probe()
            self._next_probe = self.loop.call_later(PROBE_SECONDS, self._probe_again)

    def _probe(self) -> None:
        """Send what does no harm to a client that listens, and is answered by a reset where nobody does."""
        cycle = self._answered
        if cycle is None or cycle.response_complete:
            return
        if cycle.response_started:
            if cycle.chunked_encoding:
                self.transport.write(_ZERO)
        elif cycle.scope["http_version"] != "1.0":
            self.transport.write(_INTERIM)

    def _lost(self) -> None:
        callback, self._on_lost = self._on_lost, None
        if callback is not None:
            callback()

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _head_is_late(self) -> None:
        if self._in_head:
            self._refuse(408, f"the request's head took longer than {HEAD_SECONDS:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer in the server's own name, and close; without an answer where that could be taken for another's."""
        self._end_timer()
        self._in_head = False
        if self.transport.is_closing():
            return
        cycle = self._answered
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or cycle is not self.cycle or not cycle.more_body:
                self.transport.abort()
                return
            cycle.disconnected = True  # it is the one that is refused, in the midst of its body
        self._told(self.client[0] if self.client else "", status, detail)
        head, body = refusal(status, {"detail": detail}, [("connection", "close")])
        lines = [f"HTTP/1.1 {head.status} {head.reason}", *(f"{name}: {value}" for name, value in head.headers)]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.transport.close()
