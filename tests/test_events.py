"""runner.events: what a pool tells of itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from runner import JobContext, JobFailed, Pool, Request
from runner.events import (
    Event,
    JobEnded,
    JobStarted,
    WorkerEnded,
    WorkerReady,
    WorkerStarted,
)


def get(pool: Pool, target: str) -> bytes:
    with pool.open(Request("GET", target), context=JobContext(provider="p", source="s")) as job:
        return b"".join(job)


def test_events_of_workers_and_jobs() -> None:
    """W10, T5: typed events tell of births, deaths, jobs and their outcomes, with provider and source."""
    events: list[Event] = []
    pool = Pool("tests.handlers:app", workers=1)
    pool.subscribe(events.append)
    with pool:
        get(pool, "/hello")
        for target in ("/raise", "/die?how=exit"):
            with pytest.raises(JobFailed):
                get(pool, target)
        pool.open(Request("GET", "/endless")).close()
        get(pool, "/hello")
    started = [event for event in events if isinstance(event, JobStarted)]
    ended = [event for event in events if isinstance(event, JobEnded)]
    assert [event.job_id for event in started] == [event.job_id for event in ended]
    assert [(event.outcome, event.status) for event in ended] == [
        ("ok", 200),
        ("raised", None),
        ("died", None),
        ("left", 200),
        ("ok", 200),
    ]
    assert {(event.provider, event.source) for event in ended[:3]} == {("p", "s")}
    assert all(event.seconds > 0 for event in ended)
    pids = [event.pid for event in events if isinstance(event, WorkerStarted)]
    assert pids == [event.pid for event in events if isinstance(event, WorkerReady)]
    assert len(pids) == 2
    deaths = [event for event in events if isinstance(event, WorkerEnded)]
    assert [(death.pid, death.exit_code) for death in deaths] == [(pids[0], 3), (pids[1], 0)]
    assert deaths[0].jobs == 3


def test_stats_and_workers(start: Callable[..., Pool]) -> None:
    """W10: how many workers are in which state, what each is doing, and how the jobs have ended."""
    pool = Pool("tests.handlers:app", workers=2)
    assert pool.workers() == []
    with pool:
        get(pool, "/hello")
        with pytest.raises(JobFailed):
            get(pool, "/raise")
        with pool.open(Request("GET", "/endless")) as job:
            stats = pool.stats()
            assert (stats.starting, stats.idle, stats.busy, stats.waiting, stats.deaths) == (0, 1, 1, 0, 0)
            assert stats.outcomes == {"ok": 1, "raised": 1}
            infos = sorted(pool.workers(), key=lambda info: info.state)
            assert [info.state for info in infos] == ["busy", "idle"]
            assert infos[0].job_id == job.job_id
            assert sum(info.jobs for info in infos) == 3
            assert all(info.rss > 1 << 20 and info.age > 0 and info.cpu_seconds >= 0 for info in infos)
        with pytest.raises(JobFailed):
            get(pool, "/die")
        deadline = time.monotonic() + 10
        while pool.stats().deaths != 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_subscribers_that_fail_or_go(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W10: what a subscriber raises is logged and hurts nobody; one that has gone is called no more."""
    pool = start()
    seen: list[Event] = []

    def fail(event: Event) -> None:
        raise RuntimeError("a subscriber's own")

    pool.subscribe(fail)
    unsubscribe = pool.subscribe(seen.append)
    assert get(pool, "/hello") == b"hello"
    assert len(seen) == 2
    unsubscribe()
    assert get(pool, "/hello") == b"hello"
    assert len(seen) == 2
    assert "a subscriber failed at JobEnded" in log.text
