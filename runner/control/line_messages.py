"""What a host tells a worker beside its jobs: a cancel, and a lane that is opened. Each is one message of a socket.

The socket keeps message boundaries (SOCK_SEQPACKET, unix(7)), and is for this one direction. The descriptors of a lane
come with its message: its request pipe, and its response pipe.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from ..platform.descriptors import receive

CANCEL: Final = b"C"
OPEN: Final = b"O"

_MESSAGE: Final = struct.Struct("<cHI")
MESSAGE_SIZE: Final = _MESSAGE.size

LANE_DESCRIPTORS: Final = 2


def take(line: socket.socket) -> tuple[bytes, int, int, list[int]] | None:
    """For a worker of several lanes: the next message, and the descriptors that came with it; None at the end.

    The descriptors of a lane may be missing where the process has no room for them (recv(2), MSG_CTRUNC).
    """
    message, fds = receive(line, MESSAGE_SIZE, LANE_DESCRIPTORS)
    if not message:
        return None
    kind, lane, job = _MESSAGE.unpack(message)
    return kind, lane, job, fds


def pack_cancel(lane: int, job: int) -> bytes:
    """The caller of this job, of this lane, has left."""
    return _MESSAGE.pack(CANCEL, lane, job)


def pack_open(lane: int) -> bytes:
    """A lane of this number begins; its descriptors come with it."""
    return _MESSAGE.pack(OPEN, lane, 0)


def read_cancel(fd: int) -> int | None:
    """For a worker of one lane: the number of the last job that was cancelled since the last look, None for none.

    EOFError where the host has closed its end.
    """
    found = None
    while True:
        try:
            message = os.read(fd, MESSAGE_SIZE)
        except BlockingIOError:
            return found
        if not message:
            raise EOFError
        found = int(_MESSAGE.unpack(message)[2])
