"""Transports for httpx2: a client that is given one has its requests run by a pool's handler.

    client = httpx2.Client(transport=Transport(pool))
    client = httpx2.AsyncClient(transport=AsyncTransport(pool, factory.route_for("openai", "agents")))

Of a client's timeouts, pool is the wait for a free worker (connect, where no worker of the pool is ready yet), read
the wait for each sign of progress, write the wait for the handler to take more of the request's body.
The target as the handler got it is `response.extensions["served_target"]`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from runner.extras import missing

try:
    import httpx2
except ModuleNotFoundError as error:
    raise ImportError(missing("transport.httpx2", "httpx2", "httpx2")) from error

from transport._httpx import AsyncBody, Core, Errors, SyncBody

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.route import Route

_ERRORS = Errors(
    connect=httpx2.ConnectError,
    connect_timeout=httpx2.ConnectTimeout,
    invalid_url=httpx2.InvalidURL,
    local_protocol=httpx2.LocalProtocolError,
    pool_timeout=httpx2.PoolTimeout,
    read=httpx2.ReadError,
    read_timeout=httpx2.ReadTimeout,
    remote_protocol=httpx2.RemoteProtocolError,
    unsupported_protocol=httpx2.UnsupportedProtocol,
    write_timeout=httpx2.WriteTimeout,
)


class Transport(httpx2.BaseTransport):
    """Has a pool run each request of an `httpx2.Client`.

    With a `route` (as `TransportFactory.route_for` gives it) the path is rewritten to the provider's mount and a
    delegated API key id is asked for. The pool stays its owner's: closing the client does not close it.
    """

    def __init__(self, pool: AnyPool, route: Route | None = None) -> None:
        self._core = Core(pool, route, _ERRORS)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; the response comes as soon as its head is there.

        Raises the client's own errors, and MissingIdentity. A job that fails before its head gives a 500, 502, 503 or
        504 with an application/problem+json body.
        """
        answer, body = self._core.send(request, _content(request))
        return httpx2.Response(
            answer.status, headers=answer.headers, stream=_Stream(body), extensions=answer.extensions
        )


class AsyncTransport(httpx2.AsyncBaseTransport):
    """Has a pool run each request of an `httpx2.AsyncClient`, on asyncio or trio; else as `Transport`."""

    def __init__(self, pool: AnyPool, route: Route | None = None) -> None:
        self._core = Core(pool, route, _ERRORS)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; the response comes as soon as its head is there. Raises what `Transport` raises."""
        answer, body = await self._core.send_async(request, _content(request))
        return httpx2.Response(
            answer.status, headers=answer.headers, stream=_AsyncStream(body), extensions=answer.extensions
        )


class _Stream(httpx2.SyncByteStream):
    def __init__(self, body: SyncBody) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        self._body.close()


class _AsyncStream(httpx2.AsyncByteStream):
    def __init__(self, body: AsyncBody) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body

    async def aclose(self) -> None:
        self._body.close()


def _content(request: httpx2.Request) -> object:
    """The request's body: whole where the client has it so, else the stream."""
    try:
        return request.content
    except httpx2.RequestNotRead:
        return request.stream
