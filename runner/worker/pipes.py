"""The worker's ends of its pipes: requests read frame by frame, responses written as the handler gives them.

Reads and writes block, which is the backpressure: a body frame is read when the handler asks for it, and
what the handler writes is on its way when the write returns. Small pieces go out in one write together.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec

from ..wire.frames import (
    BODY,
    END,
    HEADER_SIZE,
    INVALID,
    REQUEST,
    STOP,
    TO_WORKER,
    FrameDecoder,
    pack_header,
)
from ..wire.messages import FaultReport, Header, RequestHead
from ..wire.response_frames import (
    SMALL,
    Data,
    body_pieces,
    end_frame,
    fault_frame,
    flat,
    head_frame,
    idle_frame,
    small_body,
)
from .cancellation import Shield
from .forks import leave
from .stdio import OutputFlag

READ_SIZE: Final = 64 * 1024
"""How much of the request pipe is read at once, in bytes."""

_ATOMIC: Final = select.PIPE_BUF - HEADER_SIZE

decode_request = msgspec.msgpack.Decoder(RequestHead).decode


class UploadStopped(OSError):
    """Raised to a handler that reads on when the caller has stopped sending its request body."""


class HostGone(BaseException):
    """The host's end of a pipe is closed: there is nobody left to work for."""


class IncomingRequest:
    """One job's request as it comes off the pipe: its head, and its body read on demand."""

    __slots__ = ("_ended", "_pipes", "head", "number")

    def __init__(self, pipes: Pipes, number: int, head: RequestHead) -> None:
        self._pipes = pipes
        self._ended = not head.has_body
        self.number = number
        self.head = head

    def read_piece(self) -> bytes:
        """The next piece of the body as the caller sent it, b"" at its end. UploadStopped where it was cut off."""
        if self._ended:
            return b""
        with self._pipes.shield:
            kind, _, payload = self._pipes.next_frame()
            self._ended = kind != BODY or self._pipes.take_end()
        if kind == STOP:
            raise UploadStopped("the caller stopped sending the request body before its end")
        return payload

    def take_whole(self) -> bytes | None:
        """The body, where all of it has come in one piece with the head; None where it has to be read."""
        if self._ended:
            return b""
        with self._pipes.shield:  # taken, and noted as taken: else `skip` would take the next job's request for it
            body = self._pipes.take_whole_body()
            self._ended = body is not None
        return body

    @property
    def cancelled(self) -> bool:
        """Whether the caller has left."""
        return self._pipes.shield.cancelled

    def skip(self) -> None:
        """Read past what the handler has left of the body."""
        while not self._ended:
            try:
                self.read_piece()
            except UploadStopped:
                return


class OutgoingResponse:
    """One job's response on its way to the pipe. The first head wins; nothing goes out after the end."""

    __slots__ = ("_lock", "_number", "_pipes", "_shield", "busy", "ended", "reason", "started")

    def __init__(self, pipes: Pipes, number: int) -> None:
        self._pipes = pipes
        self._number = number
        self._lock = threading.Lock()
        self._shield = pipes.shield
        self.started = False
        self.ended = False
        self.busy = False
        self.reason: str | None = None

    def start(self, status: int, headers: list[Header]) -> None:
        """Send the head. Raises ValueError or TypeError for one that HTTP does not allow."""
        frame = head_frame(self._number, status, headers, self.reason)
        with self._shield, self._lock:
            if self.ended or self.started:
                return
            self.started = True
            self._pipes.write(frame)

    def start_with(self, status: int, headers: list[Header], data: Data) -> None:
        """Send the head and the first bytes of the body in one write."""
        frame = head_frame(self._number, status, headers, self.reason)
        data = flat(data)
        with self._shield, self._lock:
            self._check_open()
            self.started = True
            self._write_body(data, before=frame)

    def write(self, data: Data) -> None:
        """Send body bytes. RuntimeError once the job has ended: a thread has outlived it."""
        if type(data) is bytes and 0 < len(data) <= _ATOMIC:
            # A token: its frame goes into the pipe whole or not at all (pipe(7), PIPE_BUF), so that it needs no shield
            # against an exception that a cancel raises here.
            frame = pack_header(BODY, self._number, len(data)) + data
            with self._lock:
                if not self.ended:
                    self._pipes.write_atomic(frame)
                    return
        data = flat(data)
        with self._shield, self._lock:
            self._check_open()
            if data:
                self._write_body(data)

    def finish(self, status: int, headers: list[Header], chunks: list[bytes], *, busy: bool = False) -> None:
        """Send the rest, the head included if it is still to come, and END; one write where it is small.

        `busy` where the worker goes on with the job: `settle` ends it then.
        """
        frame = b"" if self.started else head_frame(self._number, status, headers, self.reason)
        with self._shield, self._lock:
            self._check_open()
            self.started = self.ended = True
            self.busy = busy
            if sum(map(len, chunks)) > SMALL:
                for chunk in chunks:
                    if chunk:
                        self._write_body(chunk, before=frame)
                        frame = b""
                chunks = []
            body = small_body(self._number, chunks)
            end = end_frame(self._number, printed=self._pipes.prints.take(), busy=busy)
            self._pipes.write(b"".join((frame, *body, end)))

    def fail(self, report: FaultReport, implied: tuple[int, list[Header]] | None = None) -> None:
        """End the response, or what goes on after it, with a fault; after a head where one is implied."""
        with self._shield, self._lock:
            if self.ended and not self.busy:
                return
            self.busy = False
            frame = b"" if self.started or implied is None else head_frame(self._number, *implied)
            self.started = self.ended = True
            self._pipes.write(frame + fault_frame(self._number, report, printed=self._pipes.prints.take()))

    def settle(self) -> None:
        """The worker is done with a job that was left busy."""
        with self._shield, self._lock:
            if self.busy:
                self.busy = False
                self._pipes.write(idle_frame(self._number, printed=self._pipes.prints.take()))

    def _check_open(self) -> None:
        if self.ended:
            raise RuntimeError("the response has ended: nothing can be written to it any more")

    def _write_body(self, data: Data, before: bytes = b"") -> None:
        size = len(data)
        if size <= SMALL:
            self._pipes.write(b"".join((before, pack_header(BODY, self._number, size), data)))
            return
        for piece in body_pieces(data):
            self._pipes.write_vectors(before + pack_header(BODY, self._number, len(piece)), piece)
            before = b""


