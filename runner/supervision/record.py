"""The host's record of one worker process."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from .channel import Channel
from .logs import LogPipe

if TYPE_CHECKING:
    from .job_protocol import JobProtocol


class Worker:
    """The host's record of one worker process. Guarded by its `Leases`, but for what only its holder uses.

    `turn` counts how often it was leased; `caller` is who leased it, `job` who holds it, once it has begun.
    """

    __slots__ = (
        "caller",
        "channel",
        "dead",
        "exited",
        "failure",
        "failure_says_all",
        "idle_since",
        "job",
        "jobs",
        "kill_sent",
        "last_job",
        "leased",
        "limit_exceeded",
        "log",
        "number",
        "ordered_at",
        "pid",
        "pidfd",
        "provider",
        "ready",
        "ready_at",
        "status",
        "turn",
    )

    def __init__(self, number: int, channel: Channel, log: LogPipe) -> None:
        self.number = number
        self.channel = channel
        self.log = log
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.ready = False
        self.leased = False
        self.dead = False
        self.kill_sent = False
        self.jobs = 0
        self.provider = ""
        self.ready_at = 0.0
        self.idle_since = 0.0
        self.ordered_at = time.monotonic()
        self.last_job: int | None = None
        self.limit_exceeded = ""
        self.turn = 0
        self.caller: weakref.ref[object] | None = None
        self.job: weakref.ref[JobProtocol] | None = None
        self.failure = ""
        self.failure_says_all = False
        self.status: int | None = None
        self.exited = threading.Event()

    @property
    def forgotten(self) -> bool:
        """Whether whoever leased it is gone, or has done with it, and has not said so."""
        if self.job is not None:
            job = self.job()
            return job is None or job.over
        return self.caller is None or self.caller() is None

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, and leave the process alone."""
        self.channel.after_fork_in_child()
        self.log.after_fork_in_child()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def pipe_ends(self) -> list[int]:
        """The host's ends of its pipes that are open."""
        return [fd for fd in (self.channel.request_fd, self.channel.response_fd, *self.log.fds) if fd >= 0]

    def __repr__(self) -> str:
        return f"<Worker {self.number} pid={self.pid}>"
