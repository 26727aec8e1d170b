"""A response of the ASGI gateway on its way to the client, and what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from runner.wire.messages import ResponseHead
from transport.gateway.client_connection import Message

Send = Callable[[Message], Awaitable[None]]


class ClientResponse:
    """Sends one response. OSError, from some servers, where the client has gone."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.sent = 0
        self.whole = False

    async def start(self, head: ResponseHead) -> None:
        """The head."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
        self.status = head.status
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def piece(self, data: bytes) -> None:
        """A piece of the body, on its way at once."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.sent += len(data)

    async def end(self, data: bytes = b"") -> None:
        """The last piece of the body, if there is one left."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.sent += len(data)
        self.whole = True
