"""The tries to have a worker take a request: lease a lane, send it, and again where the worker never took it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import BlastdoorError, LeaseTimeout, WorkersUnavailable
from ..events import JobRefused
from ..model.request import Body, Upload
from .job import Job
from .prepared import PreparedRequest, job_number
from .round_trip import RequestNotTaken, RoundTrip

if TYPE_CHECKING:
    from ..supervision.record import Lane
    from .async_job import AsyncJob
    from .supervisor_protocol import SupervisorProtocol

MAX_TRIES: Final = 3


class Dispatch(PreparedRequest):
    """A request on its way to a worker.

    It holds the lane that was leased for it until a job does, so that one is let go whatever is raised where.
    """

    __slots__ = ("_supervisor", "_tries")

    _job_type = Job

    def run(self, supervisor: SupervisorProtocol) -> Job:
        """Lease a worker and have it do the job; gives the job once the response's head is there."""
        self._supervisor = supervisor
        self._tries = MAX_TRIES
        timeout = self.lease_timeout
        while True:
            try:
                supervisor.look_for_lost()
                lane = supervisor.leases.lease(timeout, self.scope, self.context.provider, self)
                supervisor.look_after_jobs()
                return self._job_type(lane, supervisor, self)
            except RequestNotTaken as never:
                timeout = self._try_again(never)
            except (LeaseTimeout, WorkersUnavailable) as error:
                self._refused(error)
                raise
            except BaseException:
                self._let_go()
                raise

    async def run_async(self, supervisor: SupervisorProtocol) -> AsyncJob:
        """As `run`, for a task of an event loop."""
        job_type = self._async_job_type()
        self._supervisor = supervisor
        self._tries = MAX_TRIES
        timeout = self.lease_timeout
        while True:
            try:
                supervisor.look_for_lost()
                lane = await supervisor.leases.lease_async(timeout, self.scope, self.context.provider, self)
                supervisor.look_after_jobs()
                return await job_type.open(lane, supervisor, self)
            except RequestNotTaken as never:
                timeout = self._try_again(never)
            except (LeaseTimeout, WorkersUnavailable) as error:
                self._refused(error)
                raise
            except BaseException:
                self._let_go()
                raise

    def _async_job_type(self) -> type[AsyncJob]:
        return load_async()[0]

    def _try_again(self, never: RequestNotTaken) -> float | None:
        """A worker was gone before it took the request: gives how long to wait for the next, or raises what ends it.

        Nothing written is proof; that nothing was read, a hostile worker can feign, but not for ever.
        """
        if never.error is not None:
            self._tries -= 1
            if not self._tries:
                raise never.error from None
        return self.lease_timeout

    def _refused(self, error: BlastdoorError) -> None:
        events = self._supervisor.events
        if events.subscribers or events.minders:
            context, waited = self.context, time.monotonic() - self.asked_at
            refused = JobRefused(
                context.job_id, context.provider, context.source, waited, str(error), self.method, self.target
            )
            events.emit(refused)

    def _let_go(self) -> None:
        """Whatever was raised: a lane that was leased, and that no job holds, goes back."""
        lane = self._supervisor.leases.held_by(self)
        if lane is not None:
            self.withdraw(lane)

    def dispatch(self, lane: Lane) -> None:
        """Write the request to a lane that came free for this call, before its caller has woken up."""
        number = job_number(lane.jobs + 1)
        lane.name_job(self.context.job_id, number)
        channel = lane.channel
        channel.begin()
        self.sent_at = time.monotonic()  # first: it must not be sent twice, whatever is raised here
        channel.torn = True  # until it is sent
        try:
            self.send(channel, number)
        except BrokenPipeError:
            self.sent_at = None  # the caller finds out by itself

    def withdraw(self, lane: Lane) -> None:
        """Give up a lane that was found: where the job has begun, it ends as any that its caller leaves."""
        if self.sent_at is not None:
            RoundTrip(lane, self._supervisor, self).close()
        elif lane.channel.torn:
            self._supervisor.leases.discard(lane)
        else:
            self._supervisor.leases.give_back(lane)


def load_async() -> tuple[type[AsyncJob], Callable[[Body], Upload]]:
    """What only tasks need: anyio is loaded where it is used. WorkersUnavailable where no descriptor is left."""
    try:
        from .async_job import AsyncJob
        from .async_upload import upload_of
    except OSError as error:
        raise WorkersUnavailable(f"no descriptor is left to import a module with: {error}", 1.0) from error
    return AsyncJob, upload_of
