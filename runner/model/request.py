"""A request as the host holds it, and its body as a source of bytes that is read lazily.

`Request` is checked when it is made: what could not stand in an HTTP/1.1 message is refused before any
worker is leased.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import InvalidBody, InvalidRequest
from ..wire.frames import MAX_BODY
from ..wire.headers import is_token, plain_headers
from ..wire.messages import Header


class SupportsRead(Protocol):
    """Anything with a `read(size)` that gives bytes, such as a file opened in binary mode."""

    def read(self, size: int, /) -> bytes: ...


Body = bytes | bytearray | memoryview | str | SupportsRead | Iterable[bytes] | AsyncIterable[bytes] | None
"""A request's body: nothing, bytes, text (sent as UTF-8), a file-like object, or an iterable of bytes, async or not."""

PIECE = 64 * 1024
"""How much of a file is read at once, in bytes."""

INLINE = 32 * 1024
"""A body of bytes or text up to this size goes out with its request's head in one write."""

# Visible ASCII without controls and blanks; RFC 9112, 3.2: origin-form, or "*" for OPTIONS.
_is_target = re.compile(r"/[\x21-\x22\x24-\x7e]*|\*").fullmatch

_set = object.__setattr__  # it is frozen for others


_SERVER = ("localhost", 80)
_CLIENT = ("127.0.0.1", 0)


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Methods that are known to be tokens."""


@dataclass(frozen=True, slots=True, init=False)
class Request:
    """One request.

    `target` is the origin-form target, path and query byte for byte as they should arrive; `headers` are
    (name, value) pairs; `scheme` and `server` (host, port) tell the handler the URL that it stands behind, and
    `client` (host, port) who asks: this host, where it is not a server that asks on somebody's behalf.
    Raises InvalidRequest for what can't be sent.
    """

    method: str
    target: str
    headers: Sequence[Header]
    body: Body
    scheme: str
    server: tuple[str, int]
    client: tuple[str, int]

    def __init__(
        self,
        method: str,
        target: str,
        headers: Sequence[Header] = (),
        body: Body = None,
        scheme: str = "http",
        server: tuple[str, int] = _SERVER,
        client: tuple[str, int] = _CLIENT,
    ) -> None:
        if method not in _METHODS and not is_token(method):
            raise InvalidRequest(f"method {method!r} is not a token (RFC 9110, 9.1)")
        if _is_target(target) is None or (target == "*" and method != "OPTIONS"):
            raise InvalidRequest(
                f"target {target[:200]!r} is not a path with an optional query: it must begin with '/', "
                f"hold no fragment, and have blanks, controls and non-ASCII characters percent-encoded"
            )
        if type(headers) is not list and isinstance(headers, Mapping):
            raise InvalidRequest("headers are a list of (name, value) pairs: give list(headers.items())")
        try:
            headers = plain_headers(headers)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(str(error)) from None
        if server is not _SERVER:
            _check_address("server", server)
        if client is not _CLIENT:
            _check_address("client", client)
        if type(method) is not str or type(target) is not str:  # a subclass: what it is as text
            method, target = str.__str__(method), str.__str__(target)
        _set(self, "method", method)
        _set(self, "target", target)
        _set(self, "headers", headers)
        _set(self, "body", body)
        _set(self, "scheme", scheme)
        _set(self, "server", server)
        _set(self, "client", client)


def _check_address(name: str, address: object) -> None:
    if not (
        isinstance(address, tuple)
        and len(address) == 2
        and isinstance(address[0], str)
        and isinstance(address[1], int)
        and 0 <= address[1] <= 65535
    ):
        raise InvalidRequest(f"{name} is a host and a port, as in ('localhost', 80), not {address!r}")


class Upload:
    """A request body that is sent as the worker takes it.

    `inline` is a small body that is there at once; `lazy` says that there may be more to `pull`. `close`
    ends the source, and is safe to call more than once. Iterators are closed; a file stays open, since it is
    its owner's to close, or to send again.
    """

    __slots__ = ("_close", "_closed", "_next", "_rest", "inline", "pulled")

    def __init__(self, body: Body) -> None:
        self.inline = b""
        self.pulled = False
        self._closed = False
        self._rest: memoryview | None = None
        self._next: Callable[[], bytes] | None = None
        self._close: Callable[[], None] | None = None
        if body is None:
            return
        if type(body) is bytes and len(body) <= INLINE:
            self.inline = body
        elif isinstance(body, (bytes, bytearray, memoryview, str, array)):
            data = as_bytes(body)
            if len(data) <= INLINE:
                self.inline = data
            else:
                self._rest = memoryview(data)
                self._next = bytes
        elif hasattr(body, "read"):
            read: Callable[[int], object] = body.read
            self._next = lambda: as_bytes(read(PIECE))
        elif isinstance(body, Iterable) and not isinstance(body, Mapping):
            source: Iterator[object] = iter(body)
            self._next = lambda: _next_piece(source)
            self._close = getattr(source, "close", None)
        elif isinstance(body, AsyncIterable):
            raise InvalidRequest("an async body can only be sent by Pool.aopen, or an async client: await that")
        else:
            raise InvalidBody(
                f"a body of type {type(body).__name__} can't be sent: "
                f"give bytes, str, a binary file, or an iterable of bytes"
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the end was reached."""
        return self._closed

    @property
    def lazy(self) -> bool:
        """Whether there may be more to pull."""
        return self._next is not None

    @property
    def ready(self) -> bool:
        """Whether `pull` has something to give now; what is not asynchronous is waited for inside it."""
        return True

    def pull(self) -> bytes | memoryview:
        """The next piece of a lazy body, at most MAX_BODY bytes; empty at its end. Raises what the source raises."""
        rest = self._rest
        if rest is None:
            if self._next is None:
                return b""
            self.pulled = True
            piece = self._next()
            if not piece:
                self.close()
            return self._cut(piece)
        self.pulled = True
        return self._cut(rest)

    def _cut(self, piece: bytes | memoryview) -> bytes | memoryview:
        """What goes into one frame of it; the rest is what is pulled next."""
        if len(piece) <= MAX_BODY:
            self._rest = None
            return piece
        whole = memoryview(piece)
        self._rest = whole[MAX_BODY:]
        return whole[:MAX_BODY]

    def on_ready(self, wake: Callable[[], object]) -> None:
        """Have `wake` called, from any thread, when `ready` has become true: here it always is."""

    def starve(self) -> None:
        """Whoever pulls wants more than is `ready`: told to a source that waits to be asked."""

    def close(self) -> None:
        """End the source."""
        self._closed = True
        self._next = None
        self._rest = None
        close, self._close = self._close, None
        if close is not None:
            close()


def as_bytes(piece: object) -> bytes:
    """A piece of a body as bytes. InvalidBody for what is none."""
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, (bytearray, memoryview)):
        return bytes(piece)
    if isinstance(piece, array):
        return piece.tobytes()
    if isinstance(piece, str):
        return piece.encode()
    raise InvalidBody(f"the request body gave a piece of type {type(piece).__name__}, not bytes")


def _next_piece(source: Iterator[object]) -> bytes:
    for piece in source:
        data = as_bytes(piece)
        if data:
            return data
    return b""
