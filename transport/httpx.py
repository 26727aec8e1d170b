"""Transports for httpx: a client that is given one has its requests run by a pool's handler.

    client = httpx.Client(transport=Transport(pool))
    client = httpx.AsyncClient(transport=AsyncTransport(pool, factory.route_for("openai", "agents")))

Of a client's timeouts, pool is the wait for a free worker (connect, where no worker of the pool is ready yet), read
the wait for each sign of progress, write the wait for the handler to take more of the request's body.
The target as the handler got it is `response.extensions["served_target"]`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from runner.extras import missing

try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError(missing("transport.httpx", "httpx", "httpx")) from error

from transport._httpx import AsyncBody, Core, Errors, SyncBody

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.route import Route

_ERRORS = Errors(
    connect=httpx.ConnectError,
    connect_timeout=httpx.ConnectTimeout,
    invalid_url=httpx.InvalidURL,
    local_protocol=httpx.LocalProtocolError,
    pool_timeout=httpx.PoolTimeout,
    read=httpx.ReadError,
    read_timeout=httpx.ReadTimeout,
    remote_protocol=httpx.RemoteProtocolError,
    unsupported_protocol=httpx.UnsupportedProtocol,
    write_timeout=httpx.WriteTimeout,
)


class Transport(httpx.BaseTransport):
    """Has a pool run each request of an `httpx.Client`.

    With a `route` (as `TransportFactory.route_for` gives it) the path is rewritten to the provider's mount and a
    delegated API key id is asked for. The pool stays its owner's: closing the client does not close it.
    """

    def __init__(self, pool: AnyPool, route: Route | None = None) -> None:
        self._core = Core(pool, route, _ERRORS)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response comes as soon as its head is there.

        Raises the client's own errors, and MissingIdentity. A job that fails before its head gives a 500, 502, 503 or
        504 with an application/problem+json body.
        """
        answer, body = self._core.send(request, _content(request))
        return httpx.Response(answer.status, headers=answer.headers, stream=_Stream(body), extensions=answer.extensions)


class AsyncTransport(httpx.AsyncBaseTransport):
    """Has a pool run each request of an `httpx.AsyncClient`, on asyncio or trio; else as `Transport`."""

    def __init__(self, pool: AnyPool, route: Route | None = None) -> None:
        self._core = Core(pool, route, _ERRORS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response comes as soon as its head is there. Raises what `Transport` raises."""
        answer, body = await self._core.send_async(request, _content(request))
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_AsyncStream(body), extensions=answer.extensions
        )


class _Stream(httpx.SyncByteStream):
    def __init__(self, body: SyncBody) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        self._body.close()


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, body: AsyncBody) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body

    async def aclose(self) -> None:
        self._body.close()


def _content(request: httpx.Request) -> object:
    """The request's body: whole where the client has it so, else the stream."""
    try:
        return request.content
    except httpx.RequestNotRead:
        return request.stream
