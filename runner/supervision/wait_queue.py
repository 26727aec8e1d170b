"""Handing out what there is little of, to callers that wait for it in their order: threads, and tasks of event loops.

`Leases` hands out the workers of a machine, `runner.cluster.placement` places on the nodes of a cluster.

What was found for a caller that waits is handed over in two steps. Under the lock it is noted as found, and who found
it has it `_at_hand`; without the lock it is presented to the caller, who is woken. Whoever takes it out of `_at_hand`
first hands it over, and nobody else does: the one who gave it up, or the caller itself, whose time is up; so that an
exception of a signal's handler between the two steps loses nobody (`hand_over_late`).
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from ..errors import LeaseTimeout, QueueFull, closed_by
from ..model.cancel_scope import CancelScope
from ..model.durations import longest_wait, min_timeout
from .waiters import Caller, TaskWaiter, ThreadWaiter, Waiter

Resource = TypeVar("Resource")

_PRESENTED: Final = 5.0
"""Seconds after which whoever presents what was found, in one write, was interrupted in it for sure."""


class WaitQueue(ABC, Generic[Resource]):
    """The waiting callers: first in, first out, but for those that are not admitted yet.

    At most `queue` callers wait, None for any number. `_lock` guards all of it.
    """

    def __init__(self, queue: int | None) -> None:
        self._queue = queue
        self.on_saturated: Callable[[], object] | None = None
        self._lock = threading.RLock()  # reentrant: a finalizer may give a resource up in the middle of anything
        self._drained = threading.Condition(self._lock)
        self._drain_until = math.inf
        self._waiters: deque[Waiter[Resource]] = deque()
        self._at_hand: dict[Waiter[Resource], float] = {}
        self._handing_over: dict[Waiter[Resource], float] = {}
        self._refusal: Callable[[], Exception] | None = None
        self._closed = False

    # -- what is handed out ------------------------------------------------------------------------

    @abstractmethod
    def _take(self, provider: str, caller: Caller[Resource] | None) -> Resource | None:
        """Hand one out for a job of this provider, if there is one and the job is admitted. Under the lock."""

    @abstractmethod
    def _admits(self, provider: str) -> bool:
        """Whether one more job may run now, of this provider. Under the lock."""

    @abstractmethod
    def _give_up(self, resource: Resource) -> None:
        """Take back what was found for a caller that waits no more, and has not used it."""

    def _disown(self, resource: Resource) -> None:
        """The caller that it was found for has no say in it any more. Under the lock."""

    @property
    @abstractmethod
    def has_any(self) -> bool:
        """Whether there is any, handed out or not."""

    @property
    @abstractmethod
    def _any_taken(self) -> bool:
        """Whether any is handed out."""

    # -- callers -----------------------------------------------------------------------------------

    def lease(
        self,
        timeout: float | None,
        scope: CancelScope | None = None,
        provider: str = "",
        caller: Caller[Resource] | None = None,
    ) -> Resource:
        """One that is ready, which the caller then holds until it gives it up.

        Waits up to `timeout` seconds, for ever with None, and no longer than the scope lasts. One that is
        found meanwhile is presented to `caller` by whoever gives it up. Raises LeaseTimeout, QueueFull, JobClosed
        where the scope is cancelled, and what `refuse` was given.
        """
        waiter: ThreadWaiter[Resource] | None = None
        try:
            with self._lock:
                if (resource := self._take_or_queue(provider, caller)) is not None:
                    return resource
                waiter = ThreadWaiter(provider, caller)
                self._enqueue(waiter)
            self._watch(waiter, scope)
            waiter.wait(_until(timeout, scope))
            while not self.is_over(waiter, timeout, scope):
                waiter.wait(None)
            return waiter.result()
        except BaseException:
            if waiter is not None:
                self.withdraw(waiter)
            raise
        finally:
            if scope is not None and waiter is not None:
                scope.unwatch(waiter)

    async def lease_async(
        self,
        timeout: float | None,
        scope: CancelScope | None = None,
        provider: str = "",
        caller: Caller[Resource] | None = None,
    ) -> Resource:
        """As `lease`, for a task of an event loop."""
        waiter: TaskWaiter[Resource] | None = None
        try:
            with self._lock:
                if (resource := self._take_or_queue(provider, caller)) is not None:
                    return resource
                waiter = TaskWaiter(provider, caller)
                self._enqueue(waiter)
            self._watch(waiter, scope)
            await waiter.wait(_until(timeout, scope))
            while not self.is_over(waiter, timeout, scope):
                await waiter.wait(None)
            return waiter.result()
        except BaseException:
            if waiter is not None:
                self.withdraw(waiter)
            raise
        finally:
            if scope is not None and waiter is not None:
                scope.unwatch(waiter)

    def lease_or_wait(self, waiter: Waiter[Resource]) -> Resource | None:
        """As `lease`, for a caller that can't wait here: None where its waiter will be woken instead.

        Then either `is_over`, once its time is up, or `withdraw` ends the waiting.
        """
        with self._lock:
            if (resource := self._take_or_queue(waiter.provider, waiter.caller)) is None:
                self._enqueue(waiter)
            return resource

    def _take_or_queue(self, provider: str, caller: Caller[Resource] | None) -> Resource | None:
        """One that is there; None where the caller has to wait, and may."""
        if self._refusal is not None:
            raise self._refusal()
        if (resource := self._take(provider, caller)) is not None:
            return resource
        if self._queue is not None and len(self._waiters) >= self._queue:
            raise QueueFull(
                f"all workers are busy, and {len(self._waiters)} callers wait already: "
                f"start the pool with more workers, or a longer queue"
            )
        return None

    def _enqueue(self, waiter: Waiter[Resource]) -> None:
        self._waiters.append(waiter)
        if self.on_saturated is not None:
            self.on_saturated()

    def _watch(self, waiter: Waiter[Resource], scope: CancelScope | None) -> None:
        if scope is not None:
            scope.watch(waiter, lambda cause: self._fail(waiter, closed_by(cause)))

    def is_over(self, waiter: Waiter[Resource], timeout: float | None, scope: CancelScope | None) -> bool:
        """Whether a caller has waited long enough. False where something is being handed over to it at this moment."""
        if scope is not None and not waiter.done and (cause := scope.cause) is not None:
            self._fail(waiter, closed_by(cause))  # it is the scope's time that is up
        with self._lock:
            if waiter.done:
                if waiter in self._at_hand:  # found, and whoever found it has not come to say so: we take it
                    del self._at_hand[waiter]
                    waiter.told = True
                return waiter.told
            self._drop(waiter)
            if not self.has_any:
                raise LeaseTimeout(
                    f"no worker had started within {timeout} s: start the pool before its first request "
                    f"(pool.start(), or a with block), or wait longer"
                )
            raise LeaseTimeout(
                f"no worker became free within {timeout} s: start the pool with more workers, "
                f"or wait longer (lease_timeout; the client's connect or pool timeout)"
            )

    def _fail(self, waiter: Waiter[Resource], error: Exception) -> None:
        with self._lock:
            if not waiter.done:
                waiter.error = error
                self._tell(waiter)
                self._drop(waiter)

    def _tell(self, waiter: Waiter[Resource]) -> bool:
        """Wake a caller up; whether there was anybody. Under the lock."""
        waiter.told = True
        return waiter.wake()

    def _drop(self, waiter: Waiter[Resource]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def withdraw(self, waiter: Waiter[Resource]) -> None:
        """Stop waiting, and give back what was handed over at the same moment."""
        with self._lock:
            self._drop(waiter)
            if waiter in self._at_hand:
                del self._at_hand[waiter]
            elif waiter.found is not None and not waiter.told:
                waiter.left = True  # whoever is handing it over takes it back, and nobody else
                self._disown(waiter.found)
                return
        if waiter.found is not None:
            self._take_from(waiter, waiter.found)

    def _take_from(self, waiter: Waiter[Resource], resource: Resource) -> None:
        if waiter.caller is not None:
            waiter.caller.withdraw(resource)
        else:
            self._give_up(resource)

    def _next_waiter(self) -> Waiter[Resource] | None:
        """Whoever has waited longest of those that are admitted, and for whom nothing was found."""
        for waiter in self._waiters:
            if not waiter.done and self._admits(waiter.provider):
                return waiter
        return None

    def _find(self, waiter: Waiter[Resource], resource: Resource) -> None:
        """Note what was found for a caller; `_hand_over` has to follow. Under the lock."""
        waiter.found, self._at_hand[waiter] = resource, time.monotonic()
        self._waiters.remove(waiter)

    def _hand_over(self) -> None:
        """Present what was found to those that it was found for, and wake them. Not under the lock."""
        while self._at_hand:
            with self._lock:
                waiter = next(iter(self._at_hand), None)
            if waiter is not None:
                self._hand_over_to(waiter)

    def hand_over_late(self, older_than: float) -> None:
        """Hand over what was found so many seconds ago, by somebody who was interrupted."""
        now = time.monotonic()
        with self._lock:
            late = [waiter for waiter, since in self._at_hand.items() if now - since >= older_than]
            stuck = [waiter for waiter, since in self._handing_over.items() if now - since >= _PRESENTED]
        for waiter in late:
            self._hand_over_to(waiter)
        for waiter in stuck:
            self._end_hand_over(waiter)

    def _hand_over_to(self, waiter: Waiter[Resource]) -> None:
        ours = False
        try:
            with self._lock:
                if waiter in self._at_hand:
                    self._handing_over[waiter] = time.monotonic()
                    ours = True
                    del self._at_hand[waiter]
            if ours and waiter.caller is not None:
                assert waiter.found is not None
                waiter.caller.dispatch(waiter.found)
        finally:
            if ours:
                self._end_hand_over(waiter)

    def _end_hand_over(self, waiter: Waiter[Resource]) -> None:
        with self._lock:
            resource = waiter.found
            if waiter not in self._handing_over or resource is None:
                return
            del self._handing_over[waiter]
            left = waiter.left
            if not left and not self._tell(waiter):
                left = True
                waiter.found, waiter.error = None, LeaseTimeout("the event loop of this caller has ended")
        if left:
            self._take_from(waiter, resource)

    # -- refusals, and the end -----------------------------------------------------------------------

    def refuse(self, refusal: Callable[[], Exception]) -> None:
        """From now on answer callers with this error, those that wait included, until there is one again."""
        with self._lock:
            if not self._closed:
                self._refusal = refusal
                self._fail_waiters(refusal)

    def close(self, refusal: Callable[[], Exception]) -> None:
        """Like `refuse`, for good."""
        with self._lock:
            self._closed = True
            self._refusal = refusal
            self._fail_waiters(refusal)

    def _fail_waiters(self, refusal: Callable[[], Exception]) -> None:
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.done:
                waiter.error = refusal()
                self._tell(waiter)
            self._drop(waiter)

    def wait_drained(self, timeout: float) -> None:
        """After `close`: wait until nobody holds one, up to `timeout` seconds, less after `shorten_drain`."""
        with self._drained:
            self._shorten_drain(timeout)
            while self._any_taken and (left := self._drain_until - time.monotonic()) > 0:
                self._drained.wait(min(left, longest_wait()))

    def shorten_drain(self, timeout: float) -> None:
        """Have `wait_drained`, which another thread may be in, end after `timeout` seconds at the latest."""
        with self._drained:
            self._shorten_drain(timeout)
            self._drained.notify_all()

    def _shorten_drain(self, timeout: float) -> None:
        self._drain_until = min(self._drain_until, time.monotonic() + timeout)

    def after_fork_in_child(self) -> None:
        """In a forked child: nobody holds the lock any more."""
        self._lock = threading.RLock()
        self._drained = threading.Condition(self._lock)
        self._drain_until = math.inf


def _until(timeout: float | None, scope: CancelScope | None) -> float | None:
    """How long to wait at most, in seconds."""
    return min_timeout(timeout, None if scope is None else scope.deadline)
