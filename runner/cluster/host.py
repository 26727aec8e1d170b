"""A host's side of a cluster: what its jobs know of it, its leases, and the thread beside them."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from ..events import Events
from ..model.limits import Limits
from ..platform import descriptors
from ..pool_base import pool_is_closed
from ..supervision.waiters import in_thread
from .lane import LaneChannel, LaneWorker, RemoteLane
from .link import Unreachable
from .placement import Placement, Slot, too_late
from .pulse import LeftJob, Pulse

if TYPE_CHECKING:
    from ..model.cancel_scope import CancelScope
    from ..supervision.abandoned_jobs import Remainder
    from ..supervision.job_protocol import JobProtocol
    from ..supervision.record import Lane
    from .handshake import Dial
    from .link import AgentLink
    from .tls import ClusterTLS, Relay

logger = logging.getLogger("blastdoor")

_PER_LANE: Final = 4
"""Descriptors of a lane: its socket, by two, what wakes it, and what an event loop waits for."""


def _left(until: float | None) -> float | None:
    return None if until is None else max(until - time.monotonic(), 0.0)


class RemoteLeases:
    """Lanes to agents, for one job at a time. Which node it is, and who waits, is `Placement`'s to say."""

    def __init__(self, host: ClusterHost) -> None:
        self._host = host
        self._placement = host.placement
        self._leased: set[RemoteLane] = set()
        self._lock = threading.RLock()  # reentrant: a finalizer may close a job in the middle of anything

    def lease(self, timeout: float | None, scope: CancelScope | None, provider: str, caller: object) -> RemoteLane:
        """A lane to the least loaded node. Raises as `Placement.lease`, and WorkersUnavailable."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            slot = self._placement.lease(_left(until), scope, provider)
            try:
                lane = self._take(slot, caller)
                if lane is None:
                    self._connect(slot, _left(until))
                    lane = self._take(slot, caller)
            except BaseException:
                self._take_back(slot)
                raise
            if lane is not None:
                return lane
            self._placement.give_back(slot)
            if until is not None and time.monotonic() >= until:
                raise too_late(timeout)

    async def lease_async(
        self, timeout: float | None, scope: CancelScope | None, provider: str, caller: object
    ) -> RemoteLane:
        """As `lease`, for a task: connections are made in a thread."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            slot = await self._placement.lease_async(_left(until), scope, provider)
            try:
                lane = self._take(slot, caller)
                if lane is None:
                    await in_thread(functools.partial(self._connect, slot, _left(until)))
                    lane = self._take(slot, caller)
            except BaseException:
                self._take_back(slot)
                raise
            if lane is not None:
                return lane
            self._placement.give_back(slot)
            if until is not None and time.monotonic() >= until:
                raise too_late(timeout)

    def _take(self, slot: Slot, caller: object) -> RemoteLane | None:
        """A lane that is there, to this node."""
        link = self._link_of(slot)
        lane = None if link is None else link.take_idle()
        return None if lane is None else self._give(lane, slot, caller)

    def _connect(self, slot: Slot, timeout: float | None) -> None:
        """Have a new lane to this node, where it can be reached."""
        link = self._link_of(slot)
        if link is not None:
            try:
                link.open_idle(timeout)
            except Unreachable as error:
                logger.warning("%s: its jobs go elsewhere", error)

    def _link_of(self, slot: Slot) -> AgentLink | None:
        host = self._host
        if host.closing:
            raise pool_is_closed()
        link = host.links.get(slot.node.name)
        if link is None or not link.look():
            self._placement.remove(slot.node)
            return None
        return link

    def _give(self, lane: RemoteLane, slot: Slot, caller: object) -> RemoteLane:
        with self._lock:
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
        try:
            lane.link.close_lane(lane)
        finally:
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
            with self._lock:
                if lane in self._leased and lane.forgotten:
                    self.discard(lane)

    def _release(self, lane: RemoteLane) -> Slot | None:
        """It is nobody's now; gives its slot, once."""
        with self._lock:
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
        left = LeftJob(remainder)
        lane.job = weakref.ref(left)  # first: a lane without a job is taken for forgotten
        try:
            if not tail:
                assert isinstance(lane.channel, LaneChannel)
                lane.channel.leave()
                lane.link.cancel(lane)
        finally:
            self.pulse.call(lambda: self.pulse.see_out(lane, left, tail=tail))

    def after_fork_in_child(self) -> None:
        """This is a forked child now: the connections are the parent's."""
        self.in_forked_child = True
        if self._relay is not None:
            self._relay.after_fork_in_child()
        for link in self.links.values():
            link.after_fork_in_child()
        self.pulse.after_fork_in_child()
