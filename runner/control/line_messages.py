"""What a host tells a worker beside its jobs: a cancel, and a lane that is opened. Each is one message of a socket.

The socket keeps message boundaries (SOCK_SEQPACKET, unix(7)), and is for this one direction. The descriptors of a lane
come with its message: its request pipe, and its response pipe.
"""

from __future__ import annotations

import os
import struct
from typing import Final

CANCEL: Final = b"C"
OPEN: Final = b"O"

_MESSAGE: Final = struct.Struct("<cHI")
MESSAGE_SIZE: Final = _MESSAGE.size

LANE_DESCRIPTORS: Final = 2


def pack_cancel(lane: int, job: int) -> bytes:
    """The caller of this job, of this lane, has left."""
    return _MESSAGE.pack(CANCEL, lane, job)


def pack_open(lane: int) -> bytes:
    """A lane of this number begins; its descriptors come with it."""
    return _MESSAGE.pack(OPEN, lane, 0)


def unpack(message: bytes) -> tuple[bytes, int, int]:
    """Which message it is, the lane's number, and the job's."""
    kind, lane, job = _MESSAGE.unpack(message)
    return kind, lane, job


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
        found = unpack(message)[2]
