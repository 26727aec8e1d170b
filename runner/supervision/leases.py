"""Who holds which lane of which worker, and the waiting callers in their order.

A caller's own thread takes a lane here and gives it back; one that comes free goes straight to the caller that has
waited longest. The one lock guards a lane's change of hands, its worker's death, and its descriptors: a pidfd is never
used after it was closed, a channel is closed by whoever holds it last.

Under the lock nothing is done to a worker that it could hold up: no pipe of its is read or written, no file of its in
/proc read. It is only signalled, which waits for nobody (pidfd_send_signal(2)), and told of a lane that is opened,
which does not wait either.

All changes of hands are under one lock, and so in one class, which is longer than others.

An exception that a signal's handler raises in the midst of a change of hands may leave a lane with nobody: `lost`
finds those, and the supervisor has their workers replaced.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..control.signals import SIGNAL as CANCEL_SIGNAL
from ..control.signals import STACKS_SIGNAL
from ..model.recycle import Recycle
from .record import Lane, Worker
from .rooms import Rooms
from .wait_queue import WaitQueue
from .waiters import Caller

if TYPE_CHECKING:
    from .job_protocol import JobProtocol


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets a worker, and who may wait for one.

    At most `jobs` jobs run at once, of a provider at most what `per_provider` says for it; at most `queue` callers
    wait. At most `leaving` workers are due for recycling and have jobs still. None leaves it open.
    """

    jobs: int | None = None
    leaving: int | None = None
    queue: int | None = None
    per_provider: Mapping[str, int] = {}


class Numbers(NamedTuple):
    """How many workers have no job, and how many have some; how many jobs run, and how many callers wait.

    `serving` is how many workers may get a job, now or once a lane of theirs is free.
    """

    idle: int
    busy: int
    running: int
    waiting: int
    serving: int


