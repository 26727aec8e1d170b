"""The thread of a host that looks after its agents: pings them, hears them, and sees out the lanes that were left."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from .lane import RemoteLane

if TYPE_CHECKING:
    from ..supervision.abandoned_jobs import Remainder
    from .link import AgentLink

logger = logging.getLogger("blastdoor")

BEAT: Final = 1.0
"""Seconds between two pings of an agent."""

_AGAIN: Final = 1.0
"""Seconds after which a cancel is said again that its agent has not acknowledged by closing the lane."""

_LEFT: Final = 10.0
"""Seconds that an agent has to end what a caller has left; then its connection is closed all the same."""

_TELL: Final = 2.0
"""Seconds that subscribers have at the end to hear what they were not told yet."""


class LinkedProtocol(Protocol):
    """What the pulse knows of its host."""

    links: dict[str, AgentLink]

    @property
    def leases(self) -> Any: ...


class LeftJob:
    """What holds a lane that its job has left, until the agent has done with it."""

    method = target = job_id = ""
    began = 0.0
    settled = over = False

    def __init__(self, remainder: Remainder) -> None:
        self.remainder = remainder

    def close(self, cause: BaseException | None = None) -> None:
        """It is being ended."""

    def over_time(self, detail: str) -> None:
        """It is being ended."""


class Pulse:
    """A thread that pings the agents, hears them, and sees out the lanes that were left."""

    def __init__(self, host: LinkedProtocol) -> None:
        self._host = host
        self._epoll: select.epoll | None = None
        self._wake_fd = -1
        self._calls: deque[Callable[[], object]] = deque()
        self._watched: dict[int, Callable[[], object]] = {}
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._leaving: dict[int, tuple[RemoteLane, LeftJob]] = {}
        self._ended = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._news: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None

    def start(self) -> None:
        """Begin. RuntimeError where the system gives no thread, OSError where it gives no descriptor."""
        self._news = queue.SimpleQueue()
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._ended = False
        self._closed = False
        self._teller = threading.Thread(target=self._tell_all, args=(self._news,), name="blastdoor-news", daemon=True)
        self._teller.start()
        self._thread = threading.Thread(target=self._run, name="blastdoor-pulse", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End, with all that is left."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ended = True
        self._wake()
        if thread is not threading.current_thread():
            thread.join()
        self._news.put(None)
        assert self._epoll is not None
        for link in list(self._host.links.values()):
            link.close()
        self._closed = True
        self._do_late()
        for lane, _ in list(self._leaving.values()):
            self._host.leases.discard(lane)
        self._leaving.clear()
        self._watched.clear()
        self._timers.clear()
        self._epoll.close()
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)
        if self._teller is not None and self._teller is not threading.current_thread():
            self._teller.join(_TELL)

    def call(self, step: Callable[[], object]) -> None:
        """Have something done in the thread. It never waits."""
        self._calls.append(step)
        self._wake()
        self._do_late()

    def _do_late(self) -> None:
        """Once it has ended there is nothing left that a step could disturb: whoever comes then does it himself."""
        while self._closed and self._calls:
            with contextlib.suppress(IndexError):
                self._calls.popleft()()

    def tell(self, step: Callable[[], object]) -> None:
        """Have subscribers told of something, in a thread where they may take their time."""
        self._news.put(step)

    def after(self, seconds: float, step: Callable[[], object]) -> None:
        """Have something done later. In the thread."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), step))

    def watch(self, fd: int, step: Callable[[], object], *, write: bool = False) -> None:
        """Have something done whenever there is something to read, or room to write. In the thread."""
        assert self._epoll is not None
        events = select.EPOLLIN | (select.EPOLLOUT if write else 0)
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._epoll.register(fd, events)
        self._watched[fd] = step

    def unwatch(self, fd: int) -> None:
        """Look at it no more: before it is closed. In the thread."""
        if self._watched.pop(fd, None) is not None and self._epoll is not None and not self._epoll.closed:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def see_out(self, lane: RemoteLane, left: LeftJob, *, tail: bool) -> None:
        """Take what is still to come on a lane, for nobody. In the thread."""
        fd = lane.channel.response_fd
        if fd < 0:
            return
        if self._closed:
            self._host.leases.discard(lane)
            return
        self._leaving[fd] = lane, left

        def is_leaving() -> bool:
            return self._leaving.get(fd) == (lane, left)

        def look() -> None:
            frames = lane.channel.receive()
            exchange = left.remainder.exchange
            if frames:
                exchange.receive(frames)
                exchange.body.clear()
            if frames is None or (tail and not exchange.unfinished):
                self.unwatch(fd)
                self._leaving.pop(fd, None)
                fit = frames is not None and exchange.whole and not exchange.violation and lane.channel.ready_for_next
                (self._host.leases.give_back if fit else self._host.leases.discard)(lane)

        def give_up() -> None:
            if is_leaving():
                self.unwatch(fd)
                del self._leaving[fd]
                self._host.leases.discard(lane)

        def again() -> None:
            if is_leaving():
                lane.link.cancel(lane)  # the connection that was to tell it may have broken
                self.after(_AGAIN, again)

        self.watch(fd, look)
        self.after(_LEFT, give_up)
        if not tail:
            self.after(_AGAIN, again)
        look()

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors."""
        if self._epoll is not None and not self._epoll.closed:
            self._epoll.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._thread = None

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)

    def _tell_all(self, news: queue.SimpleQueue[Callable[[], object] | None]) -> None:
        while (step := news.get()) is not None:
            try:
                step()
            except Exception:
                logger.exception("telling of what has happened on a node failed")

    def _run(self) -> None:
        self._beat()
        while not self._ended:
            try:
                self._turn()
            except Exception:
                logger.exception("looking after the cluster's agents failed")

    def _turn(self) -> None:
        assert self._epoll is not None
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        timeout = max(self._timers[0][0] - time.monotonic(), 0.0) if self._timers else BEAT
        if self._calls or self._ended:
            return
        for fd, _ in self._epoll.poll(timeout):
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif (step := self._watched.get(fd)) is not None:
                step()

    def _beat(self) -> None:
        self.after(BEAT, self._beat)
        for link in list(self._host.links.values()):
            link.beat()
        self._host.leases.reclaim()
