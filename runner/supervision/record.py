"""The host's record of one worker process, and of its lanes, each of which runs one job at a time."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from .channel import Channel, make_pipe

if TYPE_CHECKING:
    from .job_protocol import JobProtocol
    from .line import Line
    from .logs import LogPipe


class Lane:
    """A pair of pipes to a worker, and who has leased it. Guarded by the `Leases`, but for what only its holder uses.

    `turn` counts how often it was leased; `caller` is who leased it, `job` who holds it, once it has begun. `jobs`
    counts those, and `job_id` names the last of them.
    """

    __slots__ = (
        "caller",
        "channel",
        "earlier",
        "job",
        "job_id",
        "job_number",
        "jobs",
        "leased",
        "number",
        "provider",
        "turn",
        "worker",
    )

    def __init__(self, worker: Worker, number: int, channel: Channel) -> None:
        self.worker = worker
        self.number = number
        self.channel = channel
        self.leased = False
        self.provider = ""
        self.turn = 0
        self.caller: weakref.ref[object] | None = None
        self.job: weakref.ref[JobProtocol] | None = None
        self.jobs = 0
        self.job_id = ""
        self.job_number = 0
        self.earlier = 0, ""

    def name_job(self, job_id: str, number: int) -> None:
        """This is the job that begins on it, for the log: its id, and the number that its frames carry."""
        worker = self.worker
        if worker.concurrency == 1:
            worker.log.job_id = job_id
        elif number != self.job_number:
            self.earlier = self.job_number, self.job_id
        self.job_id, self.job_number = job_id, number

    @property
    def forgotten(self) -> bool:
        """Whether whoever leased it is gone, or has done with it, and has not said so."""
        if self.job is not None:
            job = self.job()
            return job is None or job.over
        return self.caller is None or self.caller() is None

    def __repr__(self) -> str:
        return f"<Lane {self.number} of {self.worker!r}>"


class Worker:
    """A process, with up to `concurrency` lanes. Guarded by its `Leases`.

    `free` are its open lanes that nobody holds, `running` is how many are held; `room` is where its leases keep it, -1
    where it gets no job. `leaving` says that it gets no more: it is to be replaced. `blocked` says that no more lanes
    can be opened at the moment, `most_lanes` is how many it takes. `turns` counts how often a lane of it was leased.
    `casualties` is how many jobs it had when it died. `threads` says that each job has a thread of its own.
    """

    __slots__ = (
        "blocked",
        "casualties",
        "concurrency",
        "dead",
        "ending",
        "exited",
        "failure",
        "failure_says_all",
        "free",
        "idle_since",
        "kill_sent",
        "lanes",
        "last_job",
        "last_words_told",
        "leaving",
        "limit_exceeded",
        "line",
        "log",
        "most_lanes",
        "number",
        "ordered_at",
        "pid",
        "pidfd",
        "ready",
        "ready_at",
        "room",
        "running",
        "status",
        "threads",
        "turns",
    )

    def __init__(self, number: int, channel: Channel, line: Line, log: LogPipe, concurrency: int = 1) -> None:
        self.number = number
        self.line = line
        self.log = log
        self.concurrency = concurrency
        self.lanes = [Lane(self, 0, channel)]
        self.free = list(self.lanes)
        self.running = 0
        self.room = -1
        self.casualties = self.turns = 0
        self.most_lanes = concurrency
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.ready = self.dead = self.kill_sent = self.leaving = self.blocked = self.ending = False
        self.last_words_told = self.threads = False
        self.ready_at = self.idle_since = 0.0
        self.ordered_at = time.monotonic()
        self.last_job: int | None = None
        self.limit_exceeded = ""
        self.failure = ""
        self.failure_says_all = False
        self.status: int | None = None
        self.exited = threading.Event()

    @property
    def channel(self) -> Channel:
        """That of its first lane, which it starts with."""
        return self.lanes[0].channel

    @property
    def jobs(self) -> int:
        """How many jobs it has had."""
        return sum([lane.jobs for lane in self.lanes])

    @property
    def was_leased(self) -> bool:
        """Whether it was given a job."""
        return any(lane.turn for lane in self.lanes)

    @property
    def in_service(self) -> bool:
        """Whether it may get a job, now or once a lane of it is free."""
        return self.ready and not (self.leaving or self.dead or self.kill_sent)

    @property
    def has_room(self) -> bool:
        """Whether one more lane may be opened."""
        return len(self.lanes) < self.most_lanes and not self.blocked

    def open_lane(self) -> Lane:
        """Open one more lane; it is free. OSError where that can't be done at the moment."""
        number = len(self.lanes)
        fds: list[int] = []
        channel = None
        try:
            fds += make_pipe()
            fds += make_pipe()
            request_read, request_write, response_read, response_write = fds
            channel = Channel(request_write, response_read)
            self.line.open_lane(number, (request_read, response_write))
        except BaseException:
            if channel is not None:
                channel.close()
                fds = [fds[0], fds[3]]
            for fd in fds:
                os.close(fd)
            raise
        os.close(request_read)
        os.close(response_write)
        lane = Lane(self, number, channel)
        self.lanes.append(lane)
        self.free.append(lane)
        return lane

    def find_job(self, lane: int, number: int) -> str:
        """The id of a job that has printed something, by its lane and its number there; empty where there is none."""
        if lane >= len(self.lanes):
            return ""
        found = self.lanes[lane]
        if number == found.job_number:
            return found.job_id
        return found.earlier[1] if number == found.earlier[0] else ""

    def end_requests(self) -> None:
        """Close the request pipes, and the line: an idle worker takes it as the sign to finish and exit."""
        self.ending = True
        for lane in self.lanes:
            lane.channel.end_requests()
        if self.concurrency > 1:
            self.line.close()

    def close(self) -> None:
        """Close what nobody holds: it is dead."""
        self.line.close()
        for lane in self.lanes:
            if not lane.leased:
                lane.channel.close()

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, and leave the process alone."""
        for lane in self.lanes:
            lane.channel.after_fork_in_child()
        self.line.close()
        self.log.after_fork_in_child()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def pipe_ends(self) -> list[int]:
        """The host's ends of its pipes that are open."""
        ends = [fd for lane in self.lanes for fd in (lane.channel.request_fd, lane.channel.response_fd)]
        return [fd for fd in (*ends, *self.log.fds) if fd >= 0]

    def __repr__(self) -> str:
        return f"<Worker {self.number} pid={self.pid}>"