class Leases(WaitQueue[Lane]):
    """The lanes of the workers, and the callers that wait for one.

    Callers are served first in, first out, but for a provider at its limit. The worker with the fewest jobs is next.

    What follows is called with the worker, outside the lock, and may neither wait nor take a lease: `retire` when it is
    due for recycling, and gets no more jobs; `condemn` when one of its lanes can't go on; `left_idle` when one that
    gets no more jobs has ended its last. Under the lock `no_lane` is called when no lane can be opened, and why, and
    `on_saturated` when a caller has taken the last lane there is, or waits.
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
        self.condemn: Callable[[Worker], object] = lambda worker: None
        self.left_idle: Callable[[Worker], object] = lambda worker: None
        self.no_lane: Callable[[Worker, OSError], object] = lambda worker, error: None
        self._rooms = Rooms()
        self._busy = 0
        self._leased: set[Lane] = set()
        self._leaving: set[Worker] = set()

    # -- which lane is next --------------------------------------------------------------------------

    def _take(self, provider: str, caller: Caller[Lane] | None) -> Lane | None:
        if self._admits(provider) and (lane := self._next_lane()) is not None:
            return self._hand_out(lane, provider, caller)
        return None

    def _give_up(self, resource: Lane) -> None:
        self.give_back(resource)

    def _admits(self, provider: str) -> bool:
        admission = self._admission
        if admission.jobs is not None and len(self._leased) >= admission.jobs:
            return False
        limit = admission.per_provider.get(provider) if admission.per_provider else None
        return limit is None or self._running[provider] < limit

    def _next_lane(self) -> Lane | None:
        """The lane that gets the next job: one that is open, or else is opened."""
        while (worker := self._rooms.next()) is not None:
            if worker.free:
                return worker.free[-1]
            try:
                if worker.has_room:
                    return worker.open_lane()
            except OSError as error:
                worker.blocked = True
                self.no_lane(worker, error)
            self._rooms.place(worker)
        return None

    def _hand_out(self, lane: Lane, provider: str, caller: Caller[Lane] | None) -> Lane:
        reference: weakref.ref[object] | None = None if caller is None else weakref.ref(caller)
        worker = lane.worker
        worker.free.pop()  # it is the last
        self._leased.add(lane)
        lane.leased = True
        lane.provider = provider
        lane.turn += 1
        worker.turns += 1
        lane.caller = reference
        if not worker.running:
            self._busy += 1
        worker.running += 1
        self._rooms.place(worker)
        if self._admission.per_provider:
            self._running[provider] += 1
        if self.on_saturated is not None and self._rooms.next() is None:
            self.on_saturated()
        return lane

    def _find_for_waiters(self) -> None:
        """Find lanes for those who have waited longest; `_hand_over` has to follow. Under the lock."""
        while self._rooms.next() is not None and (waiter := self._next_waiter()) is not None:
            if (lane := self._next_lane()) is None:
                break
            self._find(waiter, self._hand_out(lane, waiter.provider, waiter.caller))

    def _disown(self, resource: Lane) -> None:
        resource.caller = None

    def _take_back(self, lane: Lane) -> bool:
        """Lease it no more; False where it was not leased any more, and others have seen to it."""
        if not lane.leased:
            return False
        lane.leased = False
        lane.job = lane.caller = None
        worker = lane.worker
        worker.running -= 1
        if not worker.running:
            self._busy -= 1
            worker.idle_since = time.monotonic()
        self._leased.discard(lane)
        if self._admission.per_provider:
            self._running[lane.provider] -= 1
        if self._closed and not self._leased:
            self._drained.notify_all()
        return True

    # -- changes of hands ----------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """A worker is ready for its first job."""
        with self._lock:
            self._refusal = None if not self._closed else self._refusal
            worker.ready = True
            worker.ready_at = worker.idle_since = time.monotonic()
            if self._recycle is not None:
                worker.last_job = self._recycle.last_job()
            self._rooms.serving.add(worker)
            self._rooms.place(worker)
            self._find_for_waiters()
        self._hand_over()

    def unblock(self, worker: Worker) -> None:
        """Lanes of this worker may be opened again."""
        with self._lock:
            worker.blocked = False
            self._rooms.place(worker)
            self._find_for_waiters()
        self._hand_over()

    def give_back(self, lane: Lane) -> None:
        """The holder is done with a lane that stands between two jobs."""
        worker = lane.worker
        due = self._recycle is not None and worker.in_service and not self._closed and self._is_due(worker)
        with self._lock:
            if not self._take_back(lane):
                return
            dead = worker.dead
            worker.free.append(lane)
            due = due and not worker.leaving and (not worker.running or self._may_leave)
            if due:
                worker.leaving = True
                self._leaving.add(worker)
            left = worker.leaving and not worker.running
            self._rooms.place(worker)
            if self._waiters:  # there may be room now for somebody whom others did not admit
                self._find_for_waiters()
        if self._at_hand:
            self._hand_over()
        if dead:
            lane.channel.close()
        elif due:
            self.retire(worker)
        elif left:
            self.left_idle(worker)

    @property
    def _may_leave(self) -> bool:
        """Whether one more worker may leave with jobs: they stay beside their successors, so that there is a bound."""
        most = self._admission.leaving
        return most is None or len(self._leaving) < most

    def _is_due(self, worker: Worker) -> bool:
        assert self._recycle is not None
        return self._recycle.is_due(worker.pid, worker.turns, worker.last_job, worker.ready_at)

    def withdraw_surplus(self, jobs: int) -> Worker | None:
        """Take out of service the worker with the fewest jobs, where no more than so many run, and nobody waits."""
        with self._lock:
            if self._waiters or len(self._leased) > jobs or (worker := self._rooms.next()) is None:
                return None
            self._take_out_of_service(worker)
            return worker

    def withdraw_idle(self, longer_than: float) -> Worker | None:
        """Take out of service the worker that has been idle longest, if that is longer than so many seconds."""
        with self._lock:
            idle = self._rooms.idle
            if not idle or self._waiters:
                return None
            worker = min(idle, key=lambda idle: idle.idle_since)
            if time.monotonic() - worker.idle_since < longer_than:
                return None
            self._take_out_of_service(worker)
            return worker

    def expel(self, worker: Worker) -> None:
        """Condemn a worker, whatever its lanes are at."""
        with self._lock:
            self._take_out_of_service(worker)
        self.condemn(worker)

    def refuse_lane(self, lane: Lane) -> None:
        """The worker has closed this lane, untaken, and its caller goes elsewhere: it is given no more of them."""
        worker = lane.worker
        with self._lock:
            if not self._take_back(lane):
                return
            lane.channel.close()
            worker.most_lanes = sum(lane.channel.response_fd >= 0 for lane in worker.lanes)
            self._rooms.place(worker)
        self.no_lane(worker, ConnectionRefusedError())

    def _take_out_of_service(self, worker: Worker) -> None:
        worker.leaving = True
        self._leaving.add(worker)
        self._rooms.place(worker)

    def idle(self) -> list[Worker]:
        """The workers that have no job now."""
        with self._lock:
            return list(self._rooms.idle)

    def evict(self, worker: Worker, since: float) -> bool:
        """Kill a worker that has been idle since then, if it still is; whether it was."""
        with self._lock:
            if worker.room != 0 or worker.idle_since != since:
                return False
            self._signal(worker)
            return True

    @property
    def has_any(self) -> bool:
        """Whether there is any worker, idle or held."""
        return bool(self._leased or self._rooms)

    @property
    def _any_taken(self) -> bool:
        return bool(self._leased)

    def numbers(self) -> Numbers:
        """How many there are."""
        with self._lock:
            return Numbers(
                len(self._rooms.idle), self._busy, len(self._leased), len(self._waiters), len(self._rooms.serving)
            )

    def discard(self, lane: Lane) -> None:
        """The holder is done with a lane that must not go on: its worker is killed, dead or not yet.

        One that has other jobs is condemned: these have their time first.
        """
        worker = lane.worker
        with self._lock:
            if not self._take_back(lane):
                return
            dead = worker.dead
            condemned = worker.running and not (dead or worker.kill_sent)
            if condemned:
                self._take_out_of_service(worker)
            else:
                self._signal(worker)
            if self._waiters:
                self._find_for_waiters()
        if self._at_hand:
            self._hand_over()
        if dead:
            lane.channel.close()
        elif condemned:
            self.condemn(worker)

    def held_by(self, caller: object) -> Lane | None:
        """The lane that this caller has leased, and that no job holds yet."""
        with self._lock:
            for lane in self._leased:
                if lane.leased and lane.job is None and lane.caller is not None and lane.caller() is caller:
                    return lane
        return None

    # -- lost ones -----------------------------------------------------------------------------------

    def lost(self, workers: Iterable[Worker], seen_to: Container[Lane] = ()) -> dict[Lane, int]:
        """Which lanes of these nobody holds, or whose holder has done with them without saying so; with their turns.

        It may be only for this moment: that one was lost is sure where it still is at the same turn a while later.
        Those that are `seen_to` are not lost.
        """
        found: dict[Lane, int] = {}
        with self._lock:
            for worker in workers:
                if not worker.ready or worker.dead:
                    continue
                held = sum([lane.leased for lane in worker.lanes])
                if worker.running != held:  # who counted was interrupted
                    worker.running = held
                    self._rooms.place(worker)
                free = set(worker.free)
                offered = worker.blocked or self._rooms.holds(worker)
                for lane in worker.lanes:
                    lost = lane.forgotten if lane.leased else not worker.leaving and (lane not in free or not offered)
                    if lost and lane not in seen_to and lane.channel.response_fd >= 0:
                        found[lane] = lane.turn
        return found

    def reclaim(self, lane: Lane, turn: int) -> bool:
        """Kill the worker of a lane that was lost, if it still is, or condemn it; whether that is news."""
        worker = lane.worker
        with self._lock:
            if lane not in self.lost([worker]) or lane.turn != turn:
                return False
            kill_sent = worker.kill_sent
            if lane.leased:
                self._take_back(lane)
            self._leased.discard(lane)
            self._running = Counter(held.provider for held in self._leased)
            self._busy = len({held.worker for held in self._leased})
            condemned = worker.running > 0 and not kill_sent
            if condemned:
                self._take_out_of_service(worker)
            else:
                self._signal(worker)  # again perhaps: who was to kill it may have been interrupted
            self._find_for_waiters()
        self._hand_over()
        if condemned:
            self.condemn(worker)
        return not kill_sent

    def serve_late(self, older_than: float) -> None:
        """Serve those who wait, where whoever was to do it was interrupted, so many seconds ago."""
        with self._lock:
            waiting = {id(waiter.caller): waiter for waiter in self._waiters if waiter.caller is not None}
            if waiting:
                for lane in self._leased:  # to somebody who still waits, and does not know it?
                    caller = None if lane.caller is None or lane.job is not None else lane.caller()
                    if caller is not None and (waiter := waiting.get(id(caller))) is not None and not waiter.done:
                        self._find(waiter, lane)
            self._find_for_waiters()
        self.hand_over_late(older_than)

    @property
    def busy(self) -> bool:
        """Whether a lane is held, or somebody waits for one."""
        return bool(self._leased or self._waiters or self._at_hand or self._handing_over)

    # -- workers: told, signalled, dead --------------------------------------------------------------

    def cancel(self, lane: Lane, job: int) -> bool:
        """Tell the worker of a lane, which the caller holds, that its job's caller has left; whether it can be told."""
        worker = lane.worker
        with self._lock:
            if not worker.line.cancel(lane.number, job):
                return False
            if worker.concurrency == 1:
                self._signal_with(worker, CANCEL_SIGNAL)
        return True

    def kill(self, worker: Worker) -> None:
        """SIGKILL the worker, if it lives. Whoever holds its lanes still does."""
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
        self._rooms.place(worker)
        self._signal_with(worker, signal.SIGKILL)

    @staticmethod
    def _signal_with(worker: Worker, number: int) -> None:
        if worker.pidfd is not None:
            try:
                signal.pidfd_send_signal(worker.pidfd, number)
            except ProcessLookupError:
                pass  # it has ended, and its death is on the way to us

    def mark_exited(self, worker: Worker, status: int | None) -> None:
        """A worker is dead: it is offered no more, and the holders of its lanes are woken to find out."""
        with self._lock:
            worker.status = status
            worker.casualties = worker.running
            worker.dead = True
            if worker.pidfd is not None:
                os.close(worker.pidfd)
                worker.pidfd = None
            self._rooms.place(worker)
            self._leaving.discard(worker)
            for lane in worker.lanes:
                if lane.leased:
                    lane.channel.wake()
            worker.close()
        worker.exited.set()

    def leased(self) -> list[Lane]:
        """The lanes that are held now."""
        with self._lock:
            return list(self._leased)

    def dump_stacks(self, worker: Worker) -> None:
        """Have the worker print the Python stacks of all its threads."""
        with self._lock:
            self._signal_with(worker, STACKS_SIGNAL)

    def jobs(self) -> list[JobProtocol]:
        """The jobs that hold a lane now."""
        with self._lock:
            references = [lane.job for lane in self._leased]
        return [job for reference in references if reference is not None and (job := reference()) is not None]

    def lanes_of(self, worker: Worker) -> list[Lane]:
        """The lanes of this worker that somebody holds now."""
        with self._lock:
            return [lane for lane in worker.lanes if lane.leased]
