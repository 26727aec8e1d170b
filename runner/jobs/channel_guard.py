"""Who uses a job's channel: one thread or task at a time, and `close` from any, at any moment.

The thread or task that is between `_take_channel` and `_release_channel` settles the job; `close` from elsewhere only
wakes it. A signal's handler may raise, or close the job, between any two instructions of this.
"""

from __future__ import annotations

import weakref
from _thread import RLock
from typing import TYPE_CHECKING, Final

from ..errors import JobClosed, JobFailed, closed_by
from ..model.cancel_scope import CancelScope, Watcher

if TYPE_CHECKING:
    from ..supervision.channel import Channel
    from .supervisor_protocol import SupervisorProtocol

_CLOSER: Final = object()
"""Uses the channel where `close` ends a job that nobody reads at the moment."""


class ChannelGuard:
    """The part of a round trip that lets one user in, and closes it to all."""

    __slots__ = (
        "__weakref__",
        "_channel",
        "_closed_by",
        "_ending",
        "_lock",
        "_settled",
        "_supervisor",
        "_user",
        "job_id",
    )

    _channel: Channel
    _supervisor: SupervisorProtocol
    _settled: bool
    job_id: str

    def __init__(self) -> None:
        # Reentrant: a signal's handler may close the job in the midst of anything that its thread does.
        self._lock = RLock()
        self._user: object = None
        self._ending = False
        self._closed_by: BaseException | None = None

    @property
    def settled(self) -> bool:
        """Whether the job holds no worker any more; pieces of its body may still be there to be read."""
        return self._settled

    @property
    def over(self) -> bool:
        """Whether nothing is done for the job any more: its worker is let go, or forgotten, by an interrupt."""
        if self._ending:
            return False
        return self._settled or (self._closed_by is not None and self._user in (None, _CLOSER))

    def close(self, cause: BaseException | None = None) -> None:
        """End the job; from any thread. A thread that is blocked in `read` is freed at once, with JobClosed.

        Nothing happens where the response has ended. Otherwise the handler has the pool's grace time to end,
        and then its worker is killed; nobody waits for that here.
        """
        if self._settled or self._supervisor.in_forked_child:
            return  # it is over; or this is a forked child, and the job is the parent's
        with self._lock:
            if self._settled or self._closed_by is not None:
                return
            self._closed_by = cause or JobClosed("close() was called")
            if self._user is not None:
                self._channel.wake()
                return
            self._user = _CLOSER
        self._abandon()

    def _fail_to_open(self, error: BaseException) -> None:
        """End a job whose opening has raised this, if it has begun to be one."""
        if not getattr(self, "_settled", True):
            self.close(error)

    def _wake(self) -> None:
        """The upload has something to send: have whoever waits for the channel look."""
        with self._lock:
            if self._user is not None and not self._settled:
                self._channel.wake()

    def _watch_scope(self, scope: CancelScope) -> None:
        scope.watch(id(self), _closer(self))

    def _take_channel(self, step: object) -> None:
        """Become the one that uses the channel, for this step. Raises what the job was closed with."""
        with self._lock:
            if self._settled or self._closed_by is not None:
                raise self._closed()
            if self._user is not None:
                raise RuntimeError(f"job {self.job_id} is being read already: one thread or task reads at a time")
            self._user = step
            if self._closed_by is not None:  # by a signal's handler, just now
                raise self._closed()

    def _break_off(self, step: object, error: BaseException) -> None:
        """The step has raised: the job is over, where it had the channel."""
        if self._user is step:
            self._closed_by = self._closed_by or error
            if not self._settled:
                self._abandon()

    def _release_channel(self, step: object) -> bool:
        """Use the channel no more; whether a close came meanwhile, which has been seen to."""
        with self._lock:
            if self._user is not step:
                return False
            leave = self._closed_by is not None and not self._settled
            if not leave:
                self._user = None
        if leave:
            self._abandon()
        return leave

    def _forget_user(self, step: object) -> None:
        """The step has raised and is over, whatever has become of letting the channel go."""
        if self._user is step:
            self._user = _CLOSER

    def _abandon(self) -> None:
        """The job was closed, and nobody uses its channel: let the worker go."""
        raise NotImplementedError

    def _closed(self) -> BaseException:
        """What a read of a job that was ended raises: the fault that ended it, or that it was closed."""
        if isinstance(self._closed_by, JobFailed):
            return self._closed_by
        return closed_by(self._closed_by or JobClosed("it is over"), f"job {self.job_id}")


def _closer(job: ChannelGuard) -> Watcher:
    """Closes the job when its scope is cancelled, without keeping it alive."""
    reference = weakref.ref(job)

    def close(cause: BaseException) -> None:
        if (found := reference()) is not None:
            found.close(cause)

    return close
