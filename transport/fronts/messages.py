"""What the parent and a front tell each other over a socket of their own: a length in four bytes, and MessagePack.

Both are this project's own processes and trust each other. A front that dies leaves its socket at its end.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Final

import msgspec

from runner.errors import ConfigurationError
from transport.serving.settings import Settings

_LENGTH: Final = struct.Struct("<I")
MOST: Final = 256 * 1024 * 1024
"""Bytes of a message; status pages are large."""


class Setup(msgspec.Struct, tag=True, array_like=True):
    """To a front, first: its share of the settings, and the descriptors that it has got."""

    settings: Settings
    index: int
    listeners: list[int]
    room: int


class Reload(msgspec.Struct, tag=True, array_like=True):
    """To a front: have new pools serve, with these settings."""

    settings: Settings


class AskStatus(msgspec.Struct, tag=True, array_like=True):
    """To a front: tell all that the page of status shows."""


class AskNumbers(msgspec.Struct, tag=True, array_like=True):
    """To a front: tell your counts now."""


ToFront = Setup | Reload | AskStatus | AskNumbers


class Sample(msgspec.Struct, array_like=True):
    """A sample of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, array_like=True):
    """A metric with its samples."""

    name: str
    documentation: str
    kind: str
    samples: list[Sample]


class Counts(msgspec.Struct, array_like=True):
    """What a pool has counted."""

    deaths: int
    outcomes: dict[str, int]


class Started(msgspec.Struct, tag=True, array_like=True):
    """From a front: requests are taken. `kinds` says of each mount how its app is called."""

    kinds: dict[str, str]


class Failed(msgspec.Struct, tag=True, array_like=True):
    """From a front: it can't start."""

    error: str


class Reloaded(msgspec.Struct, tag=True, array_like=True):
    """From a front: the new pools serve, or the old ones go on."""

    whole: bool


class Numbers(msgspec.Struct, tag=True, array_like=True):
    """From a front, every second and when it is asked: its metrics, and the counts of its pools by their mounts."""

    metrics: list[Family]
    counts: dict[str, Counts]


class Told(msgspec.Struct, tag=True, array_like=True):
    """From a front: what its page of status would show."""

    status: dict[str, Any]


FromFront = Started | Failed | Reloaded | Numbers | Told

_encode = msgspec.msgpack.Encoder().encode
_to_front = msgspec.msgpack.Decoder(ToFront).decode
_from_front = msgspec.msgpack.Decoder(FromFront).decode


def packed(message: ToFront | FromFront) -> bytes:
    """A message as bytes."""
    data = _encode(message)
    if len(data) > MOST:
        raise ConfigurationError(f"a message of {len(data)} bytes is over the cap of {MOST}")
    return _LENGTH.pack(len(data)) + data


def receive_setup(control: socket.socket) -> Setup | None:
    """The first message of the parent's, from a socket that blocks; None where there is none."""
    size = _receive(control, _LENGTH.size)
    data = None if size is None else _receive(control, _LENGTH.unpack(size)[0])
    message = None if data is None else _to_front(data)
    return message if isinstance(message, Setup) else None


def _receive(control: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return data


async def next_for_front(reader: asyncio.StreamReader) -> ToFront | None:
    """The next message of the parent's, None at the end."""
    data = await _next(reader)
    return None if data is None else _to_front(data)


async def next_from_front(reader: asyncio.StreamReader) -> FromFront | None:
    """The next message of a front's, None at the end."""
    data = await _next(reader)
    return None if data is None else _from_front(data)


async def _next(reader: asyncio.StreamReader) -> bytes | None:
    try:
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return None if size > MOST else await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
