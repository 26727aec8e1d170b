"""Waiting for the channels of an event loop's jobs: one epoll for all, which the loop waits for as one descriptor.

A channel stays in the epoll from one job to the next, which spares each job four system calls. What is heard of a
channel without a job here takes it out. One that was closed is out by itself (epoll(7)); its descriptors' numbers may
be another's soon, so that each is kept with the channel that it was registered for.
"""

from __future__ import annotations

import contextlib
import logging
import select
from asyncio import AbstractEventLoop
from typing import TYPE_CHECKING, Final, Protocol

from ..platform.deadlines import DeadlinesByTime

if TYPE_CHECKING:
    from ..supervision.channel import Channel

logger = logging.getLogger("blastdoor")

_AT_ONCE: Final = 64
"""How many descriptors are looked at before the loop sees to others."""


class Listening(Protocol):
    """A job that hears of its channel."""

    def on_event(self, fd: int) -> None:
        """The channel has something: at this descriptor of it."""


class Poller:
    """For all jobs of one asyncio loop, in whose thread it is used. OSError where there is no descriptor to be had.

    `after` gives what calls back after so many seconds: one of the few times that are set for all jobs of a pool.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._channels: dict[int, Channel] = {}
        self._jobs: dict[int, Listening] = {}
        self._deadlines = DeadlinesByTime(loop)
        self.after = self._deadlines.after
        loop.add_reader(self._epoll.fileno(), self._look)

    def close(self) -> None:
        """Listen no more. Jobs that are under way hear of nothing."""
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._jobs.clear()
        self._channels.clear()
        self._deadlines.close()

    def listen(self, job: Listening, channel: Channel) -> None:
        """Tell the job when there is something to read, and when it is woken."""
        self.listen_to_answer(job, channel)
        fd = channel.wake_fd
        if self._channels.get(fd) is not channel:
            self._register(fd, channel, select.EPOLLIN)
        self._jobs[fd] = job

    def listen_to_answer(self, job: Listening, channel: Channel) -> None:
        """Tell the job when there is something to read: again, after `leave_answer`."""
        fd = channel.response_fd
        if self._channels.get(fd) is not channel:
            self._register(fd, channel, select.EPOLLIN)
        self._jobs[fd] = job

    def leave_answer(self, channel: Channel) -> None:
        """What is to be read waits, or has ended, which would be told without end."""
        self._forget(channel.response_fd)

    def listen_for_room(self, job: Listening, channel: Channel) -> None:
        """Tell the job when there is room in the request's pipe."""
        fd = channel.request_fd
        if self._channels.get(fd) is not channel:
            self._register(fd, channel, select.EPOLLOUT)
        self._jobs[fd] = job

    def leave_room(self, channel: Channel) -> None:
        """There is nothing to be written."""
        self._forget(channel.request_fd)

    def unlisten(self, job: Listening, channel: Channel) -> None:
        """The job is over."""
        for fd in (channel.response_fd, channel.wake_fd):
            if self._jobs.get(fd) is job:
                del self._jobs[fd]
        if self._jobs.get(channel.request_fd) is job:
            self._forget(channel.request_fd)

    def _register(self, fd: int, channel: Channel, events: int) -> None:
        try:
            self._epoll.register(fd, events)
        except FileExistsError:  # the same pipe under a new record
            self._epoll.modify(fd, events)
        self._channels[fd] = channel

    def _forget(self, fd: int) -> None:
        self._jobs.pop(fd, None)
        if self._channels.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._epoll.unregister(fd)

    def _look(self) -> None:
        jobs = self._jobs
        for fd, _ in self._epoll.poll(0, _AT_ONCE):
            job = jobs.get(fd)
            if job is None:
                self._forget(fd)
            else:
                job.on_event(fd)
