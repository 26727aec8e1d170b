"""Exceptions that a signal's handler raises in a caller (Ctrl-C, an alarm): at every instant, and no worker is lost."""

from __future__ import annotations

import asyncio
import dis
import gc
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest

from runner import CancelScope, JobClosed, Pool, Recycle, Request
from tests.test_cancellation import HANDLE_SIGNALS
from tests.waiting import wait_until


class Interrupted(BaseException):
    """What the signal's handler raises."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Jobs that are dropped in the midst say so, and an exception in a finalizer is only told."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.unraisablehook = hook


def raise_at(instant: int, step: Callable[[], object]) -> bool:
    """Run a step, and raise at the instant of that number; whether there were as many.

    The instants are those at which Python handles signals: it enters a function, has called one, or jumps backwards.
    """
    left = instant
    before: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode" and "/runner/" in frame.f_code.co_filename:
            last = before.get(frame)
            before[frame] = frame.f_lasti
            if last is not None and dis.opname[frame.f_code.co_code[last]].startswith(HANDLE_SIGNALS):
                left -= 1
                if left == -1:
                    sys.settrace(None)
                    raise Interrupted
        return trace

    outer = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 tells of none before a frame has asked, as tracing begins
    sys.settrace(trace)
    try:
        step()
    except Interrupted:
        pass
    finally:
        sys.settrace(outer)
        before.clear()
    gc.collect()  # the traced frames, and what they hold, are in a circle
    return left < 0


def whole(pool: Pool, body: bytes | None = None) -> None:
    with pool.open(Request("POST", "/echo_body", body=body), lease_timeout=20, read_timeout=20) as job:
        assert b"".join(job) == (body or b"")


def settled(pool: Pool, workers: int) -> None:
    gc.collect()
    wait_until(lambda: pool.stats().idle == workers and not pool._leases._leased)


def exchange(pool: Pool, how: str) -> None:
    if how == "iterator":
        pieces = (b"x" * 1000 for _ in range(3))
        with pool.open(Request("POST", "/count", body=pieces)) as job:
            b"".join(job)
    elif how == "left":
        with pool.open(Request("GET", "/stream?count=3&pause=0")) as job:
            job.read()
    elif how == "async":

        async def run() -> None:
            async with await pool.aopen(Request("POST", "/echo_body", body=b"abc")) as job:
                async for _ in job:
                    pass

        asyncio.run(run())
    else:
        whole(pool, b"abc" * 10)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["whole", "iterator", "left", "async"])
def test_at_every_instant(start: Callable[..., Pool], how: str) -> None:
    """C1, C5, W1: wherever in a call an exception comes, its worker serves the next caller, or another one does."""
    pool = start(workers=1, preload=True)
    instant = 0
    exchange(pool, how)
    while raise_at(instant, lambda: exchange(pool, how)):
        assert len(pool._leases.idle()) <= 1, instant
        whole(pool, b"the next caller's")
        instant += 1
    settled(pool, 1)
    print(instant, "instants")
    assert instant > 60


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_while_others_wait(start: Callable[..., Pool]) -> None:
    """C5, W4: whoever gives a worker up hands it to the next caller, who is served also where that is interrupted."""
    pool = start(workers=1, preload=True, recycle=Recycle(after_jobs=10**6))
    instant = 0
    came = True
    failures: list[BaseException] = []

    def wait_in_line() -> None:
        try:
            with pool.open(Request("POST", "/echo_body", body=b"another's"), lease_timeout=20, read_timeout=20) as job:
                assert b"".join(job) == b"another's"
        except BaseException as error:
            failures.append(error)

    while came:
        job = pool.open(Request("GET", "/stream?count=2&pause=0.03"))
        other = threading.Thread(target=wait_in_line)
        other.start()
        wait_until(lambda: len(pool._leases._waiters) == 1)

        def finish(job: Any = job) -> None:
            b"".join(job)
            job.close()

        came = raise_at(instant, finish)
        job.close()
        del job, finish
        other.join(30)
        assert not other.is_alive(), instant
        assert failures == [], instant
        instant += 1
    settled(pool, 1)
    print(instant, "instants")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_signals(start: Callable[..., Pool]) -> None:
    """C5, I5, W1: alarms at random instants: every call that is not interrupted is whole, and no worker is lost."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start(workers=2, preload=True)
    armed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(10_000):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 4e-4))
                whole(pool, b"%d" % number)
            except Interrupted:
                interrupted += 1
            finally:
                armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    print(interrupted, "interrupted")
    for number in range(20):
        whole(pool, b"after %d" % number)
    settled(pool, 2)
    assert interrupted > 1000


def test_a_handler_that_closes_the_job(pool: Pool) -> None:
    """C1, C2: a signal's handler may end the job that its thread is in: nothing blocks, and the read says so."""

    def cancel(scope: CancelScope, number: int, frame: FrameType | None) -> None:
        scope.cancel("by a signal")

    for _ in range(200):
        with CancelScope() as scope:
            before = signal.signal(signal.SIGALRM, partial(cancel, scope))
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
                with pytest.raises(JobClosed), pool.open(Request("GET", "/stream?count=1000&pause=0.01")) as job:
                    b"".join(job)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 20
    while pool.stats().idle < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
