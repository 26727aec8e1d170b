"""A host's side of a cluster: what its jobs know of it, its leases, and the thread beside them."""

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
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..errors import PoolClosed
from ..events import Events
from ..model.limits import Limits
from ..platform import descriptors
from ..supervision.waiters import in_thread
from .lane import LaneWorker, RemoteLane
from .link import Unreachable
from .placement import Placement, Slot

if TYPE_CHECKING:
    from ..model.cancel_scope import CancelScope
    from ..supervision.abandoned_jobs import Remainder
    from ..supervision.job_protocol import JobProtocol
    from ..supervision.record import Lane
    from .handshake import Dial
    from .link import AgentLink
    from .tls import ClusterTLS, Relay

logger = logging.getLogger("blastdoor")

BEAT: Final = 1.0
"""Seconds between two pings of an agent."""

_TELL: Final = 2.0
"""Seconds that subscribers have at the end to hear what they were not told yet."""

_PER_LANE: Final = 4
"""Descriptors of a lane: its socket, by two, what wakes it, and what an event loop waits for."""

_AGAIN: Final = 1.0
"""Seconds after which a cancel is said again that its agent has not acknowledged by closing the lane."""

_LEFT: Final = 10.0
"""Seconds that an agent has to end what a caller has left; then its connection is closed all the same."""


def _left(until: float | None) -> float | None:
    return None if until is None else max(until - time.monotonic(), 0.0)


class RemoteLeases:
    """Lanes to agents, for one job at a time. Which node it is, and who waits, is `Placement`'s to say."""

    def __init__(self, host: ClusterHost) -> None:
        self._host = host
        self._placement = host.placement
        self._leased: set[RemoteLane] = set()

    def lease(self, timeout: float | None, scope: CancelScope | None, provider: str, caller: object) -> RemoteLane:
        """A lane to the least loaded node. Raises as `Placement.lease`, and WorkersUnavailable."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            slot = self._placement.lease(_left(until), scope, provider)
            try:
                link = self._link_of(slot)
                lane = None if link is None else link.take_idle()
                if lane is None and link is not None:
                    link.open_idle(_left(until))
                    lane = link.take_idle()
                if lane is not None:
                    return self._give(lane, slot, caller)
            except Unreachable as error:
                logger.warning("%s: its jobs go elsewhere", error)
            except BaseException:
                self._take_back(slot)
                raise
            self._placement.give_back(slot)

    async def lease_async(
        self, timeout: float | None, scope: CancelScope | None, provider: str, caller: object
    ) -> RemoteLane:
        """As `lease`, for a task: connections are made in a thread."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            slot = await self._placement.lease_async(_left(until), scope, provider)
            try:
                link = self._link_of(slot)
                lane = None if link is None else link.take_idle()
                if lane is None and link is not None:
                    opened = link
                    await in_thread(lambda: opened.open_idle(_left(until)))  # noqa: B023 - it is waited for here
                    lane = link.take_idle()
                if lane is not None:
                    return self._give(lane, slot, caller)
            except Unreachable as error:
                logger.warning("%s: its jobs go elsewhere", error)
            except BaseException:
                self._take_back(slot)
                raise
            self._placement.give_back(slot)

    def _link_of(self, slot: Slot) -> AgentLink | None:
        host = self._host
        if host.closing:
            raise PoolClosed("the pool is closed: open a new one")
        link = host.links.get(slot.node.name)
        if link is None or not link.look():
            self._placement.remove(slot.node)
            return None
        return link

    def _give(self, lane: RemoteLane, slot: Slot, caller: object) -> RemoteLane:
        lane.slot, lane.caller, lane.job = slot, weakref.ref(caller), None
        self._leased.add(lane)
        return lane

    def _take_back(self, slot: Slot) -> None:
        """Something was raised: the slot is nobody's, unless a lane has it already."""
        if not any(lane.slot is slot for lane in list(self._leased)):
            self._placement.give_back(slot)

    def held_by(self, caller: object) -> RemoteLane | None:
        """The lane that was leased for this call, and that no job holds."""
        for lane in list(self._leased):
            if lane.job is None and lane.caller is not None and lane.caller() is caller:
                return lane
        return None

    def give_back(self, lane: RemoteLane) -> None:
        """A job is over, and its lane fit for the next."""
        if (slot := self._release(lane)) is not None:
            lane.link.put_idle(lane)
            self._placement.give_back(slot)

    def give_back_busy(self, lane: RemoteLane) -> None:
        """No worker of the node was free: others are tried first for a while."""
        if (slot := self._release(lane)) is not None:
            lane.link.put_idle(lane)
            self._placement.full(slot)

    def discard(self, lane: RemoteLane) -> None:
        """A lane is of no use any more."""
        slot = self._release(lane)
        lane.link.close_lane(lane)
        if slot is not None:
            self._placement.give_back(slot)

    def refuse_lane(self, lane: RemoteLane) -> None:
        """An agent does not refuse lanes."""
        self.discard(lane)

    def kill(self, worker: LaneWorker) -> None:
        """What is behind the lane is of no use any more: its agent sees to it."""
        worker.dead = True
        worker.exited.set()

    def jobs(self) -> list[JobProtocol]:
        """The jobs that hold a lane."""
        found = [lane.job() for lane in list(self._leased) if lane.job is not None]
        return [job for job in found if job is not None]

    def reclaim(self) -> None:
        """Give up the lanes of callers that are gone without a word."""
        for lane in list(self._leased):
            if lane.forgotten:
                self.discard(lane)

    def _release(self, lane: RemoteLane) -> Slot | None:
        """It is nobody's now; gives its slot, once."""
        self._leased.discard(lane)
        slot, lane.slot = lane.slot, None
        lane.caller = lane.job = None
        return slot


