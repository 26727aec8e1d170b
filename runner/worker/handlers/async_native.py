"""Native handlers that are coroutines: `async def handler(request, response)`, the native interface with `await`.

    async def handler(request, response):
        async for piece in request.body:
            await response.write(piece)

When the caller leaves, the handler's task is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from ...wire.messages import Header
from ...wire.response_frames import Data, with_length
from ..async_pipes import AsyncRequest, AsyncResponse
from .adapter import AsyncAdapter
from .native import FreezingHeaders, RequestView, log_line

AsyncHandler = Callable[["AsyncHandlerRequest", "AsyncHandlerResponse"], Awaitable[bytes | None]]
"""A native handler that is a coroutine function."""


class AsyncBody:
    """A request's body: iterate for its pieces as they come, or read all of it."""

    __slots__ = ("_incoming",)

    def __init__(self, incoming: AsyncRequest) -> None:
        self._incoming = incoming

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self._incoming.read_piece():
            yield piece

    async def read(self) -> bytes:
        """All that is left of it. OSError where it was cut off."""
        return b"".join([piece async for piece in self])


class AsyncHandlerRequest(RequestView):
    """The request that an async native handler is given: as `HandlerRequest`, but for its `body`."""

    __slots__ = ("body",)

    def __init__(self, incoming: AsyncRequest) -> None:
        super().__init__(incoming)
        self.body = AsyncBody(incoming)


class AsyncHandlerResponse(FreezingHeaders):
    """The response that an async native handler writes: as `HandlerResponse`, to be awaited."""

    __slots__ = ("_response",)

    def __init__(self, writer: AsyncResponse) -> None:
        super().__init__()
        self._response = writer

    async def write_header(self, status: int) -> None:
        """Send the head with this status and the headers set so far. A second head is ignored, with a log line.

        TypeError or ValueError for a status or a header that HTTP does not allow.
        """
        if self._response.started:
            log_line(f"a second head, with status {status!r}, was ignored: the first one stands")
            return
        await self._response.start(status, self.freeze())

    async def write(self, data: Data) -> None:
        """Send body bytes; they are on their way when it returns. OSError once the caller has left."""
        size = memoryview(data).nbytes
        if self._response.started:
            await self._response.write(data)
        elif size:
            await self._response.start_with(200, self.freeze(), data)
        else:
            await self._response.start(200, self.freeze())

    async def flush(self) -> None:
        """Do nothing: every write is sent at once. It is here for code that looks for it."""

    async def finish(self, data: bytes, *, sized: bool = False) -> None:
        """Send the rest and the end; with a Content-Length where that is the whole body."""
        headers: list[Header] = []
        if not self._response.started:
            headers = self.freeze()
            if sized:
                headers = with_length(200, headers, len(data))
        await self._response.finish(200, headers, data)


class AsyncNativeAdapter(AsyncAdapter):
    """Calls an async native handler."""

    kind = "native"

    def __init__(self, handler: AsyncHandler) -> None:
        self._handler = handler

    async def __call__(self, request: AsyncRequest, response: AsyncResponse) -> None:
        writer = AsyncHandlerResponse(response)
        result: object = await self._handler(AsyncHandlerRequest(request), writer)
        if result is not None and not isinstance(result, bytes):
            raise TypeError(f"the handler returned a {type(result).__name__}: it may return its body as bytes, or None")
        await writer.finish(result or b"", sized=result is not None and request.head.method != "HEAD")
