"""A request made ready to be sent: its head as bytes, its body, its context and its time limits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from ..errors import InvalidRequest, closed_by
from ..model.cancel_scope import CancelScope, current_scope
from ..model.request import Request, Upload
from ..wire.frames import BODY, END, MAX_HEAD, REQUEST, pack_header
from ..wire.messages import JobContext, RequestHead

if TYPE_CHECKING:
    from ..supervision.channel import Channel

_encode = msgspec.msgpack.Encoder().encode

Timeouts = tuple[float | None, float | None]
"""Seconds to wait for progress of the response, and of the request's body; None for ever."""


def job_number(jobs: int) -> int:
    """The number that the frames of a worker's job carry: how many it has had, in four bytes."""
    return jobs & 0xFFFFFFFF


class PreparedRequest:
    """A request with all that belongs to it. Raises InvalidRequest, and JobClosed where the scope is cancelled.

    `retries` is how often it is done again where its worker dies before it answers.
    `sent_at` tells when its head went to the worker that was found for it, where that was done for a caller who waited.
    """

    __slots__ = (
        "__weakref__",
        "asked_at",
        "context",
        "head",
        "lease_timeout",
        "method",
        "retries",
        "scope",
        "sent_at",
        "target",
        "timeouts",
        "upload",
    )

    def __init__(
        self,
        request: Request,
        upload: Upload,
        context: JobContext,
        job_id: str,
        lease_timeout: float | None,
        timeouts: Timeouts,
        retries: int = 0,
    ) -> None:
        self.retries = retries
        self.asked_at = time.monotonic()
        self.method = request.method
        self.target = request.target
        self.upload = upload
        self.lease_timeout = lease_timeout
        self.timeouts = timeouts
        deadline = context.deadline
        self.scope: CancelScope | None = current_scope()
        if self.scope is not None:
            if (cause := self.scope.cause) is not None:
                raise closed_by(cause)
            deadline = _earlier(deadline, self.scope.deadline)
        self.context = JobContext(
            job_id, context.provider, context.source, context.delegated_api_key_id, context.attribution, deadline
        )
        self.head = _encode_head(request, upload, self.context)
        self.sent_at: float | None = None

    def send(self, channel: Channel, number: int) -> None:
        """Send the head, and with it a body that is there, as one write. BrokenPipeError where the worker has gone."""
        head = self.head
        inline = self.upload.inline
        frames = pack_header(REQUEST, number, len(head)) + head
        if inline:
            frames = b"".join((frames, pack_header(BODY, number, len(inline)), inline, pack_header(END, number, 0)))
        channel.send(frames)


def _earlier(deadline: float | None, monotonic: float | None) -> float | None:
    """The earlier of a Unix time and a time on the monotonic clock, as Unix time."""
    if monotonic is None:
        return deadline
    unix = time.time() + monotonic - time.monotonic()
    return unix if deadline is None else min(deadline, unix)


def _encode_head(request: Request, upload: Upload, context: JobContext) -> bytes:
    head = _encode(
        RequestHead(
            request.method,
            request.target,
            request.headers if type(request.headers) is list else list(request.headers),
            request.scheme,
            request.server,
            upload.lazy or bool(upload.inline),
            context,
            request.client,
        )
    )
    if len(head) > MAX_HEAD:
        raise InvalidRequest(
            f"the request head has {len(head)} bytes, over the cap of {MAX_HEAD}: send less in target and headers"
        )
    return head
