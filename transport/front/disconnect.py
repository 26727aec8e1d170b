"""Hearing that a client hangs up while nothing is read from it."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable


class DisconnectWatch:
    """Hears of a connection what reading would tell, where nobody reads: `half_closed`, once, and its reset.

    asyncio reads no more after the end of what a client sends, nor while reading is paused.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, half_closed: Callable[[], object] | None
    ) -> None:
        sock: socket.socket = transport.get_extra_info("socket")
        self._fd = sock.fileno()
        self._loop = loop
        self._transport = transport
        self._half_closed = half_closed
        self._epoll = select.epoll(1)
        # EPOLLERR and EPOLLHUP are always told (epoll_ctl(2)).
        self._epoll.register(self._fd, 0 if half_closed is None else select.EPOLLRDHUP)
        loop.add_reader(self._epoll.fileno(), self._look)

    def _look(self) -> None:
        for _, events in self._epoll.poll(0):
            if events & (select.EPOLLERR | select.EPOLLHUP):
                self.end()
                self._transport.abort()
            elif self._half_closed is not None:
                self._epoll.modify(self._fd, 0)
                self._half_closed()

    def end(self) -> None:
        """Listen no more."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
