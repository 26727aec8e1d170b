"""What the page of status shows: the last minutes, the last hour, the last faults with their stacks, the workers now.

It subscribes to the gateway, to the pools and to the log. All of it is bounded, whatever the handlers do.
"""

from __future__ import annotations

import functools
import logging
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from runner import __version__
from runner.events import Batch, Event, JobEnded, JobRefused
from runner.jobs.round_trip import LAST_WORDS
from runner.wire.printable import one_line
from transport.serving.minutes import LastHour

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.gateway.finished import RequestTime
    from transport.gateway.router import Router

_EPOCH: Final = time.time() - time.monotonic()


def steady_time() -> float:
    """Unix time as it was known at the start, going on evenly: the wall clock may be set back (clock_gettime(2))."""
    return _EPOCH + time.monotonic()


SPAN: Final = 300
"""How many seconds the page looks back."""

_SAMPLES: Final = 1000
_FAULTS: Final = 50
_JOBS: Final = 100
_LINES: Final = 100
_LINE: Final = 2000
_REQUEST: Final = 300


class Second(msgspec.Struct):
    """What ended in one second: `latencies`, in seconds, are those of the first _SAMPLES answers."""

    at: int
    answers: int = 0
    errors: int = 0
    latencies: list[float] = []
    short: dict[str, float] | None = None


class RecentFault(msgspec.Struct):
    """A job that ended badly, or a caller that got no worker."""

    at: float
    mount: str
    job_id: str
    provider: str
    outcome: str
    detail: str
    seconds: float
    worker: int | None = None
    request: str = ""


