"""Which front has room for more: a byte for each in memory that all of them share.

A front that has no free worker, and requests that wait, leaves new connections to one that has room. Each writes its
own byte only, so that there is nothing to lock; the parent writes the byte of one that is gone.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

_GONE: Final = 0
_ROOM: Final = 1
_FULL: Final = 2


class Room:
    """The bytes of all fronts. `fd` is the memory's descriptor (memfd_create(2))."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def make(cls, fronts: int) -> Room:
        """For so many fronts, none of which is there. OSError where it can't be had."""
        fd = os.memfd_create("blastdoor-room", os.MFD_CLOEXEC)
        os.ftruncate(fd, fronts)
        return cls(fd)

    def note(self, front: int, *, full: bool) -> None:
        """Whether a front is full."""
        self._bytes[front] = _FULL if full else _ROOM

    def forget(self, front: int) -> None:
        """A front is gone."""
        self._bytes[front] = _GONE

    def is_elsewhere(self, front: int) -> bool:
        """Whether another front has room."""
        others = bytearray(self._bytes[:])
        others[front] = _GONE
        return _ROOM in others

    def close(self) -> None:
        """Free it, in this process."""
        self._bytes.close()
        os.close(self.fd)