class ClusterHost:
    """What the jobs of one ClusterPool share: the nodes' links, the leases, events, and the pulse."""

    def __init__(self, name: str, placement: Placement, events: Events, tls: ClusterTLS | None = None) -> None:
        self.name = name
        self._tls = tls
        self._relay: Relay | None = None
        self.dial: Dial | None = None
        self.placement = placement
        self.events = events
        self.limits = Limits()
        self.links: dict[str, AgentLink] = {}
        self.closing = False
        self.in_forked_child = False
        self.leases: Any = RemoteLeases(self)  # to jobs a machine's leases
        self.pulse = Pulse(self)

    def begin(self) -> None:
        """Begin to look after agents. RuntimeError and OSError where the system gives no thread, or no descriptor."""
        if self._tls is not None:
            from .tls import Relay  # loaded where it is used

            self._relay = Relay(self._tls)
            self.dial = self._relay.dial
        self.pulse.start()

    def end(self) -> None:
        """End all connections."""
        self.pulse.end()
        descriptors.release(self.name)
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()

    def make_room(self) -> None:
        """Have the descriptors that lanes to all nodes can need."""
        lanes = sum(node.capacity for node in self.placement.nodes())
        descriptors.make_room(_PER_LANE * lanes, self.name)

    def look_for_lost(self) -> None:
        """The pulse does so every second."""

    def look_after_jobs(self) -> None:
        """Limits are kept by the agents."""

    def adopt(self, lane: Lane, remainder: Remainder) -> None:
        """A job has left this lane: have its agent end it, or wait for the little that is to come."""
        assert isinstance(lane, RemoteLane)
        tail = remainder.exchange.background
        if not tail:
            lane.channel.end_requests()
            lane.link.cancel(lane)
        self.pulse.call(lambda: self.pulse.see_out(lane, remainder, tail=tail))

    def after_fork_in_child(self) -> None:
        """This is a forked child now: the connections are the parent's."""
        self.in_forked_child = True
        for link in self.links.values():
            link.after_fork_in_child()
        self.pulse.after_fork_in_child()


class Pulse:
    """A thread that pings the agents, hears them, and sees out the lanes that were left."""

    def __init__(self, host: ClusterHost) -> None:
        self._host = host
        self._epoll: select.epoll | None = None
        self._wake_fd = -1
        self._calls: deque[Callable[[], object]] = deque()
        self._watched: dict[int, Callable[[], object]] = {}
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._leaving: dict[int, RemoteLane] = {}
        self._ended = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._news: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None

    def start(self) -> None:
        """Begin. RuntimeError where the system gives no thread, OSError where it gives no descriptor."""
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._ended = False
        self._closed = False
        self._teller = threading.Thread(target=self._tell_all, name="blastdoor-news", daemon=True)
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
        while self._calls:
            self._calls.popleft()()
        for lane in list(self._leaving.values()):
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
        if self._closed:
            step()  # there is nothing left that it could disturb
            return
        self._calls.append(step)
        self._wake()

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
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = step

    def unwatch(self, fd: int) -> None:
        """Look at it no more: before it is closed. In the thread."""
        if self._watched.pop(fd, None) is not None and self._epoll is not None and not self._epoll.closed:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def see_out(self, lane: RemoteLane, remainder: Remainder, *, tail: bool) -> None:
        """Take what is still to come on a lane, for nobody. In the thread."""
        fd = lane.channel.response_fd
        if fd < 0:
            return
        if self._closed:
            self._host.leases.discard(lane)
            return
        self._leaving[fd] = lane

        def look() -> None:
            frames = lane.channel.receive()
            exchange = remainder.exchange
            if frames:
                exchange.receive(frames)
                exchange.body.clear()
            if frames is None or (tail and not exchange.unfinished):
                self.unwatch(fd)
                self._leaving.pop(fd, None)
                fit = frames is not None and exchange.whole and not exchange.violation and lane.channel.ready_for_next
                (self._host.leases.give_back if fit else self._host.leases.discard)(lane)

        def give_up() -> None:
            if self._leaving.get(fd) is lane:
                self.unwatch(fd)
                del self._leaving[fd]
                self._host.leases.discard(lane)

        def again() -> None:
            if self._leaving.get(fd) is lane:
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

    def _tell_all(self) -> None:
        while (step := self._news.get()) is not None:
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
