"""The worker's ends of its pipes for handlers that are coroutines: the same frames, and the event loop never blocks.

Reads wait for the request pipe, which is read only when somebody asks for more: that is the backpressure
on uploads. Writes go into the pipe at once as far as it takes them; the loop writes the rest, so that a task
that is cancelled in the middle of a write cuts no frame. Whoever writes waits until all is in the pipe.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections import deque
from typing import Final

from ..platform.write_buffer import WriteBuffer
from ..wire.frames import (
    BODY,
    END,
    INVALID,
    REQUEST,
    STOP,
    TO_WORKER,
    Frame,
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
from .forks import leave
from .pipes import READ_SIZE, HostGone, UploadStopped, decode_request
from .stdio import OutputFlag

PATIENCE: Final = 8
"""Rounds of the loop that an app has to return after its last body bytes, before its caller is let go without it."""

_BREATH: Final = 32


class CallerGone(OSError):
    """Raised to a handler that writes when its caller has left."""


class AsyncPipes:
    """Frames from the host and to it, on one event loop."""

    def __init__(self, request_fd: int, response_fd: int, prints: OutputFlag) -> None:
        os.set_blocking(request_fd, False)
        os.set_blocking(response_fd, False)
        self.loop = asyncio.get_running_loop()
        self.prints = prints
        self._request_fd = request_fd
        self._response_fd = response_fd
        self._decoder = FrameDecoder(TO_WORKER)
        self._frames: deque[Frame] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._watching = False
        self._unsent = WriteBuffer()
        self._drained: asyncio.Future[None] | None = None
        self._puts_without_wait = 0

    def sever(self) -> None:
        """This process is a fork of the worker's: whoever reads or writes here is to leave it."""
        for name in ("_fill", "put", "_readable"):
            setattr(self, name, lambda *_: leave())

    # -- in ------------------------------------------------------------------------------------------

    async def next_request(self) -> AsyncRequest:
        """The next job's request. HostGone at the end of the pipe."""
        kind, number, payload = await self.next_frame()
        if kind != REQUEST:
            raise HostGone
        return AsyncRequest(self, number, decode_request(payload))

    async def next_frame(self) -> Frame:
        """The next frame from the host. HostGone at the end of the pipe."""
        await self.await_frame(None)
        return self._frames.popleft()

    async def await_frame(self, unless: asyncio.Future[None] | None) -> bool:
        """Wait for a frame; False where `unless` is done first, which has to be followed by `wake`."""
        while unless is None or not unless.done():
            if self._frames or self._fill():
                return True
            await self._readable()
        return False

    def take_end(self) -> bool:
        """Take the next frame if it is there and ends the request's body; whether that was so."""
        if self._frames and self._frames[0][0] == END:
            self._frames.popleft()
            return True
        return False

    def wake(self) -> None:
        """Make whoever waits for a frame look up, by a spurious wake-up."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _fill(self) -> bool:
        """Take what is in the pipe; whether that was anything."""
        try:
            data = os.read(self._request_fd, READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            raise HostGone
        frames = self._decoder.feed(data)
        if frames and frames[-1][0] == INVALID:
            raise HostGone
        self._frames.extend(frames)
        return True

    async def _readable(self) -> None:
        # Whoever waits now takes the place of one that has been woken and is yet to run.
        reader = self._reader = self.loop.create_future()
        if not self._watching:
            self._watching = True
            self.loop.add_reader(self._request_fd, self._note_readable)
        try:
            await reader
        finally:
            if self._reader is reader:
                self._reader = None

    def _note_readable(self) -> None:
        if self._reader is None or self._reader.done():
            # Nobody wants it now. To watch on would be to spin; mostly somebody does, and nothing is registered anew.
            self._watching = False
            self.loop.remove_reader(self._request_fd)
        else:
            self._reader.set_result(None)

    # -- out -----------------------------------------------------------------------------------------

    def put(self, data: Data) -> None:
        """Send whole frames: now what the pipe takes, the rest by and by."""
        self._unsent.append(memoryview(data))
        if len(self._unsent) == 1 and not self._flush():
            self.loop.add_writer(self._response_fd, self._note_writable)

    async def drain(self) -> None:
        """Wait until all that was put is in the pipe. Lets other tasks run now and then where there is no wait."""
        self._puts_without_wait += 1
        if self._puts_without_wait >= _BREATH:
            self._puts_without_wait = 0
            await asyncio.sleep(0)
        while self._unsent:
            self._puts_without_wait = 0
            if self._drained is None:
                self._drained = self.loop.create_future()
            await asyncio.shield(self._drained)

    def _note_writable(self) -> None:
        if self._flush():
            self.loop.remove_writer(self._response_fd)
            if self._drained is not None:
                self._drained.set_result(None)
                self._drained = None

    def _flush(self) -> bool:
        """Write on; whether all is in the pipe, or nobody reads any more."""
        try:
            self._unsent.flush(self._response_fd)
        except BrokenPipeError:
            self._unsent.clear()  # the host is gone; the end of the request pipe tells the rest
        return not self._unsent


async def let_cancelled_go() -> None:
    """Raise, in a task that is being cancelled. What it would take by waiting for nothing would be lost.

    Cancelled scopes of anyio reach a task in its next wait only; Starlette's `Request.is_disconnected` is in one.
    """
    anyio = sys.modules.get("anyio")
    task = asyncio.current_task()
    if (task is not None and task.cancelling()) or (
        anyio is not None and anyio.current_effective_deadline() == -math.inf
    ):
        await asyncio.sleep(0)  # in which it hears of it
        await asyncio.sleep(0)


class AsyncRequest:
    """One job's request as it comes off the pipe: its head, and its body read on demand."""

    __slots__ = ("_ended", "_lock", "_over", "_pipes", "cancelled", "head", "number")

    def __init__(self, pipes: AsyncPipes, number: int, head: RequestHead) -> None:
        self._pipes = pipes
        self._lock = asyncio.Lock()
        self._ended = not head.has_body
        self._over: asyncio.Future[None] = pipes.loop.create_future()
        self.number = number
        self.head = head
        self.cancelled = False

    @property
    def ended(self) -> bool:
        """Whether the body was read to its end, or was cut off."""
        return self._ended

    def cancel(self) -> None:
        """The caller has left."""
        self.cancelled = True
        self.conclude()

    def conclude(self) -> None:
        """There is no more to hear: the response is whole, or the caller has left."""
        if not self._over.done():
            self._over.set_result(None)
            self._pipes.wake()

    async def concluded(self) -> None:
        """Wait until the response is whole, or the caller has left."""
        await asyncio.shield(self._over)

    async def read_piece(self) -> bytes:
        """The next piece of the body as the caller sent it, b"" at its end.

        UploadStopped where it was cut off, or there is nobody to read it for.
        """
        await let_cancelled_go()
        async with self._lock:
            if self._ended:
                return b""
            if not await self._pipes.await_frame(self._over):
                raise UploadStopped("the caller has left before the end of the request body")
            return self._take(await self._pipes.next_frame())

    async def skip(self) -> None:
        """Read past what the handler has left of the body."""
        async with self._lock:  # a task that the handler has left behind may be about to find that it is over
            while not self._ended:
                try:
                    self._take(await self._pipes.next_frame())
                except UploadStopped:
                    return

    def _take(self, frame: Frame) -> bytes:
        kind, _, payload = frame
        self._ended = kind != BODY or self._pipes.take_end()
        if kind == STOP:
            raise UploadStopped("the caller stopped sending the request body before its end")
        return payload


