"""A response of the gateway on its way to the client, and what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from runner.wire.messages import Header, ResponseHead
from transport.gateway.client_connection import Message

Send = Callable[[Message], Awaitable[None]]

HOP_BY_HOP: Final = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers of one connection only (RFC 9110, 7.6.1); trailers are not passed on."""

MOST: Final = 599
"""The highest status code of HTTP (RFC 9110, 15)."""


class ClientResponse:
    """Sends one response. OSError, from some servers, where the client has gone.

    `phrases` says that the server takes a `reason` of the app's own, which ASGI does not know.
    """

    def __init__(self, send: Send, *, phrases: bool = False) -> None:
        self._send = send
        self._phrases = phrases
        self.status: int | None = None
        self.sent = 0
        self.whole = False

    async def start(self, head: ResponseHead) -> None:
        """The head."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
        self.status = head.status
        message: Message = {"type": "http.response.start", "status": head.status, "headers": headers}
        if self._phrases and head.phrase is not None:
            message["reason"] = head.phrase.encode("latin-1")
        await self._send(message)

    async def piece(self, data: bytes) -> None:
        """A piece of the body, on its way at once."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.sent += len(data)

    async def end(self, data: bytes = b"") -> None:
        """The last piece of the body, if there is one left."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.sent += len(data)
        self.whole = True


def end_to_end(headers: list[Header]) -> list[Header]:
    """The headers that are passed on: all but those of the connection that they came on (RFC 9110, 7.6.1)."""
    names = [name.lower() for name, _ in headers]
    if HOP_BY_HOP.isdisjoint(names):
        return headers
    dropped = set(HOP_BY_HOP)
    for name, (_, value) in zip(names, headers, strict=True):
        if name == "connection":
            dropped.update(option.strip().lower() for option in value.split(","))
    dropped -= {"host", "content-length", "content-type"}  # a Connection header has no say in these
    return [header for name, header in zip(names, headers, strict=True) if name not in dropped]
