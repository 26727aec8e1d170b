"""As `Dispatch`, for the callbacks of an event loop: nothing waits, what comes is told to a listener."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import JobClosed, LeaseTimeout, StartError, WorkersUnavailable
from ..supervision.waiters import CallbackWaiter
from .callback_job import CallbackJob
from .dispatch import MAX_TRIES, Dispatch
from .round_trip import RequestNotTaken

if TYPE_CHECKING:
    from ..model.request import Request, Upload
    from ..platform.deadlines import Deadline
    from ..supervision.record import Lane
    from ..wire.messages import JobContext
    from .callback_job import Listener
    from .poller import Poller
    from .supervisor_protocol import SupervisorProtocol


class CallbackDispatch(Dispatch):
    """A request on its way to a worker, then its job. Used in the loop's thread only.

    `begun` tells that a worker has it.
    """

    __slots__ = (
        "_deadline",
        "_job",
        "_listener",
        "_over",
        "_paused",
        "_poller",
        "_start_over",
        "_waiter",
        "begun",
    )

    def __init__(
        self,
        request: Request,
        upload: Upload,
        context: JobContext,
        job_id: str,
        lease_timeout: float | None,
        poller: Poller,
        listener: Listener,
        supervisor: SupervisorProtocol,
        start_over: Callable[[], object],
        retries: int = 0,
    ) -> None:
        super().__init__(request, upload, context, job_id, lease_timeout, (None, None), retries)
        self._supervisor = supervisor
        self._poller = poller
        self._listener = listener
        self._start_over = start_over
        self._tries = MAX_TRIES
        self._waiter: CallbackWaiter[Lane] | None = None
        self._job: CallbackJob | None = None
        self._deadline: Deadline | None = None
        self._over = self._paused = False
        self.begun = False

    @property
    def job_id(self) -> str:
        """The job's id in logs and events."""
        return self.context.job_id

    @property
    def worker_pid(self) -> int | None:
        """The process that does the job, once one has it."""
        return None if self._job is None else self._job.worker_pid

    def begin(self) -> None:
        """Lease a worker, now or once there is one, and have it do the job. The listener is told what becomes of it."""
        self._lease()

    def leave(self, cause: BaseException | None = None) -> None:
        """End it, whatever has become of it: the listener, who calls this, is told nothing more."""
        if self._over:
            return
        self._over = True
        waiter, job = self._waiter, self._job
        self._waiter = self._job = None
        if waiter is not None:
            self._stop_waiting()
            self._supervisor.leases.withdraw(waiter)
        if job is not None:
            job.leave(cause or JobClosed("close() was called"))

    def pause(self) -> None:
        """Tell no more of the response, until `resume`."""
        self._paused = True
        if self._job is not None:
            self._job.pause()

    def resume(self) -> None:
        """Tell of the response again."""
        self._paused = False
        if self._job is not None:
            self._job.resume()

    # -- leases --------------------------------------------------------------------------------------

    def _lease(self) -> None:
        supervisor = self._supervisor
        waiter: CallbackWaiter[Lane] = CallbackWaiter(self.context.provider, self, self._poller.loop, self._on_found)
        try:
            supervisor.look_for_lost()
            lane = supervisor.leases.lease_or_wait(waiter)
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self.failed(error)
            return
        if lane is not None:
            self._start(lane)
            return
        self._waiter = waiter
        if self.lease_timeout is not None:
            self._deadline = self._poller.after(self.lease_timeout).start(self._on_lease_time_up)

    def _on_found(self) -> None:
        """A worker was found, or is not to be had any more."""
        waiter, self._waiter = self._waiter, None
        if waiter is None or self._over:
            return
        self._stop_waiting()
        try:
            lane = waiter.result()
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self.failed(error)
        else:
            self._start(lane)

    def _on_lease_time_up(self) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        try:
            if self._supervisor.leases.is_over(waiter, self.lease_timeout, None):
                self._on_found()
        except LeaseTimeout as error:
            self._waiter = None
            self.failed(error)

    def _stop_waiting(self) -> None:
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            deadline.cancel()

    # -- the job -------------------------------------------------------------------------------------

    def _start(self, lane: Lane) -> None:
        try:
            self._supervisor.look_after_jobs()
            self.begun = True
            job = self._job = CallbackJob(lane, self._supervisor, self, self, self._poller, self._listener)
            job.begin()
            if self._paused:
                job.pause()
        except RequestNotTaken as never:
            self.not_taken(never)
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self._let_go()
            self.failed(error)

    def not_taken(self, never: RequestNotTaken) -> None:
        """The worker was gone before it took the request: try again, with another."""
        self._job = None
        self.begun = False
        if self._over:
            return
        try:
            self._try_again(never)
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self.failed(error)
        else:
            self._lease()

    def failed(self, error: BaseException) -> None:
        """There is no response, or no more of it: tell the listener."""
        self._job = None
        if self._over:
            return
        self._over = True
        if isinstance(error, (LeaseTimeout, WorkersUnavailable)):
            self._refused(error)
        elif isinstance(error, StartError):
            threading.Thread(target=self._start_over, name="blastdoor-start-over", daemon=True).start()
        self._listener.on_failure(error)
