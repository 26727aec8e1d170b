"""How many workers there are, who gets one, who may wait, and when one is replaced."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from requests.exceptions import ConnectTimeout

from runner import (
    CancelScope,
    ConfigurationError,
    JobContext,
    LeaseTimeout,
    Pool,
    QueueFull,
    Recycle,
    Request,
    WorkerDied,
)
from tests.processes import is_gone, kill
from tests.waiting import wait_until
from transport import TransportFactory, delegated_api_key_id
from transport.requests import Transport

URL = "http://app.local"


def get(pool: Pool, target: str, **limits: Any) -> bytes:
    with pool.open(Request("GET", target), **limits) as job:
        return b"".join(job)


def live(pool: Pool) -> list[int | None]:
    assert pool._supervisor is not None
    return [worker.pid for worker in list(pool._supervisor._workers.values())]


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": (0, 2)},
        {"workers": (3, 2)},
        {"workers": (1, 2, 3)},
        {"workers": (1, "2")},
        {"spares": -1},
        {"spares": None},
        {"queue": -1},
        {"queue": 1.5},
        {"queue_timeout": -1},
        {"per_provider": {"a": 0}},
        {"overload": "ignore"},
        {"shrink_after": -1},
    ],
)
def test_settings_that_are_none(settings: dict[str, Any]) -> None:
    """W3, W4: refused when they are set."""
    with pytest.raises(ConfigurationError):
        Pool("a:b", **settings)


@pytest.mark.parametrize(
    "settings", [{"after_jobs": 0}, {"above_rss": "x"}, {"after_seconds": -1}, {"after_jobs": True}, {"jitter": 2}]
)
def test_recycling_that_is_none(settings: dict[str, Any]) -> None:
    """W5: the same for recycling."""
    with pytest.raises(ConfigurationError):
        Recycle(**settings)


def test_a_bounded_queue(start: Callable[..., Pool]) -> None:
    """W4, F7: beyond the bound callers are told at once, with the client's own timeout."""
    pool = start(workers=1, queue=1)
    with pool.open(Request("GET", "/endless")):
        waiting = threading.Thread(target=get, args=(pool, "/hello"))
        waiting.start()
        wait_until(lambda: len(pool._leases._waiters) == 1)
        with pytest.raises(QueueFull, match="1 callers wait already"):
            get(pool, "/hello")
        with requests.Session() as session:
            session.mount(URL, Transport(pool))
            with pytest.raises(ConnectTimeout):
                session.get(URL + "/hello")
    waiting.join()
    assert get(pool, "/hello") == b"hello"


def test_a_pool_that_answers_when_it_is_full(start: Callable[..., Pool]) -> None:
    """F7: set to answer, it gives a 503 with Retry-After, for a full queue and for a wait that is over."""
    pool = start(workers=1, queue=1, queue_timeout=0.05, overload="answer")
    with requests.Session() as session, pool.open(Request("GET", "/endless")):
        session.mount(URL, Transport(pool))
        response = session.get(URL + "/hello")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["fault"] == "overload"
    assert get(pool, "/hello") == b"hello"


def test_a_wait_limit(start: Callable[..., Pool]) -> None:
    """W4: the pool's own limit holds where the caller sets none, or a longer one."""
    pool = start(workers=1, queue_timeout=0.05)
    with pool.open(Request("GET", "/endless")):
        for limits in ({}, {"lease_timeout": 60}):
            with pytest.raises(LeaseTimeout, match=r"0\.05 s"):
                get(pool, "/hello", **limits)


def test_a_provider_at_its_limit(start: Callable[..., Pool], tmp_path: Path) -> None:
    """W4: one provider's stuck jobs can't take all workers; the others are served past those that wait."""
    pool = start(workers=3, per_provider={"stuck": 1})
    stuck = JobContext(provider="stuck")
    order: list[str] = []
    first = pool.open(Request("GET", f"/head_then_wait?go={tmp_path / 'go'}"), context=stuck)

    def second() -> None:
        get(pool, "/hello", context=stuck)
        order.append("stuck")

    thread = threading.Thread(target=second)
    thread.start()
    wait_until(lambda: len(pool._leases._waiters) == 1)
    with requests.Session() as session:
        session.mount(URL, TransportFactory(pool).transport_for("other"))
        with delegated_api_key_id("k"):
            for _ in range(20):
                assert session.get(URL + "/hello", timeout=10).text == "hello"
    order.append("others")
    (tmp_path / "go").touch()
    assert b"".join(first) == b"done"
    thread.join()
    assert order == ["others", "stuck"]
    assert not any(pool._leases._running.values())


