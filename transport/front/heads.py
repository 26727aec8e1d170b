"""Heads of responses as bytes of HTTP/1.1 (RFC 9112)."""

from __future__ import annotations

import time
from email.utils import formatdate
from enum import IntEnum, auto
from typing import Final

from runner.wire.messages import PHRASES, ResponseHead

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

BODILESS: Final = frozenset((204, 304))

_STATUS_LINES: Final = {status: f"HTTP/1.1 {status} {phrase}\r\n" for status, phrase in PHRASES.items()}


class Framing(IntEnum):
    """How the client knows where a body ends (RFC 9112, 6.3): it has none; by its length; by chunks; by the close."""

    NONE = auto()
    LENGTH = auto()
    CHUNKED = auto()
    CLOSE = auto()


class _Date:
    """The `Date` header of this second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = ""

    def line(self) -> str:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._line = f"date: {formatdate(now, usegmt=True)}\r\n"
        return self._line


_date: Final = _Date()


def head_bytes(head: ResponseHead, *, head_only: bool, chunks: bool, keep_alive: bool) -> tuple[bytes, Framing, bool]:
    """The head as it is written, how its body is framed, and whether the connection goes on after it.

    `head_only` is for the answer to a HEAD request. Without `chunks`, as HTTP/1.0 has none, a body of unknown length is
    ended by the connection's end.
    """
    status = head.status
    phrase = head.phrase
    line = _STATUS_LINES.get(status) if phrase is None else None
    lines = [line or f"HTTP/1.1 {status} {phrase or ''}\r\n"]
    framing = Framing.NONE if head_only or status in BODILESS else Framing.CHUNKED if chunks else Framing.CLOSE
    dated = False
    for name, value in head.headers:
        name = name.lower()
        if name == "content-length":
            if framing:
                framing = framing if framing is Framing.NONE else Framing.LENGTH
        elif name == "date":
            dated = True
        elif name == "connection":  # the gateway's own: a handler has no say in it
            keep_alive = keep_alive and "close" not in value.lower()
            continue
        lines.append(f"{name}: {value}\r\n")
    if not dated:
        lines.append(_date.line())  # RFC 9110, 6.6.1
    if framing is Framing.CHUNKED:
        lines.append("transfer-encoding: chunked\r\n")
    elif framing is Framing.CLOSE:
        keep_alive = False
    if not keep_alive:
        lines.append("connection: close\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("latin-1"), framing, keep_alive
