"""Who holds which worker: the idle ones, and the waiting callers in their order.

A caller's own thread takes a worker here and gives it back; a worker that comes free goes straight to
the caller that has waited longest. The one lock guards a worker's change of hands, its death, and its
descriptors: a pidfd is never used after it was closed, a channel is closed by whoever holds it last.

Under the lock nothing is done to a worker that it could hold up: no pipe of its is read or written, no file of its in
/proc read. It is only signalled, which waits for nobody (pidfd_send_signal(2)).

An exception that a signal's handler raises in the midst of a change of hands may leave a worker with nobody: `lost`
finds those, and the supervisor has them replaced.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from ..control.signals import SIGNAL as CANCEL_SIGNAL
from ..control.signals import STACKS_SIGNAL
from ..model.recycle import Recycle
from .record import Worker
from .wait_queue import WaitQueue
from .waiters import Caller

if TYPE_CHECKING:
    from .job_protocol import JobProtocol


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets a worker, and who may wait for one.

    At most `jobs` jobs run at once, of a provider at most what `per_provider` says for it; at most `queue` callers
    wait. None leaves it open.
    """

    jobs: int | None = None
    queue: int | None = None
    per_provider: Mapping[str, int] = {}


class Leases(WaitQueue[Worker]):
    """The idle workers and the callers that wait for one.

    Callers are served first in, first out, but for a provider at its limit. The worker that came back last goes out
    first: it is warm, and those that are not needed stay idle until `Scaler` lets them go.

    `retire` is called with a worker that is due for recycling when it comes back, `on_saturated` when a caller has
    taken the last idle worker, or waits; neither may wait, or take a lease.
    """

    def __init__(
        self,
        admission: Admission | None = None,
        recycle: Recycle | None = None,
    ) -> None:
        self._admission = admission or Admission()
        super().__init__(self._admission.queue)
        self._recycle = recycle
        self._running: Counter[str] = Counter()
        self.retire: Callable[[Worker], object] = lambda worker: None
        self._idle: list[Worker] = []
        self._leased: set[Worker] = set()

    def _take(self, provider: str, caller: Caller[Worker] | None) -> Worker | None:
        if self._idle and self._admits(provider):
            return self._hand_out(self._idle.pop(), provider, caller)
        return None

    def _give_up(self, resource: Worker) -> None:
        self.give_back(resource)

    def _admits(self, provider: str) -> bool:
        admission = self._admission
        if admission.jobs is not None and len(self._leased) >= admission.jobs:
            return False
        limit = admission.per_provider.get(provider) if admission.per_provider else None
        return limit is None or self._running[provider] < limit

    def _hand_out(self, worker: Worker, provider: str, caller: Caller[Worker] | None) -> Worker:
        reference: weakref.ref[object] | None = None if caller is None else weakref.ref(caller)
        self._leased.add(worker)
        worker.leased = True
        worker.provider = provider
        worker.turn += 1
        worker.caller = reference
        if self._admission.per_provider:
            self._running[provider] += 1
        if self.on_saturated is not None and not self._idle:
            self.on_saturated()
        return worker

    def _find_for_waiters(self) -> None:
        """Find idle workers for those who have waited longest; `_hand_over` has to follow. Under the lock."""
        while self._idle and (waiter := self._next_waiter()) is not None:
            self._find(waiter, self._hand_out(self._idle.pop(), waiter.provider, waiter.caller))

    def _disown(self, resource: Worker) -> None:
        resource.caller = None

    def _take_back(self, worker: Worker) -> bool:
        """Lease it no more; False where it was not leased any more, and others have seen to it."""
        if not worker.leased:
            return False
        worker.leased = False
        worker.job = worker.caller = None
        self._leased.discard(worker)
        if self._admission.per_provider:
            self._running[worker.provider] -= 1
        if self._closed and not self._leased:
            self._drained.notify_all()
        return True

    def add(self, worker: Worker) -> None:
        """A worker is ready for its first job."""
        with self._lock:
            self._refusal = None if not self._closed else self._refusal
            worker.ready = True
            worker.ready_at = worker.idle_since = time.monotonic()
            if self._recycle is not None:
                worker.last_job = self._recycle.last_job()
            if not worker.dead and not worker.kill_sent:
                self._idle.append(worker)
            self._find_for_waiters()
        self._hand_over()

    def give_back(self, worker: Worker) -> None:
        """The holder is done with a worker that stands between two jobs."""
        due = self._recycle is not None and not worker.dead and not self._closed and self._is_due(worker)
        with self._lock:
            if not self._take_back(worker):
                return
            dead = worker.dead
            if not dead and not worker.kill_sent and not due:
                worker.idle_since = time.monotonic()
                self._idle.append(worker)
            if self._waiters:  # there may be room now for somebody whom others did not admit
                self._find_for_waiters()
        if self._at_hand:
            self._hand_over()
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

    def evict(self, worker: Worker, since: float) -> bool:
        """Kill a worker that has been idle since then, if it still is; whether it was."""
        with self._lock:
            if worker not in self._idle or worker.idle_since != since:
                return False
            self._idle.remove(worker)
            self._signal(worker)
            return True

    @property
    def has_any(self) -> bool:
        """Whether there is any worker, idle or held."""
        return bool(self._idle or self._leased)

    @property
    def _any_taken(self) -> bool:
        return bool(self._leased)

    def numbers(self) -> tuple[int, int, int]:
        """How many workers are idle, how many are held, and how many callers wait."""
        with self._lock:
            return len(self._idle), len(self._leased), len(self._waiters)

    def discard(self, worker: Worker) -> None:
        """The holder is done with a worker that must not go on: it is killed, dead or not yet."""
        with self._lock:
            if not self._take_back(worker):
                return
            dead = worker.dead
            self._signal(worker)
            if self._waiters:
                self._find_for_waiters()
        if self._at_hand:
            self._hand_over()
        if dead:
            worker.channel.close()

    def held_by(self, caller: object) -> Worker | None:
        """The worker that this caller has leased, and that no job holds yet."""
        with self._lock:
            for worker in self._leased:
                if worker.leased and worker.job is None and worker.caller is not None and worker.caller() is caller:
                    return worker
        return None

    def lost(self, workers: Iterable[Worker]) -> dict[Worker, int]:
        """Which of these nobody holds, or whose holder has done with them without saying so; with their turns.

        It may be only for this moment: that one was lost is sure where it still is at the same turn a while later.
        """
        with self._lock:
            return {
                worker: worker.turn
                for worker in workers
                if worker.ready
                and not worker.dead
                and (worker.forgotten if worker.leased else worker not in self._idle)
            }

    def reclaim(self, worker: Worker, turn: int) -> bool:
        """Kill a worker that was lost, if it still is; whether that is news."""
        with self._lock:
            if worker not in self.lost([worker]) or worker.turn != turn:
                return False
            kill_sent = worker.kill_sent
            if worker.leased:
                self._take_back(worker)
            self._leased.discard(worker)
            self._running = Counter(held.provider for held in self._leased)
            self._signal(worker)  # again perhaps: who was to kill it may have been interrupted
            self._find_for_waiters()
        self._hand_over()
        return not kill_sent

    def serve_late(self, older_than: float) -> None:
        """Serve those who wait, where whoever was to do it was interrupted, so many seconds ago."""
        with self._lock:
            waiting = {id(waiter.caller): waiter for waiter in self._waiters if waiter.caller is not None}
            for worker in self._leased:  # to somebody who still waits, and does not know it?
                caller = None if worker.caller is None or worker.job is not None else worker.caller()
                if caller is not None and (waiter := waiting.get(id(caller))) is not None and not waiter.done:
                    self._find(waiter, worker)
            self._find_for_waiters()
        self.hand_over_late(older_than)

    @property
    def busy(self) -> bool:
        """Whether a worker is held, or somebody waits for one."""
        return bool(self._leased or self._waiters or self._at_hand or self._handing_over)

    def cancel(self, worker: Worker, job: int) -> bool:
        """Tell the worker, which the caller holds, that its job's caller has left; whether it can be told."""
        if not worker.channel.name_cancelled(job):
            return False
        with self._lock:
            self._signal_with(worker, CANCEL_SIGNAL)
        return True

    def kill(self, worker: Worker) -> None:
        """SIGKILL the worker, if it lives. Whoever holds it still does."""
        with self._lock:
            self._signal(worker)

    def adopt_pidfd(self, worker: Worker, pid: int, pidfd: int) -> None:
        """The worker was born; one that is to be killed already is killed."""
        with self._lock:
            worker.pid = pid
            worker.pidfd = pidfd
            if worker.kill_sent:
                self._signal(worker)

    def _signal(self, worker: Worker) -> None:
        worker.kill_sent = True
        self._signal_with(worker, signal.SIGKILL)

    @staticmethod
    def _signal_with(worker: Worker, number: int) -> None:
        if worker.pidfd is not None:
            try:
                signal.pidfd_send_signal(worker.pidfd, number)
            except ProcessLookupError:
                pass  # it has ended, and its death is on the way to us

    def mark_exited(self, worker: Worker, status: int | None) -> None:
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

    def leased(self) -> list[Worker]:
        """The workers that are held now."""
        with self._lock:
            return list(self._leased)

    def dump_stacks(self, worker: Worker) -> None:
        """Have the worker print the Python stacks of all its threads."""
        with self._lock:
            self._signal_with(worker, STACKS_SIGNAL)

    def jobs(self) -> list[JobProtocol]:
        """The jobs that hold a worker now."""
        with self._lock:
            references = [worker.job for worker in self._leased]
        return [job for reference in references if reference is not None and (job := reference()) is not None]

    def is_leased(self, worker: Worker) -> bool:
        """Whether somebody holds the worker now."""
        with self._lock:
            return worker.leased
