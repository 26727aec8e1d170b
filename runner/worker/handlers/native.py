"""Native handlers: `def handler(request, response)`, blastdoor's own and thinnest interface.

What the handler writes is on its way to the caller when the call returns. A handler may also return its
body as bytes: head, body and end then leave in one write.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Protocol

from ...wire.headers import Headers
from ...wire.messages import Header, JobContext, RequestHead
from ...wire.response_frames import with_length
from ..pipes import IncomingRequest, OutgoingResponse
from .adapter import Adapter
from .body import body_reader

Handler = Callable[["HandlerRequest", "HandlerResponse"], bytes | None]
"""A native handler."""


class Incoming(Protocol):
    """What a request is made from, in either kind of worker."""

    @property
    def head(self) -> RequestHead: ...

    @property
    def cancelled(self) -> bool: ...


class RequestView:
    """All of a handler's request but its body."""

    __slots__ = ("_headers", "_view")

    def __init__(self, incoming: Incoming) -> None:
        self._view = incoming
        self._headers: Headers | None = None

    @property
    def method(self) -> str:
        """The method, as the caller spelled it."""
        return self._view.head.method

    @property
    def target(self) -> str:
        """Path and query, byte for byte."""
        return self._view.head.target

    @property
    def path(self) -> str:
        """The target up to the first '?'."""
        return self._view.head.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The target after the first '?', empty where there is none."""
        return self._view.head.target.partition("?")[2]

    @property
    def scheme(self) -> str:
        """The scheme of the caller's URL."""
        return self._view.head.scheme

    @property
    def server(self) -> tuple[str, int]:
        """Host and port of the caller's URL."""
        return self._view.head.server

    @property
    def client(self) -> tuple[str, int]:
        """Host and port of who asks: behind the gateway its client, else this host."""
        return self._view.head.client

    @property
    def headers(self) -> Headers:
        """The headers: by name whatever the case, with order and repeats kept."""
        if self._headers is None:
            self._headers = Headers(self._view.head.headers)
        return self._headers

    @property
    def cancelled(self) -> bool:
        """Whether the caller has left. An exception was raised in the handler then, once."""
        return self._view.cancelled

    @property
    def context(self) -> JobContext:
        """What the host vouches for; no header that a caller sends can set it."""
        return self._view.head.context


class HandlerRequest(RequestView):
    """The request that a native handler is given.

    `target` is what the caller asked for, byte for byte; `path` and `query` are its two halves, still
    percent-encoded. `scheme` and `server` (host, port) are those of the caller's URL. `context` is what the
    host vouches for: provider, source, delegated_api_key_id, attribution, job_id, deadline.
    """

    __slots__ = ("_body", "_incoming")

    def __init__(self, incoming: IncomingRequest) -> None:
        super().__init__(incoming)
        self._incoming = incoming
        self._body: io.BufferedReader | None = None

    @property
    def body(self) -> io.BufferedReader:
        """The body as a binary file, read from the pipe on demand; `read1()` gives what has come."""
        if self._body is None:
            self._body = body_reader(self._incoming)
        return self._body


class FreezingHeaders:
    """The headers of a response until its head is sent, and then only a copy of them."""

    __slots__ = ("headers",)

    def __init__(self) -> None:
        self.headers: Headers = Headers()

    def freeze(self) -> list[Header]:
        """What the head has."""
        pairs = self.headers.pairs()
        self.headers = FrozenHeaders(pairs)
        return pairs


class HandlerResponse(FreezingHeaders):
    """The response that a native handler writes.

    Set `headers`, then `write_header` or `write`: the first of them sends the head, and it stands. A write
    without a head implies 200.
    """

    __slots__ = ("_response",)

    def __init__(self, writer: OutgoingResponse) -> None:
        super().__init__()
        self._response = writer

    def write_header(self, status: int) -> None:
        """Send the head with this status and the headers set so far. A second head is ignored, with a log line.

        TypeError or ValueError for a status or a header that HTTP does not allow.
        """
        if self._response.started:
            log_line(f"a second head, with status {status!r}, was ignored: the first one stands")
            return
        self._response.start(status, self.freeze())

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send body bytes; they are on their way when it returns."""
        if self._response.started:
            self._response.write(data)
        elif memoryview(data).nbytes:
            self._response.start_with(200, self.freeze(), data)
        else:
            self._response.start(200, self.freeze())

    def flush(self) -> None:
        """Do nothing: every write is sent at once. It is here for code that looks for it."""

    def finish(self, data: bytes, *, sized: bool = False) -> None:
        """Send the rest and the end; with a Content-Length where that is the whole body."""
        headers: list[Header] = []
        if not self._response.started:
            headers = self.freeze()
            if sized:
                headers = with_length(200, headers, len(data))
        self._response.finish(200, headers, [data])


class FrozenHeaders(Headers):
    """Headers that have been sent: changes are ignored, with a log line."""

    __slots__ = ()

    def __setitem__(self, name: str, value: str) -> None:
        log_line(f"header {name!r} was set after the head was sent, and is ignored")

    def __delitem__(self, name: str) -> None:
        log_line(f"header {name!r} was deleted after the head was sent, which is ignored")

    def add(self, name: str, value: str) -> None:
        log_line(f"header {name!r} was added after the head was sent, and is ignored")


class NativeAdapter(Adapter):
    """Calls a native handler."""

    kind = "native"

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __call__(self, request: IncomingRequest, response: OutgoingResponse) -> None:
        writer = HandlerResponse(response)
        result: object = self._handler(HandlerRequest(request), writer)
        if result is not None and not isinstance(result, bytes):
            raise TypeError(f"the handler returned a {type(result).__name__}: it may return its body as bytes, or None")
        writer.finish(result or b"", sized=result is not None and request.head.method != "HEAD")


def log_line(line: str) -> None:
    print(f"blastdoor: {line}", file=sys.stderr)
