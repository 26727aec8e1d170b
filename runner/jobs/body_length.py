"""A request's body held to the Content-Length that its headers announce (RFC 9112, 6.3 and 8).

Less of it would reach the handler as a finished upload, more as something that nobody has announced.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence

from ..errors import InvalidLength, InvalidRequest
from ..model.request import Body, SupportsRead, as_bytes
from ..wire.headers import content_length
from ..wire.messages import Header


def held_to_length(body: Body, headers: Sequence[Header]) -> Body:
    """The body, which raises InvalidLength where it is not as long as announced: at once, where that is known."""
    if any(name.lower() == "transfer-encoding" for name, _ in headers):
        return body
    try:
        length = content_length(headers)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    if length is None:
        return body
    if isinstance(body, (bytes, bytearray, memoryview, str, array)):
        size = len(as_bytes(body))
        if size != length:
            raise InvalidLength(f"the request body has {size} bytes, and its Content-Length says {length}")
        return body
    read = getattr(body, "read", None)
    if read is not None:
        return _File(body, length) if not isinstance(body, AsyncIterable) else body  # type: ignore[arg-type]
    if isinstance(body, Iterable):
        return _Pieces(body, length)
    return _async_pieces(body, length) if isinstance(body, AsyncIterable) else body


class _Count:
    """How much is still to come."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._left = length

    def take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise InvalidLength(f"the request body has more than the {self._length} bytes of its Content-Length")
        return data

    def end(self) -> None:
        if self._left:
            raise InvalidLength(
                f"the request body has ended {self._left} bytes short of the {self._length} of its Content-Length"
            )


class _File:
    """A file."""

    def __init__(self, file: SupportsRead, length: int) -> None:
        self._file = file
        self._count = _Count(length)

    def read(self, size: int, /) -> bytes:
        data = self._count.take(as_bytes(self._file.read(size)))
        if not data:
            self._count.end()
        return data


class _Pieces:
    """An iterable."""

    def __init__(self, source: Iterable[object], length: int) -> None:
        self._source = iter(source)
        self._count = _Count(length)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return self._count.take(as_bytes(next(self._source)))
        except StopIteration:
            self._count.end()
            raise

    def close(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            close()


async def _async_pieces(source: AsyncIterable[object], length: int) -> AsyncIterator[bytes]:
    """An async iterable, which is closed with this."""
    count = _Count(length)
    pieces = aiter(source)
    try:
        async for piece in pieces:
            yield count.take(as_bytes(piece))
        count.end()
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()
