"""One connection of a client, as uvicorn has it, with the bounds that uvicorn leaves to a proxy in front of it.

- A head has to come within `HEAD_SECONDS`, and in `MOST_HEAD` bytes: slow or endless ones are answered and cut off.
- A client that has sent all of its request and closed its half of the connection (shutdown(2)) gets its answer. From
  here it looks like one that has gone. Something sent to it tells them apart: the kernel of a client that has gone
  resets the connection, which ends the job. That is an interim response before the head (RFC 9110, 15.2), and after it
  a zero that the next chunk's size begins with (RFC 9112, 7.1). In a body of known length only what the handler writes
  can tell.
- A client that does not take what is sent to it is dropped, where so little leaves within `send_timeout` seconds that
  there is no room for more.
- After an answer that did not wait for the end of the request's body the rest of that is taken for `LINGER` seconds,
  so that the client can read the answer before the connection is reset (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from transport.faults import refusal
from transport.gateway.app import EXTENSION

HEAD_SECONDS: Final = 10.0
MOST_HEAD: Final = 64 * 1024
LINGER: Final = 5.0

_INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_ZERO: Final = b"0"


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, bounded. What uvicorn gives comes after our own `send_timeout`."""

    def __init__(self, send_timeout: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout = send_timeout
        self._stall: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], object] | None = None
        self._vigil: _Vigil | None = None

    # -- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: the time of its first head begins."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come, of a head no more than there may be."""
        if self._timer is None and self._is_idle():
            self._await_head()
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD:
                self._refuse(431, f"the request's head is over {MOST_HEAD} bytes")

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more. Whether the connection stays open for what it is still to be sent."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scheme == "https":
            return None
        if cycle.response_started:
            probe = _ZERO if cycle.chunked_encoding else b""
        elif self.scope.get("http_version") == "1.0":
            return None  # it knows no interim responses, and is taken to have gone
        else:
            probe = _INTERIM
        cycle.keep_alive = False
        self._vigil = _Vigil(self.loop, self.transport)
        self.transport.write(probe)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: whoever works for this client is told."""
        self._end_timer()
        self._end_stall()
        if self._vigil is not None:
            self._vigil.end()
        super().connection_lost(exc)
        self._lost()

    def pause_writing(self) -> None:
        """There is no room for more: what is there has to leave."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """There is room again."""
        self._end_stall()
        super().resume_writing()

    # -- httptools -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._in_head = False
        self._end_timer()
        extensions: dict[str, Any] = {EXTENSION: self.on_lost}
        self.scope["extensions"] = extensions
        super().on_headers_complete()

    # -- uvicorn -------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer was sent."""
        self._on_lost = None
        unread = self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._end_timer()
            self._timer = self.loop.call_later(LINGER, self.transport.abort)

    def on_message_complete(self) -> None:
        """The end of a request's body is there."""
        if self.cycle.response_complete:
            self._end_timer()
        super().on_message_complete()

    # -- for the gateway -----------------------------------------------------------------------------

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once the connection is lost, during the request under way."""
        self._on_lost = callback
        if self.transport.is_closing():
            self._lost()

    # ------------------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

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
        """Answer in the server's own name, and close."""
        self._end_timer()
        self._in_head = False
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # not into the midst of another answer
            head, body = refusal(status, {"detail": detail}, [("connection", "close")])
            lines = [f"HTTP/1.1 {head.status} {head.reason}", *(f"{name}: {value}" for name, value in head.headers)]
            self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.transport.close()


class _Vigil:
    """Waits for the reset of a connection that is read no more, and drops it then."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        sock: socket.socket = transport.get_extra_info("socket")
        self._loop = loop
        self._transport = transport
        self._epoll = select.epoll(1)
        self._epoll.register(sock.fileno(), 0)  # EPOLLERR and EPOLLHUP are always told (epoll_ctl(2))
        loop.add_reader(self._epoll.fileno(), self._is_reset)

    def _is_reset(self) -> None:
        if self._epoll.poll(0):
            self.end()
            self._transport.abort()

    def end(self) -> None:
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
