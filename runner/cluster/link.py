"""A host's line to one agent: its lanes, and the connection beside them, by which both know that the other lives."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from ..errors import WorkersUnavailable
from .handshake import CONTROL, LANE, Stranger, connect
from .lane import LaneChannel, LeasesProtocol, RemoteLane
from .messages import Beside, Cancel, Heartbeat, JoinReply, Ping, decode_event, encode
from .placement import Node
from .side import PulseProtocol, SideConnection

if TYPE_CHECKING:
    from ..events import Events
    from .handshake import Dial
    from .placement import Placement

logger = logging.getLogger("blastdoor")

SILENT: Final = 2.0
"""Seconds without a heartbeat after which no new jobs go to an agent."""

GIVE_UP: Final = 4.0
"""Seconds after which its jobs are lost. Less than LEASE, after which it ends them: it never forgets its host first."""

CONNECT_SECONDS: Final = 2.0
"""Seconds that a connection to an agent may take."""

_PAUSES: Final = (0.05, 1.0)
"""Seconds until a connection that broke is tried again: at first, and at most."""

KEEP: Final = 60.0
"""Seconds that a lane is kept that nobody uses."""

_CROWDED: Final = (0.005, 0.2)
"""Seconds for which others are tried first, where an agent has dropped a connection: at first, and at most."""

_OWN_TROUBLE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))
_NO_HEARTBEAT: Final = Heartbeat(True, 0, 0, 0, 0, 0, 0, [], [], [], 0)
decode_heartbeat = msgspec.msgpack.Decoder(Heartbeat).decode


class HostProtocol(Protocol):
    """What a link knows of its host."""

    name: str
    placement: Placement
    events: Events
    dial: Dial | None

    @property
    def pulse(self) -> PulseProtocol: ...

    @property
    def leases(self) -> Any: ...


class Unreachable(Exception):
    """No connection to an agent can be had."""


def _was_dropped(error: OSError) -> bool:
    """Whether the agent is there, and did not take this connection in."""
    return isinstance(error, ConnectionError) and not isinstance(error, (ConnectionRefusedError, Stranger))


class AgentLink:
    """One agent, as its host sees it.

    Lanes are connections, opened as they are needed, used again, and closed after a while without use. `lanes` are all
    of them, guarded by `lock`: those that are leased, idle, or left by their jobs.
    """

    def __init__(self, actor: Any, node: Node, joined: JoinReply, host: HostProtocol) -> None:
        self.actor = actor
        self.node = node
        self.lost = ""
        self.heartbeat = _NO_HEARTBEAT
        self.on_lost: Callable[[AgentLink], object] = lambda link: None
        self.lanes: set[RemoteLane] = set()
        self.lock = threading.RLock()  # reentrant: a finalizer may close a job in the middle of anything
        self._idle: list[RemoteLane] = []
        self.leases: LeasesProtocol = host.leases
        self._host = host
        self._address = joined.address, joined.port
        self._secret = joined.secret
        self._heard = time.monotonic()
        self._seen = joined.seen
        self._first = threading.Event()
        self._beside: SideConnection | None = None
        self._connecting = False
        self._pause = _PAUSES[0]
        self._crowded = _CROWDED[0]
        self._not_before = 0.0

    def begin(self) -> None:
        """Connect, and wait for the first heartbeat. OSError where there is none."""
        until = time.monotonic() + CONNECT_SECONDS
        while True:
            left = until - time.monotonic()
            try:
                sock, _ = connect(self._address, self._secret, CONTROL, self._host.name, left, self._host.dial)
                break
            except ConnectionError as error:
                if not _was_dropped(error) or until - time.monotonic() < 2 * _CROWDED[1]:
                    raise
            time.sleep(random.uniform(*_CROWDED))
        self._attach(sock)
        if not self._first.wait(CONNECT_SECONDS):
            raise TimeoutError("it does not answer")

    # -- lanes -------------------------------------------------------------------------------------

    def take_idle(self) -> RemoteLane | None:
        """A lane that nobody uses, and that is sound as far as is known."""
        while True:
            with self.lock:
                if not self._idle:
                    return None
                lane = self._idle.pop()
            if not lane.channel.stale:  # type: ignore[attr-defined] # a lane to an agent has a socket
                return lane
            self.close_lane(lane)

    def put_idle(self, lane: RemoteLane) -> None:
        """A lane is free again."""
        with self.lock:
            if not self.lost and lane in self.lanes:
                lane.idle_since = time.monotonic()
                self._idle.append(lane)
                return
        self.close_lane(lane)

    def _close_unused(self, before: float) -> None:
        """Close the lanes that nobody has used since: the one that was used last is taken first."""
        with self.lock:
            while self._idle and self._idle[0].idle_since < before:
                self.close_lane(self._idle.pop(0))

    def open_idle(self, timeout: float | None) -> None:
        """Have one more idle lane; or none, after a moment, where the agent has too many others on their way.

        WorkersUnavailable where this process has no descriptor left for it. Unreachable where the agent can't be
        connected to: its node gets no jobs before its next heartbeat.
        """
        seconds = CONNECT_SECONDS if timeout is None else min(max(timeout, 0.1), CONNECT_SECONDS)
        try:
            sock, number = connect(self._address, self._secret, LANE, self._host.name, seconds, self._host.dial)
            channel = LaneChannel(sock)
        except OSError as error:
            if error.errno in _OWN_TROUBLE:
                raise WorkersUnavailable(f"no connection to an agent can be made: {error}", 1.0) from error
            if _was_dropped(error):
                self._pause_after_drop()
                return
            self._host.placement.update(self.node, silent=True)
            raise Unreachable(f"the agent on node {self.node.address} can't be reached: {error}") from error
        self._crowded = _CROWDED[0]
        lane = RemoteLane(self, number, channel)
        with self.lock:
            if not self.lost:
                self.lanes.add(lane)
                self._idle.append(lane)
                return
        channel.close()

    def _pause_after_drop(self) -> None:
        """The agent is there, and too many connections are on their way to it: other nodes are tried first."""
        pause = self._crowded
        self._crowded = min(2 * pause, _CROWDED[1])
        self._host.placement.update(self.node, paused_until=time.monotonic() + pause)
        time.sleep(random.uniform(0, _CROWDED[0]))  # where there are no others

    def close_lane(self, lane: RemoteLane) -> None:
        """Close a lane that nobody uses any more."""
        with self.lock:
            if lane in self.lanes:
                self.lanes.discard(lane)
                with contextlib.suppress(ValueError):
                    self._idle.remove(lane)
                lane.channel.close()

    def cancel(self, lane: RemoteLane) -> None:
        """Have the agent end the job of a lane, whatever waits on the lane itself."""
        self._host.pulse.call(lambda: self._say(Cancel(lane.remote)))

    # -- the connection beside -----------------------------------------------------------------------

    def beat(self) -> None:
        """Ping the agent, and give it up where it has been silent for too long. In the pulse's thread."""
        if self.lost:
            return
        now = time.monotonic()
        silence = now - self._heard
        if silence > GIVE_UP:
            self.lose(f"it has not answered for {silence:.1f} s")
            return
        if (silence > SILENT) is not self.node.silent:
            self._host.placement.update(self.node, silent=silence > SILENT)
        self._close_unused(now - KEEP)
        if self._beside is None:
            self.reconnect()
        self._say(Ping(self._seen, logger.getEffectiveLevel()))

    def reconnect(self) -> None:
        """Connect again, in a thread of its own, where that was not tried just now."""
        if self._connecting or self.lost or time.monotonic() < self._not_before:
            return
        self._connecting = True
        try:
            threading.Thread(target=self._connect_again, name="blastdoor-reconnect", daemon=True).start()
        except RuntimeError:
            self._connecting = False

    def _connect_again(self) -> None:
        try:
            sock, _ = connect(self._address, self._secret, CONTROL, self._host.name, CONNECT_SECONDS, self._host.dial)
        except OSError as error:
            self._pause = min(2 * self._pause, _PAUSES[1])
            self._not_before = time.monotonic() + self._pause
            logger.debug("node %s can't be reached: %s", self.node.address, error)
        else:
            self._pause = _PAUSES[0]
            self._attach(sock)
        finally:
            self._connecting = False

    def _attach(self, sock: socket.socket) -> None:
        self._host.pulse.call(lambda: self._use(sock))

    def _use(self, sock: socket.socket) -> None:
        if self.lost or self._beside is not None:
            sock.close()
            return
        self._beside = SideConnection(sock, self._host.pulse, self._on_message, self._on_broken)
        self._say(Ping(self._seen, logger.getEffectiveLevel()))

    def _say(self, message: Beside) -> None:
        if self._beside is not None:
            self._beside.send(encode(message))

    def _on_broken(self, why: str) -> None:
        """The connection beside the lanes has ended: where it is the agent that has, that is known soon."""
        self._beside = None
        if not self.lost:
            logger.warning("the connection to node %s broke: %s", self.node.address, why)
            self._not_before = time.monotonic() + self._pause
            self._host.pulse.after(self._pause, self.reconnect)

    def _on_message(self, data: bytes) -> None:
        try:
            heartbeat = decode_heartbeat(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            logger.error("node %s: a heartbeat can't be read: %s", self.node.address, error)
            return
        if not heartbeat.known:
            self.lose("it had taken this host for gone", answers=True)
            return
        self._heard = time.monotonic()
        self.heartbeat = heartbeat
        if heartbeat.seen > self._seen:
            self._seen = heartbeat.seen
            self._host.pulse.tell(lambda: self._tell_news(heartbeat))
        self._first.set()
        self._host.placement.update(self.node, silent=False, others=max(0, heartbeat.running - self.node.running))

    def _tell_news(self, heartbeat: Heartbeat) -> None:
        """Log what the agent has logged, and tell of what has happened to its workers."""
        for record in heartbeat.records:
            extra = {**record.extra, "node": self.node.address}
            logger.log(record.level, "node %s: %s", self.node.address, record.message, extra=extra)
        for data in heartbeat.events:
            try:
                event = decode_event(data)
            except (msgspec.MsgspecError, KeyError) as error:
                logger.error("node %s: an event can't be read: %s", self.node.address, error)
                continue
            self._host.events.emit(event)

    # -- the end -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Whether jobs may go there. A host that was stopped itself finds here that it was, before its next beat would:
        a job that it sent now would be lost with the agent."""
        silence = time.monotonic() - self._heard
        if silence > GIVE_UP:
            self.lose(f"it has not answered for {silence:.1f} s")
        return not self.lost

    def lose(self, why: str, *, answers: bool = False) -> None:
        """The agent is gone, or can't be reached: its jobs end with a 502, and nothing is sent there any more.

        One that `answers`, but knows nothing of this host any more, answers what is under way there itself.
        """
        with self.lock:
            if self.lost:
                return
            self.lost = why
            jobs = self._end_lanes(wake=not answers)
        self._host.placement.remove(self.node)
        logger.error("node %s is lost: %s; %d jobs ran there", self.node.address, why, jobs)
        self._host.pulse.call(self._drop_beside)
        self.on_lost(self)

    def _end_lanes(self, *, wake: bool = True) -> int:
        """Close the idle ones, and wake who holds another, and closes it; gives how many those are."""
        idle, self._idle = self._idle, []
        for lane in idle:
            self.close_lane(lane)
        for lane in list(self.lanes) if wake else ():
            lane.worker.dead = True
            lane.worker.exited.set()
            lane.channel.wake()
        return len(self.lanes)

    def close(self) -> None:
        """End all connections: the pool is closed."""
        with self.lock:
            self.lost = self.lost or "the pool is closed"
            self._end_lanes()
        self._drop_beside()

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors."""
        for lane in self.lanes:
            lane.channel.after_fork_in_child()
        if self._beside is not None:
            self._beside.sock.close()

    def _drop_beside(self) -> None:
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.close()