class JobLog(logging.Handler):
    """Keeps what was logged about the last jobs, by the `job_id` that the records carry."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: OrderedDict[str, deque[str]] = OrderedDict()
        self._kept: OrderedDict[str, deque[str]] = OrderedDict()
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        job_id = getattr(record, "job_id", "")
        if not job_id or record.name == "blastdoor.access":
            return
        lines = self._kept.get(job_id)
        if lines is None:
            lines = _entry(self._jobs, job_id, deque(maxlen=_LINES), _JOBS)
        text = self.format(record)
        if record.name == "blastdoor.worker":
            text = text.partition(f"job {job_id}: ")[2]
        elif LAST_WORDS in text:
            lines.clear()  # what the worker has printed stands in it once more
        lines.extend(line[:_LINE] for line in text.splitlines()[-_LINES:])

    def keep(self, job_id: str) -> None:
        """Keep what is logged about a job that has ended badly, whatever is logged about others meanwhile."""
        self.acquire()
        try:
            _entry(self._kept, job_id, self._jobs.pop(job_id, deque(maxlen=_LINES)), _FAULTS)
        finally:
            self.release()

    def about(self, job_id: str) -> str:
        """What was logged about a job that is kept."""
        self.acquire()
        try:
            return "\n".join(self._kept.get(job_id, ()))
        finally:
            self.release()


def _entry(jobs: OrderedDict[str, deque[str]], job_id: str, lines: deque[str], most: int) -> deque[str]:
    """The lines of a job, new ones where there are none; the oldest job goes where there are too many."""
    lines = jobs.setdefault(job_id, lines)
    if len(jobs) > most:
        jobs.popitem(last=False)
    return lines


class Status:
    """Collects it, from any thread, and tells it as plain data."""

    def __init__(
        self, gateway: Router, clock: Callable[[], float] = steady_time, apps: Mapping[str, str] | None = None
    ) -> None:
        self._gateway = gateway
        self.apps = dict(apps or {})
        self._clock = clock
        self._began = clock()
        self._seconds: deque[Second] = deque()
        self._faults: deque[RecentFault] = deque(maxlen=_FAULTS)
        self._hour = LastHour()
        self._lock = threading.Lock()
        self.draining = False
        self.reload_error = ""
        self.log = JobLog()
        self._batch: Batch[RequestTime] = Batch(self._count)
        gateway.note_times(self._batch)

    def watch(self, mount: str, pool: AnyPool) -> Callable[[], None]:
        """Note the faults of a pool under this name; gives what ends that."""
        return pool.subscribe(functools.partial(self._note, mount), healthy=False)

    @property
    def ready(self) -> bool:
        """Whether each pool has a worker that can be given a job, and requests are still taken."""
        return not self.draining and all(pool.ready for pool in self._gateway.pools.values())

    def tell(self) -> dict[str, Any]:
        """All of it, as it goes into JSON. It reads /proc for each worker."""
        self._batch.flush()
        now = int(self._clock())
        with self._lock:
            seconds = [second for second in self._seconds if second.at > now - SPAN]
            faults = list(self._faults)
            hour = self._hour.tell(now, self._gateway.providers)
        latencies = [latency for second in seconds if second.at > now - 60 for latency in second.latencies]
        history = [_in_short(second, over=second.at < now) for second in seconds]
        return {
            "now": now,
            "uptime": self._clock() - self._began,
            "version": __version__,
            "ready": self.ready,
            "draining": self.draining,
            "reload_error": self.reload_error,
            "active": self._gateway.active,
            "span": SPAN,
            "fronts": [],
            "latency": _quantiles(latencies),
            "history": history,
            "hour": hour,
            "pools": {
                path: {"app": self.apps.get(path, ""), **_tell_pool(pool)} for path, pool in self._gateway.pools.items()
            },
            "faults": [
                {**msgspec.structs.asdict(fault), "log": self.log.about(fault.job_id)} for fault in reversed(faults)
            ],
        }

    def _count(self, request: RequestTime) -> None:
        mount, _, status, _, whole, took, ended = request
        now = int(_EPOCH + ended)
        with self._lock:
            if not self._seconds or self._seconds[-1].at < now:
                self._seconds.append(Second(now))
                while self._seconds[0].at <= now - SPAN:
                    self._seconds.popleft()
            second = self._seconds[-1]
            second.answers += 1
            failed = status is not None and (status >= 500 or not whole)
            second.errors += failed
            self._hour.add(mount, second.at, took, failed=failed)
            if len(second.latencies) < _SAMPLES:
                second.latencies.append(took)

    def _note(self, mount: str, event: Event) -> None:
        if not isinstance(event, (JobEnded, JobRefused)):
            return
        if isinstance(event, JobEnded):
            at = self._clock()
            fault = RecentFault(
                at,
                mount,
                event.job_id,
                event.provider,
                event.outcome,
                event.detail,
                event.seconds,
                event.worker,
                _request(event),
            )
        else:
            at = self._clock()
            fault = RecentFault(
                at, mount, event.job_id, event.provider, "refused", event.detail, event.waited, None, _request(event)
            )
        self.log.keep(event.job_id)
        with self._lock:
            self._faults.append(fault)


def _request(event: JobEnded | JobRefused) -> str:
    """What was asked, short."""
    return one_line(f"{event.method} {event.target}"[:_REQUEST])


def _in_short(second: Second, *, over: bool) -> dict[str, float]:
    if second.short is not None:
        return second.short
    counts: dict[str, float] = {"at": second.at, "answers": second.answers, "errors": second.errors}
    short = {**counts, **_quantiles(list(second.latencies))}
    if over:
        second.short = short
    return short


def _quantiles(latencies: list[float]) -> dict[str, float]:
    if len(latencies) < 2:
        value = latencies[0] if latencies else 0.0
        return {"p50": value, "p99": value}
    hundredths = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"p50": hundredths[49], "p99": hundredths[98]}


def _tell_pool(pool: AnyPool) -> dict[str, Any]:
    stats = msgspec.structs.asdict(pool.stats())
    workers = [msgspec.structs.asdict(worker) for worker in pool.workers()]
    return {**stats, "ready": pool.ready, "workers": workers}