def test_a_provider_s_place_comes_free_with_a_death(start: Callable[..., Pool]) -> None:
    """W4: also where its job has killed its worker."""
    pool = start(workers=2, per_provider={"stuck": 1})
    for _ in range(5):
        with pytest.raises(WorkerDied):
            get(pool, "/die?how=exit", context=JobContext(provider="stuck"), lease_timeout=10)
    assert get(pool, "/hello", context=JobContext(provider="stuck"), lease_timeout=10) == b"hello"


def test_recycling_after_jobs(start: Callable[..., Pool]) -> None:
    """W5: after so many jobs a worker is replaced; no request is lost, and none waits for an import."""
    pool = start(workers=2, recycle=Recycle(after_jobs=5, jitter=0.4))
    served: list[bytes] = []

    def call() -> None:
        served.extend(get(pool, "/pid") for _ in range(40))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {pid: served.count(pid) for pid in set(served)}
    assert len(served) == 160
    assert max(counts.values()) <= 7
    assert len(counts) >= 160 // 7
    wait_until(lambda: len(live(pool)) == 2)


def test_recycling_by_size_and_by_age(start: Callable[..., Pool]) -> None:
    """W5: above a resident size, and after a time."""
    for recycle, target in (
        (Recycle(above_rss=200 << 20), f"/keep?size={400 << 20}"),
        (Recycle(after_seconds=0.05), "/stream?count=1&pause=0.1"),
    ):
        pool = start(workers=1, recycle=recycle)
        pid = get(pool, "/pid")
        if recycle.above_rss:
            assert get(pool, "/pid") == pid
        get(pool, target)
        assert get(pool, "/pid") != pid
        wait_until(lambda pid=pid: is_gone(int(pid)))  # type: ignore[misc]


def test_an_elastic_pool(start: Callable[..., Pool], tmp_path: Path) -> None:
    """W3: it grows with the demand up to its most, and shrinks to its least when that is over."""
    pool = start(workers=(1, 4), shrink_after=0.2, preload=True)
    assert len(live(pool)) == 1
    request = Request("GET", f"/head_then_wait?go={tmp_path / 'go'}")
    jobs = [pool.open(request, lease_timeout=20) for _ in range(4)]
    assert len(live(pool)) == 4
    with pytest.raises(LeaseTimeout):
        get(pool, "/hello", lease_timeout=0.1)
    (tmp_path / "go").touch()
    assert [b"".join(job) for job in jobs] == [b"done"] * 4
    wait_until(lambda: len(live(pool)) == 1)
    assert get(pool, "/hello") == b"hello"


