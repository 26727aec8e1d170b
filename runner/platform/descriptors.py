"""How many descriptors a process may have open, and room for more (getrlimit(2), RLIMIT_NOFILE)."""

from __future__ import annotations

import os
import resource
import socket
import struct
from typing import Final

_INT: Final = struct.Struct("i")

_MARGIN: Final = 64
"""Descriptors for what else the process does, where the hard limit has room for them too."""

_reserved: dict[object, int] = {}


def make_room(count: int, owner: object = None) -> int:
    """Have room for so many more descriptors, as far as the hard limit goes; how many there is room for.

    The soft limit is raised where that is needed, and no further. What an `owner` may open is counted until `release`,
    opened or not: others that make room leave room for it.
    """
    if owner is not None:
        _reserved[owner] = count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return count
    try:
        taken = len(os.listdir("/proc/self/fd"))
    except OSError:
        taken = soft  # there is not even one to look with
    wanted = taken + max(count, sum(list(_reserved.values()))) + _MARGIN
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return min(count, soft - taken)


def receive(line: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """A message of at most so many bytes, and the descriptors that came with it, which no program inherits.

    See recvmsg(2), MSG_CMSG_CLOEXEC. `socket.recv_fds` does not pass its flags on (Python 3.11).
    """
    room = socket.CMSG_LEN(most * _INT.size)
    message, ancillary, _, _ = line.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
    return message, fds


def release(owner: object) -> None:
    """The owner opens no more."""
    _reserved.pop(owner, None)
