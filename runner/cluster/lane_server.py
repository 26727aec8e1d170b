"""A lane as its agent serves it: one job after the other, by callbacks of the agent's event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from ..errors import JobClosed
from ..jobs.pushed_upload import PushedUpload
from ..model.request import INLINE, Request, Upload
from ..wire.frames import (
    BODY,
    END,
    HEAD,
    INVALID,
    MAX_BODY,
    REQUEST,
    STOP,
    TO_WORKER,
    Frame,
    FrameDecoder,
    encode,
    pack_header,
)
from ..wire.messages import RequestHead, ResponseHead
from .lane import OUTCOME, TAKEN
from .messages import JobEnd, ending_of
from .messages import encode as encode_message
from .placement import PATIENCE

if TYPE_CHECKING:
    from ..jobs.callback_dispatch import CallbackDispatch
    from ..jobs.poller import Poller
    from ..pool import Pool

logger = logging.getLogger("blastdoor")

AHEAD: Final = 256 * 1024
"""Bytes of a request's body that may wait for its worker; then nothing more is read from its host."""

_decode_head = msgspec.msgpack.Decoder(RequestHead).decode


class AgentProtocol(Protocol):
    """What the server knows of its agent."""

    def pool_for(self, host: str) -> Pool | None:
        """The pool that runs a host's jobs; None where this agent does not know the host."""

    def heard_of(self, host: str) -> None:
        """A host lives."""

    def heartbeat(self, host: str, seen: int, level: int) -> bytes:
        """What a host is told that has pinged."""


class ServerProtocol(Protocol):
    """What a lane knows of the server that it is of."""

    agent: AgentProtocol
    poller: Poller
    lanes: dict[int, LaneServer]


