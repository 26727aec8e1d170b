"""Who holds which worker: the idle ones, and the waiting callers in their order.

A caller's own thread takes a worker here and gives it back; a worker that comes free goes straight to
the caller that has waited longest. The one lock guards a worker's change of hands, its death, and its
descriptors: a pidfd is never used after it was closed, a channel is closed by whoever holds it last.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from runner.cancellation import SIGNAL as CANCEL_SIGNAL
from runner.cancellation import STACKS_SIGNAL
from runner.errors import LeaseTimeout, QueueFull, closed_by
from runner.recycle import Recycle
from runner.scope import CancelScope
from runner.waiters import Caller, TaskWaiter, ThreadWaiter, Waiter
from runner.worker_record import Worker

if TYPE_CHECKING:
    from runner.round_trip import RoundTrip


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets a worker, and who may wait for one.

    At most `jobs` jobs run at once, of a provider at most what `per_provider` says for it; at most `queue` callers
    wait. None leaves it open.
    """

    jobs: int | None = None
    queue: int | None = None
    per_provider: Mapping[str, int] = {}


class Leases:
    """The idle workers and the callers that wait for one: first in, first out, but for a provider at its limit.

    `retire` is called with a worker that is due for recycling when it comes back, `pressed` when a caller has
    taken the last idle worker, or waits; neither may wait, or take a lease.
    """

    def __init__(
        self,
        admission: Admission | None = None,
        recycle: Recycle | None = None,
    ) -> None:
        self._admission = admission or Admission()
        self._recycle = recycle
        self._running: Counter[str] = Counter()
        self.retire: Callable[[Worker], object] = lambda worker: None
        self.pressed: Callable[[], object] | None = None
        self._lock = threading.RLock()  # reentrant: a finaliser may give a worker up in the middle of anything
        self._quiet = threading.Condition(self._lock)
        self._quiet_by = math.inf
        self._idle: list[Worker] = []
        self._waiters: deque[Waiter] = deque()
        self._leased: set[Worker] = set()
        self._refusal: Callable[[], Exception] | None = None
        self._closed = False

    def lease(
        self, timeout: float | None, scope: CancelScope | None = None, provider: str = "", caller: Caller | None = None
    ) -> Worker:
        """A ready worker, which the caller then holds until `give_back` or `discard`.

        Waits up to `timeout` seconds, for ever with None, and no longer than the scope lasts. A worker that is
        found meanwhile is presented to `caller` by whoever gives it up. Raises LeaseTimeout, QueueFull, JobClosed
        where the scope is cancelled, and what `refuse` was given.
        """
        with self._lock:
            if (worker := self._take_idle(provider)) is not None:
                return worker
            waiter = ThreadWaiter(provider, caller)
            self._enqueue(waiter)
        try:
            self._watch(waiter, scope)
            waiter.wait(_until(timeout, scope))
        except BaseException:
            self._withdraw(waiter)
            raise
        finally:
            if scope is not None:
                scope.unwatch(waiter)
        return self._found(waiter, timeout, scope)

    async def lease_async(
        self, timeout: float | None, scope: CancelScope | None = None, provider: str = "", caller: Caller | None = None
    ) -> Worker:
        """As `lease`, for a task of an event loop."""
        with self._lock:
            if (worker := self._take_idle(provider)) is not None:
                return worker
            waiter = TaskWaiter(provider, caller)
            self._enqueue(waiter)
        try:
            self._watch(waiter, scope)
            await waiter.wait(_until(timeout, scope))
        except BaseException:
            self._withdraw(waiter)
            raise
        finally:
            if scope is not None:
                scope.unwatch(waiter)
        return self._found(waiter, timeout, scope)

    def _take_idle(self, provider: str) -> Worker | None:
        if self._refusal is not None:
            raise self._refusal()
        if self._idle and self._admits(provider):
            return self._hand_out(self._idle.pop(), provider)
        if self._admission.queue is not None and len(self._waiters) >= self._admission.queue:
            raise QueueFull(
                f"all workers are busy, and {len(self._waiters)} callers wait already: "
                f"start the pool with more workers, or a longer queue"
            )
        return None

    def _enqueue(self, waiter: Waiter) -> None:
        self._waiters.append(waiter)
        if self.pressed is not None:
            self.pressed()

    def _watch(self, waiter: Waiter, scope: CancelScope | None) -> None:
        if scope is not None:
            scope.watch(waiter, lambda cause: self._fail(waiter, closed_by(cause)))

    def _found(self, waiter: Waiter, timeout: float | None, scope: CancelScope | None) -> Worker:
        """What a waiter found, once it waits no more."""
        if scope is not None and not waiter.done and (cause := scope.cause) is not None:
            self._fail(waiter, closed_by(cause))  # it is the scope's time that is up
        with self._lock:
            if not waiter.done:
                self._waiters.remove(waiter)
                if not self.manned:
                    raise LeaseTimeout(
                        f"no worker had started within {timeout} s: start the pool before its first request "
                        f"(pool.start(), or a with block), or wait longer"
                    )
                raise LeaseTimeout(
                    f"no worker became free within {timeout} s: start the pool with more workers, "
                    f"or wait longer (lease_timeout; the client's connect or pool timeout)"
                )
        if waiter.worker is None:
            assert waiter.error is not None
            raise waiter.error
        return waiter.worker

    def _fail(self, waiter: Waiter, error: Exception) -> None:
        with self._lock:
            if not waiter.done:
                self._waiters.remove(waiter)
                waiter.error = error
                waiter.wake()

    def _withdraw(self, waiter: Waiter) -> None:
        """Stop waiting, and give back the worker that was handed over at the same moment."""
        with self._lock:
            if not waiter.done:
                self._waiters.remove(waiter)
        if waiter.worker is not None:
            if waiter.caller is not None:
                waiter.caller.withdraw(waiter.worker)
            else:
                self.give_back(waiter.worker)

    def _admits(self, provider: str) -> bool:
        """Whether one more job may run now, of this provider."""
        admission = self._admission
        if admission.jobs is not None and len(self._leased) >= admission.jobs:
            return False
        limit = admission.per_provider.get(provider) if admission.per_provider else None
        return limit is None or self._running[provider] < limit

    def _hand_out(self, worker: Worker, provider: str) -> Worker:
        worker.leased = True
        worker.provider = provider
        self._leased.add(worker)
        if self._admission.per_provider:
            self._running[provider] += 1
        if self.pressed is not None and not self._idle:
            self.pressed()
        return worker

    def _offer(self, worker: Worker) -> None:
        """A worker has come free, and with it perhaps room for a provider: serve whoever has waited longest."""
        self._idle.append(worker)
        if self._waiters:
            self._serve_waiters()

    def _serve_waiters(self) -> None:
        while self._idle and (waiter := self._next_waiter()) is not None:
            worker = waiter.worker = self._hand_out(self._idle.pop(), waiter.provider)
            if waiter.caller is not None:
                waiter.caller.present(worker)
            if not waiter.wake():
                waiter.worker, waiter.error = None, LeaseTimeout("the event loop of this caller has ended")
                if waiter.caller is not None:
                    waiter.caller.withdraw(worker)
                else:
                    self._take_back(worker)
                    self._idle.append(worker)

    def _next_waiter(self) -> Waiter | None:
        """Take out of the queue whoever has waited longest of those that are admitted."""
        for place, waiter in enumerate(self._waiters):
            if self._admits(waiter.provider):
                del self._waiters[place]
                return waiter
        return None

    def _take_back(self, worker: Worker) -> None:
        worker.leased = False
        worker.job = None
        self._leased.discard(worker)
        if self._admission.per_provider:
            self._running[worker.provider] -= 1
        if self._closed and not self._leased:
            self._quiet.notify_all()

    def add(self, worker: Worker) -> None:
        """A worker is ready for its first job."""
        with self._lock:
            self._refusal = None if not self._closed else self._refusal
            worker.ready = True
            worker.ready_at = worker.idle_since = time.monotonic()
            if self._recycle is not None:
                worker.last_job = self._recycle.last_job()
            if not worker.dead and not worker.doomed:
                self._offer(worker)

    def give_back(self, worker: Worker) -> None:
        """The holder is done with a worker that stands between two jobs."""
        with self._lock:
            self._take_back(worker)
            dead = worker.dead
            due = self._recycle is not None and not dead and not self._closed and self._is_due(worker)
            if not dead and not worker.doomed and not due:
                worker.idle_since = time.monotonic()
                self._offer(worker)
            elif self._waiters:
                self._serve_waiters()  # there may be room now for somebody whom others did not admit
        if dead:
            worker.channel.close()
        elif due:
            self.retire(worker)

    def _is_due(self, worker: Worker) -> bool:
        assert self._recycle is not None
        return self._recycle.is_due(worker.pid, worker.jobs, worker.last_job, worker.ready_at)

    def withdraw_idle(self, longer_than: float) -> Worker | None:
        """Take out of service the worker that has been idle longest, if that is longer than so many seconds."""
        with self._lock:
            if not self._idle or self._waiters:
                return None
            worker = min(self._idle, key=lambda idle: idle.idle_since)
            if time.monotonic() - worker.idle_since < longer_than:
                return None
            self._idle.remove(worker)
            return worker

    def idle(self) -> list[Worker]:
        """The workers that nobody holds now."""
        with self._lock:
            return list(self._idle)

    def expel(self, worker: Worker, since: float) -> bool:
        """Kill a worker that has been idle since then, if it still is; whether it was."""
        with self._lock:
            if worker not in self._idle or worker.idle_since != since:
                return False
            self._idle.remove(worker)
            self._signal(worker)
            return True

    @property
    def manned(self) -> bool:
        """Whether there is any worker, idle or held."""
        return bool(self._idle or self._leased)

    def numbers(self) -> tuple[int, int, int]:
        """How many workers are idle, how many are held, and how many callers wait."""
        with self._lock:
            return len(self._idle), len(self._leased), len(self._waiters)

    def discard(self, worker: Worker) -> None:
        """The holder is done with a worker that must not go on: it is killed, dead or not yet."""
        with self._lock:
            self._take_back(worker)
            dead = worker.dead
            self._signal(worker)
            if self._waiters:
                self._serve_waiters()
        if dead:
            worker.channel.close()

    def cancel(self, worker: Worker, job: int) -> None:
        """Tell the worker that the caller of its job has left."""
        with self._lock:
            if worker.pidfd is not None:
                worker.channel.name_cancelled(job)
                self._signal_with(worker, CANCEL_SIGNAL)

    def kill(self, worker: Worker) -> None:
        """SIGKILL the worker, if it lives. Whoever holds it still does."""
        with self._lock:
            self._signal(worker)

    def adopt_pidfd(self, worker: Worker, pid: int, pidfd: int) -> None:
        """The worker was born; one that is to be killed already is killed."""
        with self._lock:
            worker.pid = pid
            worker.pidfd = pidfd
            if worker.doomed:
                self._signal(worker)

    def forget(self) -> None:
        """In a forked child: nobody holds the lock any more."""
        self._lock = threading.RLock()
        self._quiet = threading.Condition(self._lock)
        self._quiet_by = math.inf

    def _signal(self, worker: Worker) -> None:
        worker.doomed = True
        self._signal_with(worker, signal.SIGKILL)

    @staticmethod
    def _signal_with(worker: Worker, number: int) -> None:
        if worker.pidfd is not None:
            try:
                signal.pidfd_send_signal(worker.pidfd, number)
            except ProcessLookupError:
                pass  # it has ended, and its death is on the way to us

    def bury(self, worker: Worker, status: int | None) -> None:
        """A worker is dead: it is offered no more, and its holder, if any, is woken to find out."""
        with self._lock:
            worker.dead = True
            worker.status = status
            if worker.pidfd is not None:
                os.close(worker.pidfd)
                worker.pidfd = None
            if worker in self._idle:
                self._idle.remove(worker)
            held = worker.leased
            if held:
                worker.channel.wake()
        if not held:
            worker.channel.close()
        worker.exited.set()

    def refuse(self, refusal: Callable[[], Exception]) -> None:
        """From now on answer callers with this error, those that wait included, until a worker is added."""
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
            waiter = self._waiters.popleft()
            waiter.error = refusal()
            waiter.wake()

    def wait_quiet(self, timeout: float) -> None:
        """After `close`: wait until nobody holds a worker, up to `timeout` seconds, or less where `hurry` says so."""
        with self._quiet:
            self._hurry(timeout)
            while self._leased and (left := self._quiet_by - time.monotonic()) > 0:
                self._quiet.wait(min(left, threading.TIMEOUT_MAX))

    def hurry(self, timeout: float) -> None:
        """Have `wait_quiet`, which another thread may be in, end after `timeout` seconds at the latest."""
        with self._quiet:
            self._hurry(timeout)
            self._quiet.notify_all()

    def _hurry(self, timeout: float) -> None:
        self._quiet_by = min(self._quiet_by, time.monotonic() + timeout)

    def leased(self) -> list[Worker]:
        """The workers that are held now."""
        with self._lock:
            return list(self._leased)

    def dump_stacks(self, worker: Worker) -> None:
        """Have the worker print the Python stacks of all its threads."""
        with self._lock:
            self._signal_with(worker, STACKS_SIGNAL)

    def jobs(self) -> list[RoundTrip]:
        """The jobs that hold a worker now."""
        with self._lock:
            references = [worker.job for worker in self._leased]
        return [job for reference in references if reference is not None and (job := reference()) is not None]

    def is_leased(self, worker: Worker) -> bool:
        """Whether somebody holds the worker now."""
        with self._lock:
            return worker.leased


def _until(timeout: float | None, scope: CancelScope | None) -> float | None:
    """How long to wait at most, in seconds."""
    deadline = None if scope is None else scope.deadline
    if deadline is None:
        return timeout
    left = max(deadline - time.monotonic(), 0)
    return left if timeout is None else min(timeout, left)
