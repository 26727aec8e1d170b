"""One request's answer as uvicorn writes it, with what uvicorn does not do.

- The reason phrase of a WSGI app stands in the status line.
- A `Date` of the app's own is the only one (RFC 9110, 6.6.1).
- HTTP/1.0 knows no chunks: a body of unknown length is ended by the connection's end (RFC 9112, 6.3).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class _Endless(int):
    """The length of a body that the connection's end tells: nothing is longer, nothing shorter, nothing left of it."""

    def __lt__(self, other: int) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __sub__(self, other: int) -> _Endless:
        return self


_ENDLESS: Final = _Endless()


class Cycle(RequestResponseCycle):
    """A request's answer."""

    @property
    def ended_by_close(self) -> bool:
        """Whether only the connection's end tells that of the body: one that is cut off must be reset."""
        return self.expected_content_length is _ENDLESS

    async def send(self, message: Any) -> None:
        """Send a message of ASGI's. That of the start may have a `reason`, bytes."""
        if self.response_started or message["type"] != "http.response.start":
            await super().send(message)
            return
        names = {name.lower() for name, _ in message["headers"]}
        if b"date" in names:
            self.default_headers = [pair for pair in self.default_headers if pair[0] != b"date"]
        if (
            self.scope["http_version"] == "1.0"
            and b"content-length" not in names
            and self.scope["method"] != "HEAD"
            and message["status"] not in (204, 304)
        ):
            self.chunked_encoding = False
            self.expected_content_length = _ENDLESS
            self.keep_alive = False
        reason: bytes | None = message.get("reason")
        if reason is None:
            await super().send(message)
            return
        transport = self.transport
        self.transport = _Rephrased(transport, b"HTTP/1.1 %d %b" % (message["status"], reason))  # type: ignore[assignment]
        try:
            await super().send(message)
        finally:
            self.transport = transport


class _Rephrased:
    """A transport that puts this status line in the place of the one that is written."""

    def __init__(self, transport: asyncio.Transport, status_line: bytes) -> None:
        self._transport = transport
        self._status_line = status_line

    def write(self, data: bytes) -> None:
        _, end, rest = data.partition(b"\r\n")
        self._transport.write(self._status_line + end + rest)