def test_spare_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W3: a spare is warm already: a crash costs the next caller nothing, here where no other worker can start."""
    monkeypatch.setenv("BLASTDOOR_TEST_DIR", str(tmp_path))
    with Pool("tests.bad_handlers.sometimes:app", workers=1, spares=1) as pool:
        assert len(live(pool)) == 2
        (tmp_path / "broken").touch()
        with pytest.raises(WorkerDied):
            get(pool, "/die")
        assert get(pool, "/", lease_timeout=0.5) == b"sometimes"


def test_spares_run_no_more_jobs(start: Callable[..., Pool]) -> None:
    """W3: they do not count among the workers that run jobs."""
    pool = start(workers=1, spares=2)
    with pool.open(Request("GET", "/endless")), pytest.raises(LeaseTimeout):
        get(pool, "/hello", lease_timeout=0.05)
    assert get(pool, "/hello") == b"hello"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_cycles_and_crashes_leave_nothing() -> None:
    """I11: 1,000 pools and 10,000 crashes: descriptors, threads and memory stay where they were."""
    process = psutil.Process()

    def cycle(crashes: int) -> None:
        handler, workers = ("tests.handlers:app", 2) if crashes else ("scripts.measure.tiny:handler", 1)
        with Pool(handler, workers=workers, preload=True) as pool:
            for _ in range(crashes):
                with pytest.raises(WorkerDied):
                    get(pool, "/die?how=SIGKILL")

    logging.disable()  # ten thousand deaths are no news
    try:
        cycle(100)
        gc.collect()
        before = process.num_fds(), threading.active_count(), process.memory_info().rss
        for number in range(1000):
            cycle(100 if number % 10 == 0 else 0)
        gc.collect()
    finally:
        logging.disable(logging.NOTSET)
    assert (process.num_fds(), threading.active_count()) == before[:2]
    assert process.memory_info().rss - before[2] < 16 << 20


@pytest.mark.slow
def test_chaos(start: Callable[..., Pool]) -> None:
    """I1, I4, I5, I10: kills and stops of any worker, and of the zygote, while 16 threads send checkable requests,
    leave, cancel and time out.

    Every request is answered rightly or fails with a named fault; none hangs, none gets another's bytes.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    pool = start(workers=4, preload=True, grace=0.05)
    rss = psutil.Process().memory_info().rss
    stop = threading.Event()
    counts: dict[str, int] = {}
    wrong: list[str] = []
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] = counts.get(what, 0) + 1

    def call(thread: int) -> None:
        chance = random.Random(seed + thread)
        number = 0
        while not stop.is_set():
            number += 1
            data = f"{thread}-{number}-".encode() * chance.randrange(1, 4000)
            leave = chance.random() < 0.2
            scope = CancelScope(timeout=chance.choice([None, None, None, 0.002, 0.02]))
            try:
                with scope, pool.open(Request("POST", "/mirror", body=data), read_timeout=1) as job:
                    if leave:
                        job.read()
                        count("left")
                        continue
                    answer = b"".join(job)
                if answer != data:
                    wrong.append(f"{thread}-{number}: {len(answer)} bytes for {len(data)}")
                count("right")
            except Exception as error:  # each is counted by its name
                count(type(error).__name__)

    def killer() -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            time.sleep(chance.random() * 0.05)
            pids = [pid for pid in live(pool) if pid]
            try:
                if chance.random() < 0.01:
                    assert pool._supervisor is not None
                    zygote = pool._supervisor._zygote
                    kill(None if zygote is None else zygote.pid)
                kill(chance.choice(pids), chance.choice([9, 9, 9, 11, 19]))  # SIGKILL, SIGSEGV, SIGSTOP
            except AssertionError:
                continue  # the zygote is not there at this moment
            except (ProcessLookupError, IndexError):
                continue

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(16)]
    threads.append(threading.Thread(target=killer))
    for thread in threads:
        thread.start()
    time.sleep(float(os.environ.get("BLASTDOOR_CHAOS_SECONDS", "10")))  # how long it goes on
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    print(counts)
    assert wrong == []
    assert set(counts) <= {"right", "left", "WorkerDied", "ReadTimeout", "JobClosed", "WorkersUnavailable"}
    assert counts["right"] > 500
    for pid in live(pool):  # those that the killer has stopped last
        with contextlib.suppress(ProcessLookupError, AssertionError):
            kill(pid, signal.SIGCONT)

    def at_rest() -> bool:  # all four ready; one that went on may still have died of a signal that was pending
        stats = pool.stats()
        return (stats.idle, stats.busy, stats.waiting, stats.starting) == (4, 0, 0, 0)

    wait_until(at_rest)
    gc.collect()
    assert psutil.Process().memory_info().rss - rss < 64 << 20
    wait_until(at_rest)
    for number in range(20):
        assert get(pool, f"/echo?{number}", lease_timeout=30, read_timeout=5)


@pytest.mark.parametrize("preload", [False, ["json"]])
def test_a_pool_that_fills_the_zygote_s_socket(start: Callable[..., Pool], preload: bool | list[str]) -> None:
    """W3: the orders of many workers wait for room; the start waits for all of them."""
    pool = start(workers=300, preload=preload)
    assert pool.stats().idle == 300
    assert pool.stats().deaths == 0
