"""runner.model.limits and runner.supervision.sampler: what a worker and its jobs may use, and what happens past it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from runner import (
    ConfigurationError,
    JobTimedOut,
    Limits,
    MemoryExceeded,
    Pool,
    Request,
)
from runner.model.limits import parse_size
from transport.requests import Transport

URL = "http://app.local"
MIB = 1 << 20

Connect = Callable[..., requests.Session]


@pytest.fixture
def connect(start: Callable[..., Pool]) -> Iterator[Connect]:
    """Sessions to pools of one worker with these limits."""
    sessions = []

    def to(grace: float = 0.25, **limits: Any) -> requests.Session:
        session = requests.Session()
        session.mount(URL, Transport(start(workers=1, grace=grace, limits=Limits(**limits))))
        sessions.append(session)
        return session

    yield to
    for session in sessions:
        session.close()


def get(pool: Pool, target: str) -> bytes:
    with pool.open(Request("GET", target)) as job:
        return b"".join(job)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5", 5),
        ("512MiB", 512 * MIB),
        ("512 mib", 512 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("2GB", 2_000_000_000),
        ("64k", 65536),
        ("64kB", 64000),
        ("10B", 10),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    """W6: plain bytes, or texts with a unit."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "lots"},
        {"memory": "5 XB"},
        {"memory": 0},
        {"memory": -5},
        {"memory": True},
        {"file_size": ""},
        {"wall_seconds": 0},
        {"wall_seconds": float("nan")},
        {"cpu_seconds": "5"},
        {"open_files": -1},
        {"processes": True},
        {"nice": -1},
        {"nice": 20},
        {"cpus": (100_000,)},
    ],
)
def test_limits_that_are_none(settings: dict[str, Any]) -> None:
    """W6: refused when they are set."""
    with pytest.raises(ConfigurationError):
        Limits(**settings)


def test_what_the_kernel_enforces(start: Callable[..., Pool]) -> None:
    """W6: memory, files, processes, file size, priority, cores; core dumps are off, always."""
    cpu = min(os.sched_getaffinity(0))
    limits = Limits(memory="1GiB", open_files=100, processes=5000, file_size="1MiB", nice=3, cpus=(cpu,))
    found = json.loads(get(start(limits=limits), "/limits"))
    assert found == {
        "CORE": 0,
        "DATA": 1 << 30,
        "AS": 4 << 30,
        "NOFILE": 100,
        "NPROC": 5000,
        "FSIZE": MIB,
        "nice": os.nice(0) + 3,
        "cpus": [cpu],
    }
    assert json.loads(get(start(), "/limits"))["CORE"] == 0


