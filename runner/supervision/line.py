"""The host's end of a worker's line: cancels, and lanes that are opened (`control/line_messages`)."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Sequence

from ..control.line_messages import pack_cancel, pack_open


class Line:
    """A socket that only the host writes to. It never waits: what there is no room for is kept, for `flush`."""

    __slots__ = ("_socket", "_unsent")

    def __init__(self, host_end: socket.socket) -> None:
        host_end.setblocking(False)
        host_end.shutdown(socket.SHUT_RD)  # the worker can send nothing, and no descriptors either
        self._socket = host_end
        self._unsent: deque[bytes] = deque()

    @property
    def fd(self) -> int:
        """Its descriptor, -1 once it is closed."""
        return self._socket.fileno()

    @property
    def flushed(self) -> bool:
        """Whether all that was said is in the socket."""
        return not self._unsent

    @property
    def heard(self) -> bool:
        """Whether the worker has taken all that was said."""
        if self._unsent or self.fd < 0:
            return False
        return bool(struct.unpack("i", fcntl.ioctl(self.fd, termios.TIOCOUTQ, b"\0" * 4))[0] == 0)

    def cancel(self, lane: int, job: int) -> bool:
        """Tell which job is cancelled. False where the worker has closed its end: it is not an honest one."""
        self._unsent.append(pack_cancel(lane, job))
        return self.flush()

    def flush(self) -> bool:
        """Send what there was no room for, as far as there is now. False where the worker has closed its end."""
        while self._unsent:
            try:
                self._socket.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self._unsent.popleft()
        return True

    def open_lane(self, lane: int, fds: Sequence[int]) -> None:
        """Hand over the descriptors of a lane. BlockingIOError where there is no room for it."""
        socket.send_fds(self._socket, [pack_open(lane)], fds, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Close it. A worker of several lanes takes it as the sign that no more are opened."""
        self._socket.close()


def make_line() -> tuple[Line, int]:
    """A line, and the descriptor that is the worker's."""
    host_end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        return Line(host_end), theirs.detach()
    except BaseException:
        host_end.close()
        theirs.close()
        raise
