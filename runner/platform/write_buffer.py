"""Bytes on their way into a non-blocking pipe: what it does not take now stays for later."""

from __future__ import annotations

import itertools
import os
from collections import deque
from typing import Final

_MOST_BUFFERS: Final = 64


class WriteBuffer(deque[memoryview]):
    """The buffers that are still to be written, in order. Never more than a frame or two."""

    __slots__ = ()

    def flush(self, fd: int) -> int:
        """Write as much as the pipe takes now; how many bytes that was. BrokenPipeError where nobody reads any more."""
        total = 0
        while self:
            buffers = self if len(self) <= _MOST_BUFFERS else list(itertools.islice(self, _MOST_BUFFERS))
            try:
                written = os.writev(fd, buffers)
            except BlockingIOError:
                break
            total += written
            while written:
                first = self[0]
                if written < len(first):
                    self[0] = first[written:]
                    break
                written -= len(first)
                self.popleft()
        return total
