"""The host's end of a worker's line: cancels, and lanes that are opened (`control/line_messages`)."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from ..control.line_messages import pack_cancel, pack_open


class Line:
    """A socket that only the host writes to. It never waits: who leaves its messages unread gets no more."""

    __slots__ = ("_socket",)

    def __init__(self, host_end: socket.socket) -> None:
        host_end.setblocking(False)
        host_end.shutdown(socket.SHUT_RD)  # the worker can send nothing, and no descriptors either
        self._socket = host_end

    @property
    def fd(self) -> int:
        """Its descriptor, -1 once it is closed."""
        return self._socket.fileno()

    def cancel(self, lane: int, job: int) -> bool:
        """Tell which job is cancelled. False where the worker does not take it: it is not an honest one."""
        try:
            self._socket.send(pack_cancel(lane, job), socket.MSG_NOSIGNAL)
        except OSError:
            return False
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