def test_numeric_libraries_share_the_cores(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """W6: their thread variables are set for workers that share the cores, where the user has not set them."""
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    pool = start(workers=2, limits=Limits(memory="1GiB"))
    environment = json.loads(get(pool, "/state"))["environment"]
    expected = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    assert environment["OMP_NUM_THREADS"] == environment["OPENBLAS_NUM_THREADS"] == expected
    assert environment["MKL_NUM_THREADS"] == "7"
    assert environment["MALLOC_ARENA_MAX"] == "2"


def test_memory_that_the_kernel_refuses(connect: Connect) -> None:
    """F4: a MemoryError is a 500 that says so, or a body-read error; the worker goes on."""
    session = connect(memory="200MiB")
    assert session.get(f"{URL}/heap?size={10 * MIB}").text == str(10 * MIB)
    pid = session.get(URL + "/pid").text
    response = session.get(f"{URL}/heap?size={400 * MIB}")
    assert response.status_code == 500
    assert response.json()["fault"] == "memory"
    with pytest.raises(ChunkedEncodingError, match="memory"):
        session.get(f"{URL}/heap?late=1&size={400 * MIB}")
    assert session.get(URL + "/pid").text == pid


def test_memory_that_the_kernel_does_not_see(connect: Connect, log: pytest.LogCaptureFixture) -> None:
    """F4: what the worker really takes is watched: it is killed, and the fault says why."""
    session = connect(memory="150MiB")
    response = session.get(f"{URL}/shared?size={300 * MIB}", timeout=30)
    assert response.status_code == 500
    assert response.json()["fault"] == "memory"
    assert "over its limit of 150 MiB" in response.json()["detail"]
    assert response.json()["job_id"] in log.text
    with pytest.raises(ChunkedEncodingError, match="over its limit of 150 MiB"):
        session.get(f"{URL}/shared?late=1&size={300 * MIB}", timeout=30)
    assert session.get(URL + "/hello").text == "hello"


@pytest.mark.parametrize("target", ["/burn", "/spin", "/never_read"])
def test_wall_time(connect: Connect, log: pytest.LogCaptureFixture, target: str) -> None:
    """F5, W12: a job over its time is a 504; where it was stuck stands in the log."""
    session = connect(wall_seconds=0.2)
    response = session.get(URL + target, timeout=30)
    assert response.status_code == 504
    problem = response.json()
    assert (problem["fault"], problem["detail"]) == ("timeout", "the job took longer than 0.2 s")
    assert session.get(URL + "/hello", timeout=30).text == "hello"
    (record,) = (r for r in log.records if r.name == "blastdoor" and "what it printed last" in r.message)
    assert problem["job_id"] in record.message
    assert f"in do{target.replace('/', '_')}" in record.message


def test_wall_time_in_the_body(connect: Connect) -> None:
    """F5: after the head a body-read error, never a clean end."""
    session = connect(wall_seconds=0.2)
    with pytest.raises(ChunkedEncodingError, match=r"longer than 0\.2 s"):
        session.get(URL + "/burn?late=1", timeout=30)


def test_wall_time_of_a_job_that_nobody_waits_for(start: Callable[..., Pool]) -> None:
    """F5: a caller that does not read does not keep its job alive."""
    pool = start(workers=1, limits=Limits(wall_seconds=0.2))
    job = pool.open(Request("GET", "/burn?late=1"))
    assert get(pool, "/hello") == b"hello"  # on the one worker, free again or another
    with pytest.raises(JobTimedOut):
        b"".join(job)


def test_a_stopped_worker_is_found(start: Callable[..., Pool]) -> None:
    """W7, I10: SIGSTOP: the job's time runs out, the worker is killed, and the next one serves."""
    pool = start(workers=1, grace=0.1, limits=Limits(wall_seconds=0.2))
    with pytest.raises(JobTimedOut):
        get(pool, "/die?how=SIGSTOP")
    assert get(pool, "/hello") == b"hello"


def test_processor_time(connect: Connect) -> None:
    """F5, W6: a job that burns more processor time than it may; one that sleeps may take its time."""
    session = connect(cpu_seconds=0.3)
    assert session.get(URL + "/stream?count=2&pause=0.3").status_code == 200
    response = session.get(URL + "/burn", timeout=30)
    assert response.status_code == 504
    assert "more than 0.3 s of processor time" in response.json()["detail"]
    assert session.get(URL + "/hello").text == "hello"


def test_the_time_of_one_job_is_not_the_next_one_s(start: Callable[..., Pool]) -> None:
    """F5: many jobs, each well within its time, on a worker that lives much longer."""
    pool = start(workers=1, limits=Limits(wall_seconds=0.5, cpu_seconds=0.5, memory="500MiB"))
    pid = get(pool, "/pid")
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        assert get(pool, "/pid") == pid


def test_a_worker_that_was_idle_for_long_is_over_no_time(start: Callable[..., Pool]) -> None:
    """F5, W6: between its lease and its next job there is nothing to hold against it, nor its last job's time."""
    pool = start(workers=1, limits=Limits(wall_seconds=0.1))
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"
    time.sleep(0.15)
    assert pool._supervisor is not None
    worker = pool._supervisor.leases.lease(None)
    assert list(pool._supervisor.watchdog._jobs_of([worker])) == []
    pool._supervisor.leases.give_back(worker)
    with pool.open(Request("GET", "/endless")) as job:
        assert list(pool._supervisor.watchdog._jobs_of([worker])) == [(worker, job)]


def test_one_inspection_at_a_time(start: Callable[..., Pool]) -> None:
    """W6: however many callers come and go between two looks, there is one next look and no more."""
    pool = start(workers=2, limits=Limits(memory="1GiB"))

    def call() -> None:
        for _ in range(300):
            with pool.open(Request("GET", "/hello")) as job:
                assert b"".join(job) == b"hello"

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    supervisor = pool._supervisor
    assert supervisor is not None
    with pool.open(Request("GET", "/endless")):
        looked = threading.Event()
        for _ in range(5):
            supervisor._reactor.call(supervisor.watchdog._begin_sampling)
        supervisor._reactor.call(looked.set)
        assert looked.wait(20)
        due = [
            callback for _, _, callback in list(supervisor._reactor._timers) if callback == supervisor.watchdog._sample
        ]
        assert len(due) == 1


def test_memory_errors_without_a_limit(pool: Pool) -> None:
    """F4: a MemoryError is a memory fault, whoever has set the limit."""
    with pytest.raises(MemoryExceeded):
        get(pool, f"/heap?size={1 << 60}")


def test_nobody_looks_where_nothing_is_limited(pool: Pool) -> None:
    """F5: without limits there are no looks at jobs; with them, none while no job runs."""
    assert pool._supervisor is not None
    get(pool, "/hello")
    assert not pool._supervisor.watchdog._sampling
