"""The host's ends of one lane's pair of pipes: non-blocking writes, reads that can be woken.

The thread that holds the lane writes and reads the pipes itself. It waits in one `poll` over the
response pipe, the wake-up descriptor (another thread cancels, or the worker's death was seen), and,
while an upload goes on, the request pipe.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import struct
import termios
import time
from typing import Final

from ..model.durations import MAIN_THREAD_WAIT, longest_wait
from ..platform.write_buffer import WriteBuffer
from ..wire.frames import TO_HOST, Frame, FrameDecoder

PIPE_SIZE: Final = 256 * 1024
_READ_SIZE: Final = 64 * 1024
_WRITABLE = select.POLLOUT | select.POLLERR | select.POLLHUP | select.POLLNVAL


def make_pipe() -> tuple[int, int]:
    """A pipe (read end, write end), enlarged where the user's quota of pipe pages allows it (pipe(7))."""
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # over the quota: the default size works, in more and smaller steps
    return ends


class Channel:
    """Frames to one worker, and from it. One thread at a time uses it; `wake` may come from any."""

    __slots__ = (
        "_decoder",
        "_epoll",
        "_epoll_wants_write",
        "_poll",
        "_unsent",
        "_wants_write",
        "request_fd",
        "response_fd",
        "starved",
        "torn",
        "wake_fd",
        "written",
    )

    def __init__(self, request_fd: int, response_fd: int) -> None:
        # Each end has its own open file description: the worker can't make the host's ends block (open(2)).
        for fd in (request_fd, response_fd):
            os.set_blocking(fd, False)
        self.request_fd = request_fd
        self.response_fd = response_fd
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._decoder = FrameDecoder(TO_HOST)
        self._unsent = WriteBuffer()
        self._poll = select.poll()
        self._poll.register(response_fd, select.POLLIN)
        self._poll.register(self.wake_fd, select.POLLIN)
        self._wants_write = False
        self._epoll: select.epoll | None = None
        self._epoll_wants_write = False
        self.written = 0
        self.torn = False
        self.starved = False

    @property
    def flushed(self) -> bool:
        """Whether all that was sent is in the pipe."""
        return not self._unsent

    @property
    def ready_for_next(self) -> bool:
        """Whether all that was sent is in the pipe, and all that was to come has come."""
        return not self.torn and not self._unsent and self._decoder.clean

    @property
    def clean(self) -> bool:
        """Whether the response stream stands between two frames."""
        return self._decoder.clean

    def begin(self) -> None:
        """A new job: nothing of it is written."""
        self.written = 0

    def send(self, *pieces: bytes | memoryview) -> None:
        """Write what the pipe takes now and keep the rest for `flush`. `written` counts what went into the pipe.

        Raises BrokenPipeError when the worker's end is closed. Where a signal's handler raises in the midst, the stream
        is `torn`: nobody knows what was written, but never more than `written`.
        """
        if not self._unsent and len(pieces) == 1:
            piece = pieces[0]
            size = len(piece)
            self.torn = True
            self.written += size
            try:
                sent = os.write(self.request_fd, piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.written -= size
                self.torn = False
                raise
            if sent < size:
                self.written -= size - sent
                self._unsent.append(memoryview(piece)[sent:])
            self.torn = False
            return
        self.torn = True
        self._unsent.extend(map(memoryview, pieces))
        self.flush()

    def flush(self) -> None:
        """Write what is left over, as far as the pipe takes it now. Raises BrokenPipeError like `send`."""
        self.torn = True
        try:
            self.written += self._unsent.flush(self.request_fd)
        except OSError:
            self.torn = False
            raise
        self.torn = False

    def drop_unsent(self) -> None:
        """Forget what is left over: the worker takes no more."""
        self._unsent.clear()

    def wait(self, timeout: float | None, *, write: bool = False) -> tuple[bool, bool, bool]:
        """Wait up to `timeout` seconds; (readable, writable, woken), all False when the time is up.

        `write` says that the request pipe is waited for as well; an end that the worker closed counts as
        writable, so that the next write tells.
        """
        if write is not self._wants_write:
            self._wants_write = write
            if write:
                self._poll.register(self.request_fd, select.POLLOUT)
            else:
                self._poll.unregister(self.request_fd)
        if timeout is None or timeout > MAIN_THREAD_WAIT:
            events = self._poll_long(math.inf if timeout is None else timeout)
        else:
            events = self._poll.poll(math.ceil(timeout * 1000))
        readable = writable = woken = False
        for fd, event in events:
            if fd == self.response_fd:
                readable = True
            elif fd == self.wake_fd:
                woken = True
                self.take_wake()
            elif event & _WRITABLE:
                writable = True
        return readable, writable, woken

    def wait_and_receive(self) -> list[Frame]:
        """Wait for the response alone, without a limit; none of its frames where there is something else to be seen to.

        The short way of a round trip with nothing to send and no time limit. What it leaves, `wait` finds.
        """
        fd = self.response_fd
        events = self._poll.poll(longest_wait() * 1000)
        if len(events) != 1 or events[0] != (fd, select.POLLIN) or self._wants_write:
            return []
        try:
            data = os.read(fd, _READ_SIZE)
        except BlockingIOError:
            return []
        return self._decoder.feed(data)  # nothing is no end here: POLLIN without POLLHUP says that there is something

    def _poll_long(self, timeout: float) -> list[tuple[int, int]]:
        longest = longest_wait()
        if timeout <= longest:
            return self._poll.poll(math.ceil(timeout * 1000))
        events = self._poll.poll(longest * 1000)
        if events:
            return events
        until = time.monotonic() + timeout - longest
        while not events and (left := until - time.monotonic()) > 0:
            events = self._poll.poll(math.ceil(min(left, longest) * 1000))
        return events

    def event_fd(self, *, write: bool = False) -> int:
        """A descriptor that is readable when `wait` would return at once: for event loops, which wait in their own way.

        OSError where there is no descriptor to be had.
        """
        epoll = self._epoll
        if epoll is None:
            epoll = self._epoll = select.epoll()
            epoll.register(self.response_fd, select.EPOLLIN)
            epoll.register(self.wake_fd, select.EPOLLIN)
        if write is not self._epoll_wants_write:
            self._epoll_wants_write = write
            if write:
                epoll.register(self.request_fd, select.EPOLLOUT)
            else:
                epoll.unregister(self.request_fd)
        return epoll.fileno()

    def stop_listening(self) -> None:
        """The response pipe has ended: from now on only a wake-up makes `event_fd` readable."""
        if self._epoll is not None:
            self._epoll.unregister(self.response_fd)

    def receive(self) -> list[Frame] | None:
        """The frames that are there now, possibly none; None at the end of the worker's stream.

        `starved` tells that nothing was there, not even a part of one.
        """
        try:
            data = os.read(self.response_fd, _READ_SIZE)
        except BlockingIOError:
            self.starved = True
            return []
        self.starved = False
        if not data:
            return None
        return self._decoder.feed(data)

    def wake(self) -> None:
        """Make the thread that waits, now or next, come back. Only while the channel can't be closed."""
        if self.wake_fd >= 0:
            os.eventfd_write(self.wake_fd, 1)

    def take_wake(self) -> None:
        """The thread that waits has come back."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            pass

    def unread(self) -> int:
        """How many bytes in the request pipe the worker has not taken."""
        if self.request_fd < 0:
            return 0
        answer = fcntl.ioctl(self.request_fd, termios.FIONREAD, b"\0" * 4)
        return int(struct.unpack("i", answer)[0])

    def end_requests(self) -> None:
        """Close the request pipe: an idle worker takes it as the sign to finish and exit."""
        if self._wants_write:
            self._wants_write = False
            self._poll.unregister(self.request_fd)
        if self._epoll is not None and self._epoll_wants_write:
            self._epoll_wants_write = False
            self._epoll.unregister(self.request_fd)
        fd, self.request_fd = self.request_fd, -1
        if fd >= 0:
            os.close(fd)

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors.

        The epoll goes first: it is one and the same as the parent's, and what is unregistered here is so there.
        """
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        self.close()

    def close(self) -> None:
        """Close all descriptors. Call it once nobody waits or writes any more."""
        self.end_requests()
        self._poll = select.poll()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        for fd in (self.response_fd, self.wake_fd):
            if fd >= 0:
                os.close(fd)
        self.response_fd = self.wake_fd = -1
