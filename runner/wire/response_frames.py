"""The frames of a response as bytes, checked, with no I/O: what both kinds of worker loop send."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from .frames import (
    BODY,
    BUSY,
    END,
    FAULT,
    HEAD,
    IDLE,
    MAX_BODY,
    MAX_HEAD,
    PRINTED,
    encode,
    pack_header,
)
from .headers import content_length, plain_headers
from .messages import FaultReport, Header, ResponseHead

Data = bytes | bytearray | memoryview
"""What a handler may give as a piece of a body."""

SMALL: Final = 32 * 1024
"""Body bytes up to this size are joined with what goes out beside them, so that it is one write."""

_LENGTHS: Final = frozenset({"content-length", "transfer-encoding"})

_encode = msgspec.msgpack.Encoder().encode


def head_frame(job: int, status: int, headers: list[Header], reason: str | None = None) -> bytes:
    """The head, with a reason phrase where it is not the status's own. ValueError or TypeError for a bad one."""
    if not isinstance(status, int) or isinstance(status, bool):
        raise TypeError(f"the status must be an int such as 200, not {status!r}")
    if not 200 <= status <= 999:
        raise ValueError(f"the status must lie between 200 and 999, not {status}")
    if headers:
        headers = plain_headers(headers)
        content_length(headers)
    payload = _encode(ResponseHead(int(status), headers, reason))
    if len(payload) > MAX_HEAD:
        raise ValueError(f"the response head has {len(payload)} bytes, over the cap of {MAX_HEAD}")
    return encode(HEAD, job, payload)


def with_length(status: int, headers: list[Header], size: int) -> list[Header]:
    """The headers of a response whose body is there whole, with a Content-Length (RFC 9110, 8.6)."""
    if status in (204, 304) or any(name.lower() in _LENGTHS for name, _ in headers if isinstance(name, str)):
        return headers
    return [*headers, ("content-length", str(size))]


def flat(data: Data) -> Data:
    """The data byte by byte, whatever the shape of its memory. TypeError for what is not contiguous, or no buffer."""
    return data if isinstance(data, (bytes, bytearray)) else memoryview(data).cast("B")


def body_pieces(data: Data) -> Iterable[memoryview]:
    """Body bytes cut into the payloads of frames."""
    view = memoryview(data)
    for at in range(0, len(view), MAX_BODY):
        yield view[at : at + MAX_BODY]


def small_body(job: int, chunks: Iterable[Data]) -> list[Data]:
    """The body frames of small chunks, as buffers to be joined."""
    parts: list[Data] = []
    for chunk in chunks:
        if chunk:
            parts.append(pack_header(BODY, job, len(chunk)))
            parts.append(chunk)
    return parts


def end_frame(job: int, *, printed: bool, busy: bool = False) -> bytes:
    """The end of a response; `busy` where the worker goes on with the job's background work."""
    return _flagged(END, job, PRINTED * printed | BUSY * busy)


def idle_frame(job: int, *, printed: bool) -> bytes:
    """The end of a job's background work."""
    return _flagged(IDLE, job, PRINTED * printed)


def fault_frame(job: int, report: FaultReport, *, printed: bool) -> bytes:
    """The bad end of a response, or of background work."""
    return encode(FAULT, job, _encode(msgspec.structs.replace(report, printed=printed)))


def _flagged(kind: int, job: int, flags: int) -> bytes:
    return encode(kind, job, bytes((flags,)) if flags else b"")
