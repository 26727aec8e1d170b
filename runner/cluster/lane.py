"""A lane to an agent, as its host has it: a connection in the place of a worker's pair of pipes.

What comes over it are a worker's frames, and two more: TAKEN, with the pid of the worker that has the job, and OUTCOME,
where it did not end with a whole response.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from ..supervision.channel import Channel
from ..supervision.record import Lane
from ..wire.exchange import ResponseExchange, State
from ..wire.frames import BODY, END, HEAD, MAX_BODY, MAX_FAULT, MAX_HEAD, Frame, FrameDecoder
from .messages import JobEnd

if TYPE_CHECKING:
    from .placement import Node, Slot

TAKEN: Final = 32
OUTCOME: Final = 33

_READ_SIZE: Final = 256 * 1024

FROM_AGENT: Final[Mapping[int, int]] = {
    TAKEN: 16,
    HEAD: MAX_HEAD,
    BODY: MAX_BODY,
    END: 1,
    OUTCOME: 4 * MAX_FAULT + 4096,  # what a worker says may grow as it is made fit to be shown
}
"""What an agent sends: for each job TAKEN, then a worker's head and body, and END or OUTCOME."""

_decode_pid = msgspec.msgpack.Decoder(int).decode
_decode_end = msgspec.msgpack.Decoder(JobEnd).decode


class LaneChannel(Channel):
    """Frames to an agent, and from it: a socket, by two descriptors, as the ends of two pipes."""

    __slots__ = ()

    def __init__(self, sock: socket.socket) -> None:
        """It is the channel's from now on. OSError where no descriptor is left."""
        fd = sock.detach()
        try:
            request_fd = os.dup(fd)
        except OSError:
            os.close(fd)
            raise
        try:
            super().__init__(request_fd, fd)
        except OSError:
            os.close(request_fd)
            os.close(fd)
            raise
        self._decoder = FrameDecoder(FROM_AGENT)

    def receive(self) -> list[Frame] | None:
        """As of a pipe, but more at once: a socket holds more."""
        try:
            data = os.read(self.response_fd, _READ_SIZE)
        except BlockingIOError:
            self.starved = True
            return []
        except OSError:  # it was reset, or its time is up
            return None
        self.starved = False
        return self._decoder.feed(data) if data else None

    def wait_and_receive(self) -> list[Frame]:
        """As of a pipe; a connection that was reset is for `receive` to find."""
        try:
            return super().wait_and_receive()
        except OSError:
            return []

    def send(self, *pieces: bytes | memoryview) -> None:
        """As into a pipe. BrokenPipeError where the connection is over, however it has ended."""
        try:
            super().send(*pieces)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BrokenPipeError(error.errno, str(error)) from error

    def flush(self) -> None:
        """As into a pipe. BrokenPipeError as `send`."""
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BrokenPipeError(error.errno, str(error)) from error

    def unread(self) -> int:
        """What an agent has not taken is not known here."""
        return 0

    def leave(self) -> None:
        """Send nothing more: the agent ends the job, if it has one. Closing must not say so: a fork does that too."""
        if self.request_fd >= 0:
            sock = socket.socket(fileno=self.request_fd)
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was reset
            finally:
                sock.detach()
        self.end_requests()

    @property
    def stale(self) -> bool:
        """Whether an idle connection has something to say: it was closed, and is of no use."""
        return any(self.wait(0))


class _NoLog:
    """In the place of a worker's log, which is its agent's concern."""

    job_id = ""

    def tail(self, job_id: str) -> str:
        """Nothing is known here of what a worker has printed."""
        return ""

    def charge(self, size: int) -> bool:
        """What is told of the worker is logged."""
        return True

    def read(self) -> list[int]:
        """There is nothing to read."""
        return []


class LaneWorker:
    """What a job knows of a worker that is behind an agent. `dead` says that the lane is of no use any more."""

    concurrency = 1
    casualties = 0
    running = 1
    status: int | None = None
    limit_exceeded = ""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.dead = False
        self.last_words_told = False
        self.exited = threading.Event()
        self.log = _NoLog()


class LinkProtocol(Protocol):
    """What a lane knows of its link. `lost` says why its agent was given up, and is empty where it was not."""

    lost: str
    node: Node
    leases: LeasesProtocol

    def put_idle(self, lane: RemoteLane) -> None:
        """A lane is free again."""

    def close_lane(self, lane: RemoteLane) -> None:
        """Close a lane that nobody uses any more."""

    def cancel(self, lane: RemoteLane) -> None:
        """Have the agent end the job of a lane."""


class LeasesProtocol(Protocol):
    """What a job does with a lane that a machine's lease does not know."""

    def give_back_busy(self, lane: RemoteLane) -> None:
        """No worker of the node was free."""

    def discard(self, lane: RemoteLane) -> None:
        """A lane is of no use any more."""


class RemoteLane(Lane):
    """A lane to an agent. `slot` is its place in `Placement` while it is leased; `remote` its number at the agent."""

    __slots__ = ("idle_since", "link", "remote", "slot")

    def __init__(self, link: LinkProtocol, remote: int, channel: LaneChannel) -> None:
        super().__init__(LaneWorker(), 0, channel)  # type: ignore[arg-type] # a job takes it for a worker
        self.link = link
        self.remote = remote
        self.slot: Slot | None = None
        self.idle_since = time.monotonic()


class RemoteExchange(ResponseExchange):
    """A response that comes from an agent. `pid` is the worker's, once it is known, `outcome` how the job has ended."""

    __slots__ = ("outcome", "pid")

    def __init__(self, job: int, method: str) -> None:
        super().__init__(job, method)
        self.pid: int | None = None
        self.outcome: JobEnd | None = None

    def receive(self, frames: Iterable[Frame]) -> None:
        """Take the next frames. Never raises: a violation ends in the state BROKEN."""
        for frame in frames:
            if frame[0] < TAKEN:
                super().receive((frame,))
            elif not self.unfinished:
                self.violation = "frames after the end of the response"
            elif frame[1] != self.job:
                self._break(f"frame of job number {frame[1]} in the middle of job number {self.job}")
            else:
                self._receive_own(frame)

    def _receive_own(self, frame: Frame) -> None:
        kind, _, payload = frame
        try:
            if kind == TAKEN:
                self.pid = _decode_pid(payload)
            else:
                self.outcome = _decode_end(payload)
                self.whole |= self.complete
                self.state = State.FAULTED
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._break(f"a frame of kind {kind} does not hold up: {error}")