class AsyncResponse:
    """One job's response on its way to the pipe. The first head wins; nothing goes out after the end.

    The end waits for the handler to return, a few rounds of the loop at most. A handler that goes on after that has
    its caller let go: the response ends as BUSY, and `close` tells when the worker is free.
    """

    __slots__ = ("_busy", "_lock", "_number", "_pipes", "_request", "_rounds", "_whole", "ended", "started")

    def __init__(self, pipes: AsyncPipes, request: AsyncRequest) -> None:
        self._pipes = pipes
        self._request = request
        self._number = request.number
        self._lock = asyncio.Lock()  # a handler's tasks may write at once: one piece of data after the other
        self._whole = False
        self._busy = False
        self._rounds = 0
        self.started = False
        self.ended = False

    async def start(self, status: int, headers: list[Header]) -> None:
        """Send the head. Raises ValueError or TypeError for one that HTTP does not allow, OSError like `write`."""
        frame = head_frame(self._number, status, headers)
        async with self._lock:
            if self.started or self.ended:
                return
            self._check_open()
            self.started = True
            self._pipes.put(frame)
            await self._pipes.drain()

    async def start_with(self, status: int, headers: list[Header], data: Data) -> None:
        """Send the head and the first bytes of the body in one write."""
        frame = head_frame(self._number, status, headers)
        data = flat(data)
        async with self._lock:
            self._check_open()
            if self.started:
                frame = b""
            self.started = True
            await self._write_body(data, frame)

    async def write(self, data: Data) -> None:
        """Send body bytes. OSError once the caller has left, RuntimeError once the response has ended."""
        data = flat(data)
        async with self._lock:
            self._check_open()
            if data:
                await self._write_body(data, b"")

    async def finish(self, status: int, headers: list[Header], data: Data) -> None:
        """Send the rest, the head included if it is still to come, and soon the end."""
        frame = b"" if self.started else head_frame(self._number, status, headers)
        data = flat(data)
        async with self._lock:
            self._check_open()
            if self.started:
                frame = b""
            self.started = True
            if data or frame:
                await self._write_body(data, frame)
                self._check_open()
            self.ended = self._whole = True
        self._request.conclude()
        self._pipes.loop.call_soon(self._wait_on)

    def close(self, report: FaultReport | None = None, implied: tuple[int, list[Header]] | None = None) -> None:
        """The handler has ended, well or with `report`; after a head where one is implied. Never waits."""
        pipes, number = self._pipes, self._number
        if not self.ended:
            report = report or FaultReport("raised", "RuntimeError", "the handler ended before its response")
            frame = b"" if self.started or implied is None else head_frame(number, *implied)
            self.started = self.ended = True
            pipes.put(frame + fault_frame(number, report, printed=pipes.prints.take()))
            return
        if self._whole:
            self._let_go(busy=report is not None)
        if report is not None:
            pipes.put(fault_frame(number, report, printed=pipes.prints.take()))
        elif self._busy:
            pipes.put(idle_frame(number, printed=pipes.prints.take()))

    def _wait_on(self) -> None:
        if not self._whole:
            return
        self._rounds += 1
        if self._rounds > PATIENCE:
            self._let_go(busy=True)
        else:
            self._pipes.loop.call_soon(self._wait_on)

    def _let_go(self, *, busy: bool) -> None:
        self._whole = False
        self._busy = busy
        self._pipes.put(end_frame(self._number, printed=self._pipes.prints.take(), busy=busy))

    def _check_open(self) -> None:
        if self.ended:
            raise RuntimeError("the response has ended: nothing can be written to it any more")
        if self._request.cancelled:
            raise CallerGone("the caller has left: nobody reads the response any more")

    async def _write_body(self, data: Data, before: bytes) -> None:
        if len(data) <= SMALL:
            self._pipes.put(b"".join((before, *small_body(self._number, [data]))))
            await self._pipes.drain()
            return
        for piece in body_pieces(data):
            if not before:
                self._check_open()  # the job may have ended while the piece before went out
            self._pipes.put(before + pack_header(BODY, self._number, len(piece)))
            self._pipes.put(piece)
            before = b""
            await self._pipes.drain()
