"""The host is never touched: what workers share with it, and what a worker does to its own ends of that."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from runner import (
    CancelScope,
    JobClosed,
    LeaseTimeout,
    Limits,
    Pool,
    Request,
    Sandbox,
    WorkerDied,
)
from tests.processes import is_gone, kill, wait_gone
from tests.waiting import wait_until

_KCMP = 312
_KCMP_FILE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def same_file(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether descriptors of two processes, as (pid, fd), are one open file description (kcmp(2))."""
    result = int(_libc.syscall(_KCMP, one[0], other[0], _KCMP_FILE, one[1], other[1]))
    if result < 0 and ctypes.get_errno() != 9:  # EBADF: it was closed meanwhile
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result == 0


def descriptors(pid: int) -> list[tuple[int, int]]:
    return [(pid, int(name)) for name in os.listdir(f"/proc/{pid}/fd")]


@pytest.mark.skipif(os.geteuid() != 0, reason="kcmp(2) on undumpable processes needs root")
@pytest.mark.parametrize("sandbox", [None, Sandbox.default(), Sandbox.strict()], ids=["none", "default", "strict"])
@pytest.mark.parametrize(
    "handler", ["tests.handlers:app", "tests.async_handlers:app", "tests.preloaded:app"], ids=["sync", "async", "opens"]
)
def test_nothing_is_shared(start: Callable[..., Pool], handler: str, sandbox: Sandbox | None) -> None:
    """S, W1, W2: no open file description is a worker's and the host's, the zygote's, or a sibling's."""
    preload = ["tests.preloaded"] if handler == "tests.preloaded:app" and sandbox is not None else False
    pool = start(handler, workers=3, sandbox=sandbox, preload=preload)
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    workers = [worker.pid for worker in pool._supervisor._workers.values()]
    processes = [os.getpid(), pool._supervisor._zygote.pid, *(pid for pid in workers if pid)]
    assert len(processes) == 5
    held = {pid: descriptors(pid) for pid in processes}
    assert all(len(held[pid]) >= 6 for pid in processes)
    for one, other in itertools.combinations(processes, 2):
        if other in workers:
            shared = [pair for pair in itertools.product(held[one], held[other]) if same_file(*pair)]
            assert shared == [], [(pair, os.readlink(f"/proc/{pair[1][0]}/fd/{pair[1][1]}")) for pair in shared]


@pytest.mark.parametrize("how", ["shut", "closed", "blocking"])
def test_a_worker_that_takes_no_cancel(start: Callable[..., Pool], log: pytest.LogCaptureFixture, how: str) -> None:
    """C3, W1, T12: whatever it did to its end of the line, it is killed, and nobody else is held up."""
    pool = start(workers=2, grace=30 if how != "blocking" else 0.25)
    with pool.open(Request("GET", f"/deaf?how={how}"), read_timeout=20) as job:
        assert job.read() == b"deaf"
        pid = job.worker_pid
    assert pid
    began = time.monotonic()
    for _ in range(20):
        with pool.open(Request("GET", "/hello"), lease_timeout=5, read_timeout=5) as job:
            assert b"".join(job) == b"hello"
    wait_gone([pid], 10)
    assert time.monotonic() - began < 15
    wait_until(lambda: pool.stats().idle == 2)
    if how != "blocking":
        assert "does not take its cancel" in log.text


def test_what_fails_while_a_left_job_is_taken_over(
    start: Callable[..., Pool], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3, W7: an error in the supervisor costs the worker that it was about, and nothing else."""
    pool = start(workers=1, limits=Limits(wall_seconds=60))
    supervisor = pool._supervisor
    assert supervisor is not None

    def fail(*arguments: object) -> bool:
        monkeypatch.undo()
        raise BlockingIOError("as a full eventfd was")

    with pool.open(Request("GET", "/stream?count=2&pause=600")) as job:
        job.read()
        pid = job.worker_pid
        monkeypatch.setattr(supervisor.leases, "cancel", fail)
    with pool.open(Request("GET", "/pid"), lease_timeout=10) as job:
        assert int(b"".join(job)) != pid
    assert pid
    assert is_gone(pid)
    assert "the supervisor met an error" in log.text


def test_a_left_job_is_held_to_its_limits(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """C3, W6: a grace time is no way around the pool's limits."""
    pool = start(workers=1, grace=600, limits=Limits(cpu_seconds=0.3))
    with CancelScope() as scope, pytest.raises(JobClosed):
        threading.Timer(0.05, scope.cancel).start()
        pool.open(Request("GET", "/spin"))
    with pool.open(Request("GET", "/hello"), lease_timeout=20) as job:
        assert b"".join(job) == b"hello"
    assert "more than 0.3 s of processor time" in log.text


def test_a_stopped_zygote(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W7, F3: deaths are seen without it; one that says nothing is replaced, and the pool serves on."""
    pool = start(workers=1)
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    zygote = pool._supervisor._zygote.pid
    os.kill(zygote, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(WorkerDied):
        pool.open(Request("GET", "/die"), read_timeout=20)
    assert time.monotonic() - began < 5  # not by giving the zygote up
    with pool.open(Request("GET", "/hello"), lease_timeout=20) as job:
        assert b"".join(job) == b"hello"
    assert is_gone(zygote)
    assert "has said nothing for" in log.text


def test_a_zygote_that_is_stopped_while_nobody_needs_it(start: Callable[..., Pool]) -> None:
    """W7: it owes nothing, and nobody is hurt; an idle worker that dies then is replaced all the same."""
    pool = start(workers=1)
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    os.kill(pool._supervisor._zygote.pid, signal.SIGSTOP)
    (worker,) = pool._supervisor._workers.values()
    for _ in range(20):
        with pool.open(Request("GET", "/hello"), lease_timeout=5) as job:
            assert b"".join(job) == b"hello"
    kill(worker.pid)
    with pytest.raises(LeaseTimeout):
        pool.open(Request("GET", "/hello"), lease_timeout=1.5)
    with pool.open(Request("GET", "/hello"), lease_timeout=20) as job:
        assert b"".join(job) == b"hello"
