"""What happens in a pool, as typed events that logs, metrics and reports subscribe to; and counts of it.

Events are made and given out only where somebody has subscribed. A subscriber is called in the thread where the
event happens, which may be a caller's or the supervisor's: it should be quick, and what it raises is logged.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Generic, Literal, TypeVar

import msgspec

from .errors import FaultKind

logger = logging.getLogger("blastdoor")

Outcome = FaultKind | Literal["ok", "left", "not taken", "retried"]
"""How a job ended: well, with a fault, left by its caller, with a worker that was gone before it took it, or
with one that died before it answered, so that it is done again."""


class WorkerStarted(msgspec.Struct, frozen=True):
    """A worker was forked."""

    pid: int


class WorkerReady(msgspec.Struct, frozen=True):
    """A worker has loaded its handler; `seconds` since it was ordered."""

    pid: int
    seconds: float


class WorkerEnded(msgspec.Struct, frozen=True):
    """A worker has ended, after so many jobs, with this exit code or by this signal, where they are known."""

    pid: int | None
    exit_code: int | None
    signal: str | None
    jobs: int


class JobStarted(msgspec.Struct, frozen=True):
    """A job was given to a worker, after its caller had waited so many seconds for one.

    It is told in the caller's own thread or task. A job that its worker never took is told once for each try.
    """

    job_id: str
    provider: str
    source: str
    worker: int | None
    waited: float


class JobAnswered(msgspec.Struct, frozen=True):
    """The head of a job's response is there, so many seconds after it started, and its body is still to come."""

    job_id: str
    provider: str
    source: str
    worker: int | None
    status: int
    seconds: float


class JobEnded(msgspec.Struct, frozen=True):
    """A job is over for its caller: the status it saw, if any, how it ended, and after how many seconds.

    `detail` says in a sentence what went wrong, where something did.
    """

    job_id: str
    provider: str
    source: str
    worker: int | None
    status: int | None
    outcome: Outcome
    seconds: float
    detail: str = ""
    method: str = ""
    target: str = ""


class JobRefused(msgspec.Struct, frozen=True):
    """A caller got no worker, after so many seconds: the queue was full or its time up, or none can be started."""

    job_id: str
    provider: str
    source: str
    waited: float
    detail: str
    method: str = ""
    target: str = ""


Event = WorkerStarted | WorkerReady | WorkerEnded | JobStarted | JobAnswered | JobEnded | JobRefused
Subscriber = Callable[[Event], object]


class LaneInfo(msgspec.Struct, frozen=True, array_like=True):
    """A job that a worker is at, by the number of its lane: its id, method and target, and for how many seconds."""

    lane: int
    job_id: str
    request: str
    seconds: float


class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker at this moment: `rss` in bytes, `cpu_seconds` used so far, `age` in seconds since it was ordered.

    `node` is the address of its node in a cluster. It runs `running` jobs of the `concurrency` that it may at once;
    `job_id` and `request`, method and target, are those of the one that has run longest, the first of `lanes`, which
    has no more than the 32 longest. `leaving` says that it gets no more jobs.
    """

    pid: int
    state: Literal["starting", "idle", "busy"]
    job_id: str
    jobs: int
    age: float
    rss: int
    cpu_seconds: float
    node: str = ""
    request: str = ""
    running: int = 0
    concurrency: int = 1
    leaving: bool = False
    lanes: tuple[LaneInfo, ...] = ()


class PoolStats(msgspec.Struct, frozen=True):
    """A pool at this moment: workers by state, callers that wait, and how the jobs so far have ended.

    `busy` workers have one job or more; `running` is how many jobs run, of the `lanes` that there are for them.
    """

    starting: int
    idle: int
    busy: int
    waiting: int
    deaths: int
    outcomes: Mapping[Outcome, int]
    running: int = 0
    lanes: int = 0


HEALTHY: Final = frozenset(("ok", "left", "not taken"))
"""Outcomes of jobs that nobody has to look at."""

_Entry = TypeVar("_Entry")

_BATCH: Final = 1024


class Batch(Generic[_Entry]):
    """What is noted in passing, and counted later, many at once. Safe to use from any thread.

    `take` is called with one after the other by `flush`, and when there are many.
    """

    __slots__ = ("_entries", "_take")

    def __init__(self, take: Callable[[_Entry], object]) -> None:
        self._take = take
        self._entries: deque[_Entry] = deque()

    def add(self, entry: _Entry) -> None:
        """Note one."""
        entries = self._entries
        entries.append(entry)
        if len(entries) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Count what was noted."""
        next_entry = self._entries.popleft
        while self._entries:
            try:
                entry = next_entry()
            except IndexError:  # another thread was quicker
                return
            self._take(entry)


JobTime = tuple[str, str, float, float]
"""A job's provider, its outcome, its seconds, and the seconds that it waited for a worker.

Without an outcome it is about the head of a response whose body was still to come.
"""


class Events:
    """The subscribers of one pool, and its counts. Safe to use from any thread.

    `minders` hear of nothing healthy, `times` note the times of all jobs.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._outcomes: dict[Outcome, int] = {}
        self.deaths = 0
        self.subscribers: tuple[Subscriber, ...] = ()
        self.minders: tuple[Subscriber, ...] = ()
        self.times: tuple[Batch[JobTime], ...] = ()

    def subscribe(self, subscriber: Subscriber, *, healthy: bool = True) -> Callable[[], None]:
        """Have `subscriber` called with each event, or with those of nothing healthy only; gives what ends that."""
        with self._lock:
            if healthy:
                self.subscribers = (*self.subscribers, subscriber)
            else:
                self.minders = (*self.minders, subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self.subscribers = tuple(kept for kept in self.subscribers if kept is not subscriber)
                self.minders = tuple(kept for kept in self.minders if kept is not subscriber)

        return unsubscribe

    def note_times(self, batch: Batch[JobTime]) -> Callable[[], None]:
        """Have the times of all jobs noted; gives what ends that."""
        with self._lock:
            self.times = (*self.times, batch)

        def end() -> None:
            with self._lock:
                self.times = tuple(kept for kept in self.times if kept is not batch)
            batch.flush()

        return end

    def emit(self, event: Event, *, healthy: bool = False) -> None:
        """Give an event to all subscribers, and to the minders unless it is of something healthy."""
        for subscriber in self.subscribers if healthy else (*self.subscribers, *self.minders):
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber failed at %s", type(event).__name__)

    def count(self, outcome: Outcome) -> None:
        """A job has ended."""
        outcomes = self._outcomes
        with self._lock:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def outcomes(self) -> dict[Outcome, int]:
        """How many jobs have ended in which way."""
        with self._lock:
            return dict(self._outcomes)

    def after_fork_in_child(self) -> None:
        """In a forked child: nobody holds the lock any more."""
        self._lock = threading.RLock()
