"""A lane without a worker process: the host's real record, channel and leases, with the test at the far ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from runner.events import Event, Events
from runner.jobs.dispatch import Dispatch
from runner.jobs.job import Job
from runner.model.limits import Limits
from runner.model.request import Request, Upload
from runner.supervision import record
from runner.supervision.abandoned_jobs import Remainder
from runner.supervision.channel import Channel, make_pipe
from runner.supervision.leases import Leases
from runner.supervision.line import make_line
from runner.supervision.logs import LogPipe
from runner.supervision.record import Worker
from runner.wire.frames import (
    END,
    FAULT,
    HEAD,
    TO_WORKER,
    Frame,
    FrameDecoder,
    encode,
)
from runner.wire.messages import FaultReport, JobContext, ResponseHead


class Lane:
    """One worker of a pool that has no other, and no process. It is the `SupervisorProtocol` of its jobs.

    `adopted` is what jobs have left with it. `say` writes frames as the worker would, `heard` gives what has come.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.events = Events()
        self.leases = Leases()
        self.in_forked_child = False
        self.adopted: list[tuple[record.Lane, Remainder]] = []
        self.seen: list[Event] = []
        self.events.subscribe(self.seen.append)
        request_read, request_write = make_pipe()
        response_read, response_write = make_pipe()
        out_read, out_write = make_pipe()
        err_read, err_write = make_pipe()
        line, self._line_fd = make_line()
        os.set_blocking(request_read, False)
        self._request_fd, self._response_fd = request_read, response_write
        self._log_fds = [out_write, err_write]
        self._decoder = FrameDecoder(TO_WORKER)
        self._number = 0
        channel = Channel(request_write, response_read)
        self.worker = Worker(1, channel, line, LogPipe(out_read, err_read, "worker 1"))
        self.lane = self.worker.lanes[0]
        self.worker.pid = 4711
        self.leases.add(self.worker)

    def look_for_lost(self) -> None:
        """Nobody else looks after this worker."""

    def look_after_jobs(self) -> None:
        """Nor after its jobs."""

    def adopt(self, lane: record.Lane, remainder: Remainder) -> None:
        """Note what a job has left."""
        self.adopted.append((lane, remainder))

    def say(self, *frames: tuple[int, Any], job: int = 1) -> None:
        """Write frames, of this job of the worker's, in one write: whoever reads one of them has all."""
        written = b""
        for kind, payload in frames:
            data = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
            written += encode(kind, job, data)
        os.write(self._response_fd, written)

    def heard(self) -> list[Frame]:
        """The frames of the request that have come since the last time."""
        try:
            data = os.read(self._request_fd, 1 << 20)
        except BlockingIOError:
            return []
        return self._decoder.feed(data)

    def die(self, status: int) -> None:
        """End as a process does: its pipes close, and its status becomes known."""
        os.close(self._response_fd)
        self._response_fd = -1
        self.leases.mark_exited(self.worker, status)

    def request(self, method: str = "GET", body: Any = None) -> Dispatch:
        """A prepared request."""
        self._number += 1
        upload = Upload(body)
        return Dispatch(
            Request(method, "/path", body=body), upload, JobContext(), f"job-{self._number}", 1.0, (None, None)
        )

    def open(self, method: str = "GET", body: Any = None) -> Job:
        """A job of this worker's. What it is answered has to be said before."""
        return self.request(method, body).run(self)

    @property
    def states(self) -> tuple[int, int]:
        """How many workers are idle, and how many are held."""
        numbers = self.leases.numbers()
        return numbers.idle, numbers.running

    def close(self) -> None:
        """Free all descriptors."""
        for fd in (self._request_fd, self._response_fd, self._line_fd, *self._log_fds):
            if fd >= 0:
                os.close(fd)
        self.worker.log.close(told=True)
        self.worker.close()
        self.lane.channel.close()


@contextmanager
def lane(limits: Limits | None = None) -> Iterator[Lane]:
    """A lane for the length of a block."""
    made = Lane(limits)
    try:
        yield made
    finally:
        made.close()


HEAD_200 = (HEAD, ResponseHead(200, []))
END_FRAME = (END, b"")
RAISED = (FAULT, FaultReport("raised", "ValueError", "no", "trace"))
