"""What happens in a pool, as typed events that logs, metrics and reports subscribe to; and counts of it.

Events are made and given out only where somebody has subscribed. A subscriber is called in the thread where the
event happens, which may be a caller's or the supervisor's: it should be quick, and what it raises is logged.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from .errors import FaultKind

logger = logging.getLogger("blastdoor")

Outcome = FaultKind | Literal["ok", "left", "not taken"]
"""How a job ended: well, with a fault, left by its caller, or with a worker that was gone before it took it."""


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


class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker at this moment: `rss` in bytes, `cpu_seconds` used so far, `age` in seconds since it was ordered.

    `node` is the address of its node in a cluster, `request` the method and the target of the job that it is at.
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


class PoolStats(msgspec.Struct, frozen=True):
    """A pool at this moment: workers by state, callers that wait, and how the jobs so far have ended."""

    starting: int
    idle: int
    busy: int
    waiting: int
    deaths: int
    outcomes: Mapping[Outcome, int]


class Events:
    """The subscribers of one pool, and its counts. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._outcomes: Counter[Outcome] = Counter()
        self.deaths = 0
        self.subscribers: tuple[Subscriber, ...] = ()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Have `subscriber` called with each event; gives what ends that."""
        with self._lock:
            self.subscribers = (*self.subscribers, subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self.subscribers = tuple(kept for kept in self.subscribers if kept is not subscriber)

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Give an event to all subscribers."""
        for subscriber in self.subscribers:
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber failed at %s", type(event).__name__)

    def count(self, outcome: Outcome) -> None:
        """A job has ended."""
        with self._lock:
            self._outcomes[outcome] += 1

    def outcomes(self) -> dict[Outcome, int]:
        """How many jobs have ended in which way."""
        with self._lock:
            return dict(self._outcomes)

    def after_fork_in_child(self) -> None:
        """In a forked child: nobody holds the lock any more."""
        self._lock = threading.RLock()
