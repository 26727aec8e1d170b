"""Times in seconds: each has its bounds where it is given, and the longest ones neither spin nor overflow."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from runner import (
    CancelScope,
    ConfigurationError,
    Limits,
    Pool,
    Recycle,
    Request,
    Sandbox,
)
from tests.waiting import wait_until

NO_TIMES: list[Any] = [math.nan, -1, -0.001, "5", True, 1e10, [1]]
SETTINGS = ["grace", "drain", "start_timeout", "stop_timeout", "shrink_after", "queue_timeout"]


@pytest.mark.parametrize("value", NO_TIMES, ids=repr)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_pool(name: str, value: Any) -> None:
    """W1: refused when the pool is made, by name."""
    with pytest.raises(ConfigurationError, match=f"{name} is a time in seconds"):
        Pool("tests.handlers:app", **{name: value})


@pytest.mark.parametrize("value", NO_TIMES, ids=repr)
def test_other_settings(value: Any) -> None:
    """W5, W6, C1, S: refused when they are made."""
    makers: list[Callable[[], object]] = [
        lambda: Limits(wall_seconds=value),
        lambda: Limits(cpu_seconds=value),
        lambda: Recycle(after_seconds=value),
        lambda: CancelScope(value),
        lambda: Sandbox.default(background_seconds=value),
    ]
    for make in makers:
        with pytest.raises(ConfigurationError, match="is a time in seconds"):
            make()


@pytest.mark.parametrize(
    "settings", [{"after_jobs": math.inf}, {"after_jobs": 1.5}, {"after_jobs": "3"}, {"jitter": "x"}]
)
def test_numbers_of_recycling(settings: Any) -> None:
    """W5: refused when it is made."""
    with pytest.raises(ConfigurationError):
        Recycle(**settings)


def test_whole_numbers() -> None:
    """W6: what setrlimit(2) would refuse in each worker is refused at once."""
    with pytest.raises(ConfigurationError, match="open_files is a whole number"):
        Limits(open_files=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NO_TIMES, ids=repr)
def test_time_outs_of_a_call(pool: Pool, value: Any) -> None:
    """X, W4: for threads and tasks alike, before a worker is leased."""
    for name in ("lease_timeout", "read_timeout", "write_timeout"):
        with pytest.raises(ConfigurationError, match=name):
            pool.open(Request("GET", "/hello"), **{name: value})

        async def call(name: str = name) -> None:
            await pool.aopen(Request("GET", "/hello"), **{name: value})

        with pytest.raises(ConfigurationError, match=name):
            asyncio.run(call())
    assert pool.stats().outcomes == {}


def test_the_longest_times(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W1, W6, C1: over what poll(2) and select(2) take: calls end well, and the supervisor sleeps."""
    long = 1e9
    pool = start(
        workers=(1, 2),
        start_timeout=long,
        shrink_after=long,
        stop_timeout=5,
        grace=long,
        limits=Limits(wall_seconds=long),
    )
    assert pool._supervisor is not None
    steps = 0
    reactor = pool._supervisor._reactor
    step = reactor._step

    def count() -> None:
        nonlocal steps
        steps += 1
        step()

    reactor._step = count  # type: ignore[method-assign]
    with CancelScope(long):
        for _ in range(20):
            request = Request("GET", "/stream?count=2&pause=0.02")
            with pool.open(request, lease_timeout=long, read_timeout=long, write_timeout=long) as job:
                assert len(b"".join(job)) > 20

        async def call() -> None:
            async with await pool.aopen(request, lease_timeout=long, read_timeout=long) as job:
                async for _ in job:
                    pass

        asyncio.run(call())
    assert steps < 500
    assert "the supervisor met an error" not in log.text


def test_shrinking_at_once(start: Callable[..., Pool]) -> None:
    """W3: a pool that lets go of idle workers at once does, and its supervisor does not spin."""
    pool = start(workers=(1, 4), shrink_after=0)
    assert pool._supervisor is not None
    numbers = pool._supervisor._reactor._timer_numbers
    jobs = [pool.open(Request("GET", "/stream?count=2&pause=0.3")) for _ in range(4)]
    before, began = next(numbers), time.monotonic()
    for job in jobs:
        b"".join(job)
    wait_until(lambda: pool.stats().idle == 1 and pool.stats().busy == 0)
    # Each look sets a timer: some fifty a second, where a loop that does not sleep sets thousands.
    assert next(numbers) - before < 100 + 200 * (time.monotonic() - began)
