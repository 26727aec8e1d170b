"""A request's body as a handler sees it: a binary file that is read from the pipe on demand."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, cast

from ..pipes import IncomingRequest

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class _Pieces(io.RawIOBase):
    """The body's pieces as a raw stream."""

    def __init__(self, request: IncomingRequest) -> None:
        self._request = request
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        data = self._rest or self._request.read_piece()
        view = memoryview(buffer).cast("B")
        size = min(len(data), len(view))
        view[:size] = data[:size]
        self._rest = data[size:]
        return size


def body_reader(request: IncomingRequest) -> io.BufferedReader:
    """The body as a buffered binary file: `read`, `read1` (what has come), `readline`, iteration by lines."""
    return body_and_size(request)[0]


def body_and_size(request: IncomingRequest) -> tuple[io.BufferedReader, int | None]:
    """The body as `body_reader` gives it; and its size in bytes, where there is one and all of it has come."""
    whole = request.take_whole()
    if whole is not None:
        reader: io.BufferedReader = io.BufferedReader(cast("io.RawIOBase", io.BytesIO(whole)))
        return reader, len(whole) if request.head.has_body else None
    return io.BufferedReader(_Pieces(request), 16 * 1024), None
