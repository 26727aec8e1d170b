"""One call of a pool: the request made ready to be sent, and the tries to have a worker take it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from ..errors import BlastdoorError, InvalidRequest, LeaseTimeout, WorkersUnavailable, closed_by
from ..events import JobRefused
from ..model.request import Body, Request, Upload
from ..model.scope import CancelScope, current_scope
from ..wire.frames import BODY, END, MAX_HEAD, REQUEST, pack_header
from ..wire.messages import JobContext, RequestHead
from .job import Job
from .round_trip import NeverTaken, RoundTrip, Timeouts, job_number

if TYPE_CHECKING:
    from ..workers.channel import Channel
    from ..workers.record import Worker
    from ..workers.supervisor import Supervisor
    from .async_job import AsyncJob

_MAX_TRIES: Final = 3
_encode = msgspec.msgpack.Encoder().encode


class Call:
    """A request with all that belongs to it. Raises InvalidRequest, and JobClosed where the scope is cancelled.

    It holds the worker that was leased for it until a job does, so that one is let go whatever is raised where.
    `sent_at` tells when its head went to the worker that was found for it, where that was done for a caller who waited.
    """

    __slots__ = (
        "__weakref__",
        "_supervisor",
        "asked_at",
        "context",
        "head",
        "lease_timeout",
        "method",
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
    ) -> None:
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

    def run(self, supervisor: Supervisor) -> Job:
        """Lease a worker and have it do the job; gives the job once the response's head is there."""
        self._supervisor = supervisor
        tries = _MAX_TRIES
        while True:
            try:
                supervisor.oversight.look_for_lost()
                worker = supervisor.leases.lease(self.lease_timeout, self.scope, self.context.provider, self)
                supervisor.oversight.look_after_jobs()
                return Job(worker, supervisor, self)
            except NeverTaken as never:
                tries = _next_try(never, tries)
            except (LeaseTimeout, WorkersUnavailable) as error:
                self._refused(error)
                raise
            except BaseException:
                self._let_go()
                raise

    async def run_async(self, supervisor: Supervisor) -> AsyncJob:
        """As `run`, for a task of an event loop."""
        job_type = load_async()[0]
        self._supervisor = supervisor
        tries = _MAX_TRIES
        while True:
            try:
                supervisor.oversight.look_for_lost()
                worker = await supervisor.leases.lease_async(
                    self.lease_timeout, self.scope, self.context.provider, self
                )
                supervisor.oversight.look_after_jobs()
                return await job_type.open(worker, supervisor, self)
            except NeverTaken as never:
                tries = _next_try(never, tries)
            except (LeaseTimeout, WorkersUnavailable) as error:
                self._refused(error)
                raise
            except BaseException:
                self._let_go()
                raise

    def _refused(self, error: BlastdoorError) -> None:
        events = self._supervisor.events
        if events.subscribers:
            context, waited = self.context, time.monotonic() - self.asked_at
            refused = JobRefused(
                context.job_id, context.provider, context.source, waited, str(error), self.method, self.target
            )
            events.emit(refused)

    def _let_go(self) -> None:
        """Whatever was raised: a worker that was leased, and that no job holds, goes back."""
        worker = self._supervisor.leases.held_by(self)
        if worker is not None:
            self.withdraw(worker)

    def present(self, worker: Worker) -> None:
        """Write the request to a worker that came free for this call, before its caller has woken up."""
        worker.log.job_id = self.context.job_id
        worker.channel.begin()
        self.sent_at = time.monotonic()  # first: it must not be sent twice, whatever is raised here
        worker.channel.torn = True  # until it is sent
        try:
            self.send(worker.channel, job_number(worker.jobs + 1))
        except BrokenPipeError:
            self.sent_at = None  # the caller finds out by itself

    def withdraw(self, worker: Worker) -> None:
        """Give up a worker that was found: one that has begun ends the job as any that its caller leaves."""
        if self.sent_at is not None:
            RoundTrip(worker, self._supervisor, self).close()
        elif worker.channel.torn:
            self._supervisor.leases.discard(worker)
        else:
            self._supervisor.leases.give_back(worker)

    def send(self, channel: Channel, number: int) -> None:
        """Send the head, and with it a body that is there, as one write. BrokenPipeError where the worker has gone."""
        head = self.head
        inline = self.upload.inline
        frames = pack_header(REQUEST, number, len(head)) + head
        if inline:
            frames = b"".join((frames, pack_header(BODY, number, len(inline)), inline, pack_header(END, number, 0)))
        channel.send(frames)


def load_async() -> tuple[type[AsyncJob], Callable[[Body], Upload]]:
    """What only tasks need: anyio is loaded where it is used. WorkersUnavailable where no descriptor is left."""
    try:
        from .async_job import AsyncJob
        from .async_upload import upload_of
    except OSError as error:
        raise WorkersUnavailable(f"no descriptor is left to import a module with: {error}", 1.0) from error
    return AsyncJob, upload_of


def _next_try(never: NeverTaken, tries: int) -> int:
    """How many tries are left. Nothing written is proof; that nothing was read, a hostile worker can feign."""
    if never.error is None:
        return tries
    if tries == 1:
        raise never.error from None
    return tries - 1


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