class Pipes:
    """The worker's ends: blocking reads of frames, blocking writes of bytes."""

    def __init__(self, request_fd: int, response_fd: int, shield: Shield, prints: OutputFlag) -> None:
        self.shield = shield
        self.prints = prints
        self._request_fd = request_fd
        self._response_fd = response_fd
        self._decoder = FrameDecoder(TO_WORKER)
        self._frames: deque[tuple[int, int, bytes]] = deque()
        poll = select.poll()
        poll.register(request_fd, select.POLLIN)
        # An idle worker sleeps in poll(2), not in read(2): killed in its sleep it takes no request with it.
        self._wait = poll.poll

    def next_frame(self) -> tuple[int, int, bytes]:
        """The next frame from the host. HostGone at the end of the pipe."""
        frames = self._frames
        while not frames:
            data = os.read(self._request_fd, READ_SIZE)
            if not data:
                raise HostGone
            frames.extend(self._decoder.feed(data))
        frame = frames.popleft()
        if frame[0] == INVALID:
            raise HostGone
        return frame

    def take_whole_body(self) -> bytes | None:
        """Take a body and its END, if all of it has come."""
        frames = self._frames
        if not frames or frames[-1][0] != END:
            return None
        if len(frames) == 2 and frames[0][0] == BODY:
            body = frames[0][2]
        else:
            body = b"".join([payload for _, _, payload in frames])
        frames.clear()
        return body

    def take_end(self) -> bool:
        """Take the END of a request's body, if that is what has come next."""
        frames = self._frames
        if frames and frames[0][0] == END:
            frames.popleft()
            return True
        return False

    def next_request(self) -> IncomingRequest:
        """The next job's request."""
        if not self._frames:
            self._wait()
        kind, number, payload = self.next_frame()
        if kind != REQUEST:
            raise HostGone
        return IncomingRequest(self, number, decode_request(payload))

    def wait(self, seconds: float) -> bool:
        """Wait for the next request for so many seconds; whether it has come."""
        return bool(self._frames) or bool(self._wait(seconds * 1000))

    def sever(self) -> None:
        """This process is a fork of the worker's: whoever reads or writes here is to leave it."""
        for name in ("next_frame", "write", "write_atomic", "write_vectors"):
            setattr(self, name, lambda *_: leave())

    def write(self, data: bytes) -> None:
        """Write all of it. HostGone where nobody reads any more."""
        try:
            written = os.write(self._response_fd, data)
            while written < len(data):
                data = data[written:]
                written = os.write(self._response_fd, data)
        except BrokenPipeError:
            raise HostGone from None

    def write_atomic(self, data: bytes) -> None:
        """Write at most PIPE_BUF bytes, which go whole or not at all. HostGone where nobody reads any more."""
        try:
            os.write(self._response_fd, data)
        except BrokenPipeError:
            raise HostGone from None

    def write_vectors(self, header: bytes, data: memoryview) -> None:
        """Write a frame without joining its header and its payload."""
        try:
            written = os.writev(self._response_fd, (header, data))
            left = data[max(written - len(header), 0) :]
            if written < len(header):
                self.write(header[written:])
            while left:
                left = left[os.write(self._response_fd, left) :]
        except BrokenPipeError:
            raise HostGone from None


def close_all(fds: Iterable[int]) -> None:
    """Close these descriptors."""
    for fd in fds:
        os.close(fd)
