"""The connection beside the lanes: pings, heartbeats and cancels, each with its length before it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

MOST_BESIDE: Final = 16 * 1024 * 1024
"""The cap on a message of an agent's, in bytes: it tells of all its workers, and of what they have logged."""

_MOST_UNSENT: Final = 1024 * 1024
_READ_SIZE: Final = 256 * 1024
_LENGTH: Final = struct.Struct("<I")


class PulseProtocol(Protocol):
    """The thread that looks after links: see `runner.cluster.pulse.Pulse`."""

    def call(self, step: Callable[[], object]) -> None:
        """Have something done in the thread."""

    def tell(self, step: Callable[[], object]) -> None:
        """Have subscribers told of something."""

    def after(self, seconds: float, step: Callable[[], object]) -> None:
        """Have something done later."""

    def watch(self, fd: int, step: Callable[[], object], *, write: bool = False) -> None:
        """Have something done whenever there is something to read, or room to write."""

    def unwatch(self, fd: int) -> None:
        """Look at it no more."""


class SideConnection:
    """A connection for what is beside the jobs: messages, each with its length before it. In the pulse's thread."""

    def __init__(
        self,
        sock: socket.socket,
        pulse: PulseProtocol,
        on_message: Callable[[bytes], object],
        on_broken: Callable[[str], object],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._pulse = pulse
        self._on_message = on_message
        self._on_broken = on_broken
        self._received = bytearray()
        self._unsent = bytearray()
        self._pulse.watch(sock.fileno(), self._on_ready)

    def send(self, data: bytes) -> None:
        """Send a message, now or as soon as there is room."""
        if len(self._unsent) > _MOST_UNSENT:
            self._break("it takes nothing of what it is told")
            return
        self._unsent += _LENGTH.pack(len(data)) + data
        self._flush()

    def close(self) -> None:
        """End it."""
        if self.sock.fileno() >= 0:
            self._pulse.unwatch(self.sock.fileno())
            self.sock.close()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self.sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            self._pulse.watch(self.sock.fileno(), self._on_ready, write=True)
            return
        except OSError as error:
            self._break(str(error))
            return
        self._pulse.watch(self.sock.fileno(), self._on_ready)

    def _on_ready(self) -> None:
        if self._unsent:
            self._flush()
            if self.sock.fileno() < 0:
                return
        try:
            data = self.sock.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(str(error))
            return
        if not data:
            self._break("it was closed")
            return
        received = self._received
        received += data
        while len(received) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received)
            if size > MOST_BESIDE:
                self._break(f"a message of {size} bytes is over the cap of {MOST_BESIDE}")
                return
            if len(received) < _LENGTH.size + size:
                return
            message = bytes(received[_LENGTH.size : _LENGTH.size + size])
            del received[: _LENGTH.size + size]
            self._on_message(message)
            if self.sock.fileno() < 0:
                return

    def _break(self, why: str) -> None:
        self.close()
        self._on_broken(why)