class LaneServer:
    """A lane of a host's: the listener of one job after the other (`runner.jobs.callback_job.Listener`)."""

    def __init__(self, server: ServerProtocol, transport: asyncio.Transport, host: str, number: int) -> None:
        self.host = host
        self._server = server
        self._transport = transport
        self._number = number
        self._decoder = FrameDecoder(TO_WORKER)
        self._job = 0
        self._head: RequestHead | None = None
        self._pieces: list[bytes] = []
        self._whole = True
        self._running: CallbackDispatch | None = None
        self._upload: PushedUpload | None = None
        self._reading = True
        self._held = self._taken = False
        server.lanes[number] = self

    # -- what comes from the host ------------------------------------------------------------------

    def take(self, data: bytes) -> None:
        """What has come."""
        for frame in self._decoder.feed(data):
            if not self._on_frame(frame):
                self._transport.abort()
                return
        if self._head is not None and (self._whole or sum(map(len, self._pieces)) > INLINE or not self._is_short):
            self._begin()

    @property
    def _is_short(self) -> bool:
        """Whether the rest of the request may be in this very packet, and is waited for: it was sent in one write."""
        return bool(self._pieces) or not self._decoder.clean

    def _on_frame(self, frame: Frame) -> bool:
        kind, job, payload = frame
        if kind == INVALID:
            logger.warning("host %s has broken the protocol: %s", self.host[:8], payload.decode(errors="replace"))
            return False
        if kind == REQUEST:
            return self._on_request(job, payload)
        if job != self._job or self._whole:
            logger.warning("host %s has sent a part of a body that no request has", self.host[:8])
            return False
        if kind == BODY:
            if self._upload is not None:
                self._upload.push(payload)
                if self._upload.waiting > AHEAD and self._reading:
                    self._reading = False
                    self._transport.pause_reading()
            elif self._head is not None:
                self._pieces.append(payload)
            return True
        self._whole = True
        if self._upload is not None:
            if kind == END:
                self._upload.end()
            else:
                self._leave("its request was cut off")
        elif kind == STOP and self._head is not None:
            self._head = None
            self._finish(JobEnd("closed", "its request was cut off"))
        return True

    def _on_request(self, job: int, payload: bytes) -> bool:
        if self._running is not None or self._head is not None:
            logger.warning("host %s has sent a request in the middle of another", self.host[:8])
            return False
        try:
            self._head = _decode_head(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            logger.warning("host %s has sent a request that can't be read: %s", self.host[:8], error)
            return False
        self._job = job
        self._whole = not self._head.has_body
        self._taken = False
        self._pieces = []
        return True

    def _begin(self) -> None:
        """Have a worker take the request."""
        head, self._head = self._head, None
        assert head is not None
        pool = self._server.agent.pool_for(self.host)
        if pool is None:
            self._finish(JobEnd("busy", "its agent had taken its host for gone"))
            return
        upload: Upload
        if self._whole:
            upload = Upload(b"".join(self._pieces) or None)
        else:
            upload = self._upload = PushedUpload(self._on_starved)
            for piece in self._pieces:
                upload.push(piece)
        self._pieces = []
        try:
            self._running = running = self._dispatch(pool, head, upload)
            if self._held:
                running.pause()
            running.begin()
            if self._running is running and running.begun and not self._whole:
                self._tell_taken()  # the rest of its body is sent to no other worker any more
        except BaseException as error:  # noqa: BLE001 - it is the host's
            begun = self._running
            if begun is not None:
                begun.leave(error)
            self.on_failure(error)

    def _dispatch(self, pool: Pool, head: RequestHead, upload: Upload) -> CallbackDispatch:
        request = Request(head.method, head.target, head.headers, None, head.scheme, head.server, head.client)
        context = head.context
        return pool._open_for(self, request, self._server.poller, upload, context, context.job_id, PATIENCE)

    def _on_starved(self) -> None:
        """The worker wants more of the body."""
        self._tell_taken()
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    # -- what goes to the host ---------------------------------------------------------------------

    def _tell_taken(self) -> None:
        if not self._taken:
            self._transport.write(self._taken_frame())

    def _taken_frame(self) -> bytes:
        self._taken = True
        running = self._running
        pid = None if running is None else running.worker_pid
        return encode(TAKEN, self._job, encode_message(pid or 0))

    def on_head(self, head: ResponseHead, data: bytes, *, ended: bool) -> None:
        """The head of a job's response is there."""
        frames = [] if self._taken else [self._taken_frame()]
        frames += (encode(HEAD, self._job, encode_message(head)), *self._body(data))
        if ended:
            self._end_job()
            frames.append(encode(END, self._job))
        self._transport.write(b"".join(frames))

    def on_body(self, data: bytes, *, ended: bool) -> None:
        """More of its body, or its end."""
        frames = self._body(data)
        if ended:
            self._end_job()
            frames.append(encode(END, self._job))
        self._transport.write(b"".join(frames))

    def on_failure(self, error: BaseException) -> None:
        """There is no more, and it is not whole."""
        end = ending_of(error)
        if end.kind == "busy" and self._taken:  # a part of its body is here: nobody else can have all of it
            end = JobEnd("closed", "its worker was gone before it read the request, and no other was free")
        self._finish(end)

    def _body(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        job = self._job
        if len(data) <= MAX_BODY:
            return [pack_header(BODY, job, len(data)), data]
        parts = [data[at : at + MAX_BODY] for at in range(0, len(data), MAX_BODY)]
        return [piece for part in parts for piece in (pack_header(BODY, job, len(part)), part)]

    def _finish(self, end: JobEnd) -> None:
        self._end_job()
        if not self._transport.is_closing():
            self._transport.write(encode(OUTCOME, self._job, encode_message(end)))

    def _end_job(self) -> None:
        """The job is over. What is still to come of its body is for nobody."""
        upload, self._upload = self._upload, None
        self._running = None
        if upload is not None:
            upload.close()
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    def hold(self) -> None:
        """The host takes no more for now."""
        self._held = True
        if self._running is not None:
            self._running.pause()

    def go_on(self) -> None:
        """It takes more."""
        self._held = False
        if self._running is not None:
            self._running.resume()

    # -- the end -----------------------------------------------------------------------------------

    def end(self, why: str) -> None:
        """End the job, if there is one, and the lane."""
        self._leave(why)
        self._transport.abort()

    def lost(self) -> None:
        """The connection is over."""
        self._server.lanes.pop(self._number, None)
        self._leave("its host has left")

    def _leave(self, why: str) -> None:
        running, self._running = self._running, None
        self._head = None
        if running is not None:
            running.leave(JobClosed(why))
        if self._upload is not None:
            self._upload.close()
            self._upload = None
