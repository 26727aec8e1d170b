"""Several jobs at once in a worker: what one does to the others, and what nothing does to any."""

from __future__ import annotations

import ast
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runner import (
    ConfigurationError,
    Job,
    JobFailed,
    JobTimedOut,
    LeaseTimeout,
    Limits,
    MemoryExceeded,
    Pool,
    QueueFull,
    Recycle,
    Request,
    Sandbox,
    StartError,
    WorkerDied,
)
from runner.supervision.line import Line
from tests.lane import Lane as FarEnds
from tests.lane import lane as far_ends
from tests.processes import kill, wait_gone
from tests.waiting import wait_until

HANDLERS = ["tests.lane_handlers:app", "tests.lane_handlers:async_app"]

both = pytest.mark.parametrize("handler", HANDLERS, ids=["function", "coroutine"])


@pytest.fixture
def lane() -> Iterator[FarEnds]:
    """A lane whose far ends the test holds."""
    with far_ends() as made:
        yield made


def get(pool: Pool, target: str, **limits: Any) -> bytes:
    with pool.open(Request("GET", target), **limits) as job:
        return b"".join(job)


def stream(pool: Pool, name: object, count: int, pause: float = 0.0) -> None:
    """Read a stream to its end: it is this one's, whole and in order."""
    body = get(pool, f"/stream?name={name}&count={count}&pause={pause}", read_timeout=60)
    assert body == b"".join(f"{name} {number}\n".encode() for number in range(count))


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do all of it at once, each in a thread of its own; what came of each, errors too."""

    def run(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(run, jobs))


def all_stopped(pid: int) -> bool:
    """Whether each thread of a process is stopped."""
    stats = [stat.read_text(encoding="latin-1") for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def opened(pool: Pool, target: str, count: int) -> list[Job]:
    """So many jobs that have begun: the first of each body is there."""
    jobs = [pool.open(Request("GET", target)) for _ in range(count)]
    for job in jobs:
        assert job.read() == b"begun"
    return jobs


# -- side by side --------------------------------------------------------------------------------------


@both
def test_many_streams_in_one_worker(start: Callable[..., Pool], handler: str) -> None:
    """K1, K2: 64 streams at once on one worker: each has its own bytes, all of them, in their order."""
    pool = start(handler, workers=1, concurrency=64)
    gate = threading.Barrier(64)

    def one(number: int) -> None:
        gate.wait()
        stream(pool, number, 50, 0.002)

    assert at_once([lambda number=number: one(number) for number in range(64)]) == [None] * 64  # type: ignore[misc]
    (worker,) = pool.workers()
    assert worker.jobs == 64
    assert pool.stats().deaths == 0


@both
def test_a_slow_reader_and_a_stalled_upload(start: Callable[..., Pool], handler: str) -> None:
    """K1, T12: a caller that reads nothing, and one that sends nothing, hold up none of the others."""
    pool = start(handler, workers=1, concurrency=64)
    go = threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield b"first"
        assert go.wait(60)
        yield b"last"

    def upload() -> bytes:
        with pool.open(Request("POST", "/echo", body=slow_body())) as job:
            return b"".join(job)

    uploading = threading.Thread(target=upload, daemon=True)
    uploading.start()
    wait_until(lambda: pool.stats().running == 1)
    with pool.open(Request("GET", "/big?pieces=64")) as unread:  # its pipe is full long before its end
        wait_until(lambda: pool.stats().running == 2)
        for _ in range(3):
            results = at_once([lambda number=number: stream(pool, number, 20) for number in range(62)])  # type: ignore[misc]
            assert results == [None] * 62
        go.set()
        assert len(b"".join(unread)) == 64 * 65536
    uploading.join(30)
    assert not uploading.is_alive()


@both
def test_bodies_both_ways(start: Callable[..., Pool], handler: str) -> None:
    """K1, H5: uploads of all sizes at once, each echoed to its own caller."""
    pool = start(handler, workers=2, concurrency=8)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    bodies = [chance.randbytes(chance.choice([1, 100, 5000, 70_000, 700_000])) for _ in range(48)]

    def one(body: bytes) -> bytes:
        pieces = iter([body[place : place + 9999] for place in range(0, len(body), 9999)])
        with pool.open(Request("POST", "/echo", body=pieces), read_timeout=60) as job:
            return b"".join(job)

    assert at_once([lambda body=body: one(body) for body in bodies]) == bodies  # type: ignore[misc]


@both
def test_the_worker_with_the_fewest_jobs(start: Callable[..., Pool], handler: str) -> None:
    """K5: jobs are spread: as many here as there, and lanes are opened only as they are needed."""
    pool = start(handler, workers=4, concurrency=16)
    jobs = opened(pool, "/wait", 12)
    assert set(Counter(job.worker_pid for job in jobs).values()) == {3}
    supervisor = pool._supervisor
    assert supervisor is not None
    assert {len(worker.lanes) for worker in supervisor._workers.values()} == {3}
    stats = pool.stats()
    assert (stats.idle, stats.busy, stats.running, stats.lanes) == (0, 4, 12, 64)
    assert {(worker.running, worker.concurrency) for worker in pool.workers()} == {(3, 16)}
    for job in jobs:
        job.close()
    wait_until(lambda: pool.stats().idle == 4)
    assert pool.stats().running == 0


@both
def test_admission_counts_jobs(start: Callable[..., Pool], handler: str) -> None:
    """K5, W8: no more at once than there are lanes; with queue=0 nobody waits, and all lanes are to be had."""
    pool = start(handler, workers=2, concurrency=3, queue=0)
    jobs = opened(pool, "/wait", 6)
    with pytest.raises(QueueFull):
        get(pool, "/hello")
    jobs.pop().close()
    wait_until(lambda: pool.stats().running == 5)
    assert get(pool, "/hello") == b"hello"
    for job in jobs:
        job.close()


def test_growth_counts_lanes(start: Callable[..., Pool]) -> None:
    """K5, W8: an elastic pool grows once the lanes are full, by as many workers as the callers need; and shrinks."""
    pool = start(HANDLERS[1], workers=(1, 3), concurrency=4, shrink_after=0.1)
    jobs = opened(pool, "/wait", 4)
    assert len(pool.workers()) == 1
    with ThreadPoolExecutor(8) as threads:
        jobs += threads.map(lambda _: pool.open(Request("GET", "/wait")), range(8))
    assert len(pool.workers()) == 3
    assert pool.stats().running == 12
    for job in jobs:
        job.close()
    wait_until(lambda: len(pool.workers()) == 1)


def test_a_pool_shrinks_under_spread_jobs(start: Callable[..., Pool]) -> None:
    """K5, W8: where each worker has a job, and one could have all, the others get no more, and go once theirs end."""
    pool = start(HANDLERS[1], workers=(1, 3), concurrency=4, shrink_after=0.1)
    with ThreadPoolExecutor(12) as threads:
        jobs = list(threads.map(lambda _: pool.open(Request("GET", "/wait")), range(12)))
    by_worker: dict[int | None, list[Job]] = {}
    for job in jobs:
        by_worker.setdefault(job.worker_pid, []).append(job)
    assert len(by_worker) == 3
    for few in by_worker.values():
        for job in few[1:]:
            job.close()
    wait_until(lambda: sum(worker.leaving for worker in pool.workers()) == 2)
    for few in by_worker.values():
        assert not few[0].settled
        few[0].close()
    wait_until(lambda: len(pool.workers()) == 1)
    assert pool.stats().deaths == 0


def test_a_wsgi_app_is_told(start: Callable[..., Pool]) -> None:
    """K2, H2: that other threads may be in it at the same time (PEP 3333, wsgi.multithread)."""
    assert get(start("tests.lane_handlers:wsgi", workers=1, concurrency=2), "/") == b"True"
    assert get(start("tests.lane_handlers:wsgi", workers=1), "/") == b"False"


def test_lanes_that_can_not_be_opened(
    start: Callable[..., Pool], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K1, K5: for want of descriptors, or of room in its line, callers wait for the lanes that there are."""
    pool = start(HANDLERS[1], workers=1, concurrency=8)
    failures: list[OSError] = [OSError(24, "Too many open files"), BlockingIOError(11, "it is full")]
    open_lane = Line.open_lane

    def full(line: Line, lane: int, fds: Any) -> None:
        if failures:
            raise failures.pop()
        open_lane(line, lane, fds)

    monkeypatch.setattr(Line, "open_lane", full)
    results = at_once([lambda number=number: stream(pool, number, 10, 0.01) for number in range(16)])  # type: ignore[misc]
    assert results == [None] * 16
    assert not failures
    assert "no more lanes can be opened" in log.text


def test_a_worker_without_descriptors(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K1, K4: a lane that the worker can't take costs nobody anything: its caller goes elsewhere, or waits."""
    pool = start(HANDLERS[0], workers=1, concurrency=16, limits=Limits(open_files=40))
    (beside,) = opened(pool, "/wait", 1)
    assert get(pool, "/leak") == b"leaked"
    results = at_once([lambda number=number: stream(pool, number, 10, 0.01) for number in range(12)])  # type: ignore[misc]
    assert results == [None] * 12
    assert "takes no more than 2 jobs at once" in log.text
    assert not beside.settled
    beside.close()
    assert pool.stats().deaths == 0


def test_stacks_are_not_the_handler_s(start: Callable[..., Pool]) -> None:
    """K1, K5: the stacks of a worker's threads do not count towards the memory that its jobs may take."""
    pool = start(HANDLERS[0], workers=1, concurrency=64, limits=Limits(memory="64MiB"))
    jobs = opened(pool, "/wait", 64)
    for job in jobs:
        job.close()
    wait_until(lambda: pool.stats().running == 0)


@both
def test_programs_inherit_no_lane(start: Callable[..., Pool], handler: str, tmp_path: Path) -> None:
    """K1, N1: what a handler starts has none of the pipes of any job."""
    pool = start(handler, workers=1, concurrency=4)
    jobs = opened(pool, "/wait", 3)
    assert get(pool, f"/inherited?here={tmp_path / 'listing'}").split() == [b"0", b"1", b"2", b"3"]  # the last: its own
    for job in jobs:
        job.close()


def test_two_pools_have_room(tmp_path: Path) -> None:
    """K5: descriptors that one pool may open later are not given to another."""
    program = tmp_path / "program.py"
    program.write_text(TWO_POOLS)
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert done.stdout == "80 jobs\n", done.stderr


TWO_POOLS = """
import contextlib, resource
from runner import Pool, Request
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 1000))
with contextlib.ExitStack() as stack:
    pools = [stack.enter_context(Pool("tests.lane_handlers:app", workers=1, concurrency=40)) for _ in range(2)]
    calls = [pool for pool in pools for _ in range(40)]
    jobs = [stack.enter_context(pool.open(Request("GET", "/wait"), lease_timeout=5)) for pool in calls]
    print(len(jobs), "jobs")
"""


# -- deaths --------------------------------------------------------------------------------------------


@both
def test_a_crash_at_every_stage(start: Callable[..., Pool], handler: str, tmp_path: Path) -> None:
    """K4, F3, F4: 64 jobs in all stages of their lives, and a segfault: each caller is told, and none hangs."""
    pool = start(handler, workers=1, concurrency=64)
    never = threading.Event()

    def endless() -> Iterator[bytes]:
        yield b"first"
        never.wait(60)

    def stalled_upload() -> Any:
        with pool.open(Request("POST", "/echo", body=endless()), read_timeout=60) as job:
            return b"".join(job)

    for turn in range(3):
        streams = opened(pool, "/wait", 15)
        unread = [pool.open(Request("GET", "/big?pieces=64")) for _ in range(15)]
        left = opened(pool, "/wait", 4)
        with ThreadPoolExecutor(64) as threads:
            uploads = [threads.submit(stalled_upload) for _ in range(14)]
            begun = [tmp_path / f"{turn}.{number}" for number in range(15)]
            waiting = [threads.submit(get, pool, f"/share?size=1&here={here}") for here in begun]
            wait_until(lambda: pool.stats().running == 63 and all(here.exists() for here in begun))  # noqa: B023
            for job in left:
                job.close()
            (pid,) = [worker.pid for worker in pool.workers()]
            with pytest.raises(WorkerDied) as own:
                get(pool, "/die")
            assert own.value.fault.signal == "SIGSEGV"
            assert "with " in own.value.fault.detail
            assert "others" in own.value.fault.detail
            for job in [*streams, *unread]:
                with pytest.raises(WorkerDied, match="SIGSEGV"):
                    b"".join(job)
            never.set()
            for future in waiting:
                assert isinstance(future.exception(30), WorkerDied)
            for upload in uploads:  # one that the worker had not begun is done by its successor
                assert isinstance(upload.exception(30), WorkerDied) or upload.result() == b"first"
            never.clear()
        wait_gone([pid], 10)
        wait_until(lambda: pool.stats().idle == 1)
        assert get(pool, "/hello") == b"hello"
    assert pool.stats().deaths == 3


@both
def test_what_was_not_taken_goes_elsewhere(start: Callable[..., Pool], handler: str) -> None:
    """K4, W6: requests in the pipes of a worker that is stopped, and dies, are all answered by others."""
    pool = start(handler, workers=1, concurrency=16)
    for _ in range(5):
        (beside,) = opened(pool, "/wait", 1)
        pid = beside.worker_pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all_stopped(pid))  # noqa: B023 # a thread may go on for a moment, and take a request
        with ThreadPoolExecutor(12) as threads:
            calls = [threads.submit(get, pool, "/hello", read_timeout=30) for _ in range(12)]
            wait_until(lambda: sum(call.done() for call in calls) + pool.stats().running >= 13)  # noqa: B023
            kill(pid)
            assert [call.result(30) for call in calls] == [b"hello"] * 12
        with pytest.raises(WorkerDied):
            b"".join(beside)
    wait_until(lambda: pool.stats().idle == 1)


@both
def test_memory_is_the_worker_s(start: Callable[..., Pool], handler: str) -> None:
    """K4, K5, F5: over the limit of memory the worker goes, and all of its jobs are told that it was this."""
    pool = start(handler, workers=1, concurrency=8, limits=Limits(memory="200MiB"))
    others = opened(pool, "/wait", 3)
    results = at_once([lambda: get(pool, "/share?size=90000000", read_timeout=60)] * 3)
    assert [type(result) for result in results] == [MemoryExceeded] * 3
    for job in others:
        with pytest.raises(MemoryExceeded, match="with its 6 jobs"):
            b"".join(job)


def test_a_lane_that_can_not_go_on(start: Callable[..., Pool]) -> None:
    """K4, F3: where our own code in the worker fails, the worker ends, and its callers are told."""
    pool = start(HANDLERS[1], workers=1, concurrency=4)
    beside, other = opened(pool, "/wait", 2)
    assert get(pool, "/break") == b"broken"
    for job in (beside, other):
        with pytest.raises(WorkerDied):
            b"".join(job)
    assert get(pool, "/hello") == b"hello"


def test_a_worker_that_shuts_its_line(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K3, W1: it can be told nothing any more: it gets no more jobs, and is replaced."""
    pool = start(HANDLERS[0], workers=1, concurrency=4)
    (beside,) = opened(pool, "/wait", 1)
    assert get(pool, "/shut_line") == b"shut"
    results = at_once([lambda number=number: stream(pool, number, 20, 0.01) for number in range(4)])  # type: ignore[misc]
    assert results == [None] * 4
    wait_until(lambda: "has closed its line" in log.text)
    wait_until(lambda: any(worker.pid == beside.worker_pid and worker.leaving for worker in pool.workers()))
    pid = beside.worker_pid
    assert pid
    beside.close()
    wait_gone([pid], 10)


def test_a_worker_that_is_stopped(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K3, W10: no more jobs go to it, though it has free lanes."""
    pool = start(HANDLERS[0], workers=1, concurrency=4, drain=0.2)
    (beside,) = opened(pool, "/wait", 1)
    assert beside.worker_pid
    os.kill(beside.worker_pid, signal.SIGSTOP)
    wait_until(lambda: "gets no more jobs" in log.text)
    assert get(pool, "/hello") == b"hello"
    with pytest.raises(WorkerDied):
        b"".join(beside)


# -- cancels -------------------------------------------------------------------------------------------


@both
def test_a_cancel_ends_one_job(start: Callable[..., Pool], handler: str, tmp_path: Path) -> None:
    """K3, C2: the job whose caller leaves hears of it, and its worker and the other jobs go on."""
    pool = start(handler, workers=1, concurrency=8, grace=5)
    beside = opened(pool, "/wait", 3)
    told = tmp_path / "told"
    (job,) = opened(pool, f"/wait?told={told}", 1)
    began = time.monotonic()
    job.close()
    assert time.monotonic() - began < 1
    wait_until(told.exists)
    wait_until(lambda: pool.stats().running == 3)
    assert get(pool, "/hello") == b"hello"
    for other in beside:
        assert not other.settled
        other.close()
    assert pool.stats().deaths == 0


@both
def test_a_stubborn_job_condemns_its_worker(
    start: Callable[..., Pool], handler: str, log: pytest.LogCaptureFixture
) -> None:
    """K3: no new jobs there, a successor at once, the others end whole in their time; then it is killed."""
    pool = start(handler, workers=1, concurrency=8, grace=0.1, drain=30)
    with ThreadPoolExecutor(4) as threads:
        siblings = [threads.submit(stream, pool, number, 60, 0.02) for number in range(4)]
        wait_until(lambda: pool.stats().running == 4)
        (stubborn,) = opened(pool, "/stubborn", 1)
        pid = stubborn.worker_pid
        assert pid
        stubborn.close()
        wait_until(lambda: "gets no more jobs" in log.text)
        wait_until(lambda: any(worker.pid != pid and worker.state == "idle" for worker in pool.workers()))
        assert {worker.leaving for worker in pool.workers() if worker.pid == pid} == {True}
        assert int(get(pool, "/pid")) != pid
        for future in siblings:
            assert future.result(30) is None
    wait_gone([pid], 10)  # at once, though `drain` is long: none of its jobs is waited for any more
    wait_until(lambda: len(pool.workers()) == 1)


def test_the_others_have_their_time_and_no_more(start: Callable[..., Pool]) -> None:
    """K3: after `drain` seconds a condemned worker is killed, and its other jobs are told of its death."""
    pool = start(HANDLERS[0], workers=1, concurrency=4, grace=0.05, drain=0.3)
    sibling, stubborn = opened(pool, "/wait", 1) + opened(pool, "/stubborn", 1)
    stubborn.close()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        b"".join(sibling)
    assert get(pool, "/hello") == b"hello"


def test_a_burst_of_cancels(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K3: more callers leave at once than the line has room for, while a job holds up the loop: no worker goes."""
    pool = start(HANDLERS[1], workers=1, concurrency=500, grace=5)
    beside, *leaving = opened(pool, "/wait", 450)
    (holding,) = opened(pool, "/hold?seconds=0.3", 1)
    for job in leaving:
        job.close()
    assert b"".join(holding) == b"held"
    wait_until(lambda: pool.stats().running == 1)
    assert not beside.settled
    beside.close()
    assert pool.stats().deaths == 0
    assert "gets no more jobs" not in log.text


def test_the_grace_time_begins_when_it_is_heard(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K3: a sibling that holds up the loop for longer than the grace time costs an honest job's worker nothing."""
    pool = start(HANDLERS[1], workers=1, concurrency=8, grace=0.1)
    beside, leaving = opened(pool, "/wait", 2)
    (holding,) = opened(pool, "/hold?seconds=0.5", 1)
    leaving.close()
    assert b"".join(holding) == b"held"
    wait_until(lambda: pool.stats().running == 1)
    assert not beside.settled
    beside.close()
    assert "gets no more jobs" not in log.text


def test_threads_of_a_job_s_own(start: Callable[..., Pool], tmp_path: Path) -> None:
    """K2, H6, C2: one that reads, or writes, holds up nothing; a cancel goes to the handler, and to none of them."""
    pool = start(HANDLERS[0], workers=1, concurrency=4, grace=5)
    headed = tmp_path / "headed"

    def body() -> Iterator[bytes]:
        yield b"the "
        wait_until(headed.exists)
        yield b"end"

    with pool.open(Request("POST", f"/helper_reads?here={headed}", body=body()), read_timeout=20) as job:
        assert b"".join(job) == b"x" * 20_000 + b"the end"
    told = tmp_path / "told"
    job = pool.open(Request("GET", f"/helper_writes?told={told}"))
    job.read()
    job.close()
    wait_until(told.exists)
    wait_until(lambda: pool.stats().running == 0)
    assert pool.stats().deaths == 0


def test_wall_time_is_each_job_s(start: Callable[..., Pool]) -> None:
    """K5, F6: a job over its time is told so; its siblings, which began later, end whole."""
    pool = start(HANDLERS[0], workers=1, concurrency=8, limits=Limits(wall_seconds=0.5), grace=1)
    (late,) = opened(pool, "/wait", 1)
    wait_until(lambda: pool.workers()[0].lanes[0].seconds > 0.25)
    with ThreadPoolExecutor(3) as threads:
        siblings = [threads.submit(stream, pool, number, 15, 0.02) for number in range(3)]
        with pytest.raises(JobTimedOut):
            b"".join(late)
        assert [future.result(30) for future in siblings] == [None] * 3
    assert pool.stats().deaths == 0


def test_a_thread_that_takes_another_name(start: Callable[..., Pool]) -> None:
    """K5, F6: it is measured all the same."""
    pool = start(HANDLERS[0], workers=1, concurrency=4, limits=Limits(cpu_seconds=0.4), grace=1)
    with pytest.raises(JobTimedOut, match="processor time"):
        get(pool, "/rename")


def test_processor_time_is_each_thread_s(start: Callable[..., Pool]) -> None:
    """K5, F6: the job that burns is ended, and not the one that sleeps beside it."""
    pool = start(HANDLERS[0], workers=1, concurrency=4, limits=Limits(cpu_seconds=0.4), grace=1)
    (beside,) = opened(pool, "/wait", 1)
    with pytest.raises(JobTimedOut, match="processor time"):
        get(pool, "/burn")
    assert not beside.settled
    beside.close()
    assert pool.stats().deaths == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@both
def test_ten_thousand_cancels(start: Callable[..., Pool], handler: str) -> None:
    """K2, K3, C5: cancels at random instants: no job hears another's, all that are not left are whole."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    pool = start(handler, workers=2, concurrency=16, grace=20)
    wrong: list[BaseException] = []

    def caller(number: int) -> None:
        chance = random.Random(seed + number)
        for turn in range(10_000 // 16):
            name = f"{number}.{turn}"
            try:
                if chance.random() < 0.3:
                    stream(pool, name, 3)
                    continue
                job = pool.open(Request("GET", f"/stream?name={name}&count=20&pause=0.0001"), read_timeout=30)
                for _ in range(chance.randrange(4)):
                    job.read()
                if chance.random() < 0.5:
                    time.sleep(chance.uniform(0, 0.002))
                job.close()
            except BaseException as error:
                wrong.append(error)
                return

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(16)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(240)
    assert wrong == []
    wait_until(lambda: pool.stats().idle == 2)
    assert pool.stats().deaths == 0
    assert set(pool.stats().outcomes) <= {"ok", "left"}


# -- recycling -----------------------------------------------------------------------------------------


@both
def test_recycling_under_load(start: Callable[..., Pool], handler: str) -> None:
    """K5, W9: a worker that is due ends the jobs that it has, and gets no more: none is lost."""
    pool = start(handler, workers=2, concurrency=8, recycle=Recycle(after_jobs=40, jitter=0))
    pids: set[int] = set()

    def caller(number: int) -> None:
        for turn in range(40):
            stream(pool, f"{number}.{turn}", 3, 0.001)
            pids.add(int(get(pool, "/pid")))

    assert at_once([lambda number=number: caller(number) for number in range(16)]) == [None] * 16  # type: ignore[misc]
    assert len(pids) > 10
    wait_until(lambda: len(pool.workers()) == 2)
    assert pool.stats().deaths == 0


def test_leaving_workers_are_few(start: Callable[..., Pool]) -> None:
    """K5, W9: long jobs on workers that are due make no more processes than twice the pool, and no more jobs."""
    recycle = Recycle(after_jobs=2, jitter=0)
    pool = start(HANDLERS[1], workers=1, concurrency=8, recycle=recycle)
    jobs: list[Job] = []
    with pytest.raises(LeaseTimeout):
        for _ in range(12):
            get(pool, "/hello", lease_timeout=3)
            jobs.append(pool.open(Request("GET", "/wait"), lease_timeout=3))
    assert len(jobs) == 8
    assert len(pool.workers()) <= 2
    for job in jobs:
        job.close()
    wait_until(lambda: len(pool.workers()) == 1)
    assert pool.stats().deaths == 0


def test_the_death_of_a_leaving_worker(start: Callable[..., Pool]) -> None:
    """K5, W9: it counts, where it had jobs."""
    pool = start(HANDLERS[1], workers=1, concurrency=4, recycle=Recycle(after_jobs=2, jitter=0))
    (long,) = opened(pool, "/wait", 1)
    get(pool, "/hello")
    wait_until(lambda: any(worker.leaving for worker in pool.workers()))
    kill(long.worker_pid)
    with pytest.raises(WorkerDied):
        b"".join(long)
    wait_until(lambda: pool.stats().deaths == 1)


def test_a_long_job_keeps_its_leaving_worker(start: Callable[..., Pool]) -> None:
    """K5, W9: its successor is there at once; the old worker goes when its last job has ended."""
    pool = start(HANDLERS[1], workers=1, concurrency=4, recycle=Recycle(after_jobs=3, jitter=0), stop_timeout=0.1)
    (long,) = opened(pool, "/wait", 1)
    for _ in range(2):
        get(pool, "/hello")
    wait_until(lambda: len(pool.workers()) == 2)
    assert int(get(pool, "/pid")) != long.worker_pid
    assert not long.settled
    pid = long.worker_pid
    assert pid
    long.close()
    wait_gone([pid], 10)
    assert pool.stats().deaths == 0


# -- what is each job's own ----------------------------------------------------------------------------


@both
def test_contexts_and_thread_locals(start: Callable[..., Pool], handler: str) -> None:
    """K2: what a job puts into a context variable or a thread local, no other finds: beside it, or after it."""
    pool = start(handler, workers=1, concurrency=8)
    threads = set()
    for turn in range(5):
        calls = [lambda name=f"{turn}.{number}": get(pool, f"/seen?name={name}&pause=0.02") for number in range(8)]
        for result in at_once(calls):
            variable, local, thread, kept = ast.literal_eval(result.decode())
            assert (variable, local, kept) == ("", "", True)
            threads.add(thread)
    if handler == HANDLERS[0]:
        assert threads <= {f"blastdoor-lane-{number}" for number in range(8)}
        assert len(threads) > 4


@pytest.mark.parametrize(("concurrency", "jobs"), [(16, 16), (2, 40)], ids=["all at once", "most have waited"])
@both
def test_logs_have_the_right_job(
    start: Callable[..., Pool], handler: str, concurrency: int, jobs: int, log: pytest.LogCaptureFixture
) -> None:
    """K2, W11: lines that several jobs print at once, in pieces, come whole, each with its own job's id.

    So they do where a job begins before its caller has woken up.
    """
    log.set_level(logging.INFO)
    pool = start(handler, workers=1, concurrency=concurrency)
    names: dict[str, str] = {}

    def one(number: int) -> None:
        with pool.open(Request("GET", f"/print?name=n{number}")) as job:
            names[f"n{number}"] = job.job_id
            b"".join(job)

    at_once([lambda number=number: one(number) for number in range(jobs)])  # type: ignore[misc]
    wait_until(lambda: sum(" ends" in record.getMessage() for record in log.records) == jobs)
    found: Counter[str] = Counter()
    for record in log.records:
        if record.name == "blastdoor.worker":
            name = record.getMessage().rpartition(": ")[2].split()[0]
            assert record.job_id == names[name], record.getMessage()  # type: ignore[attr-defined]
            found[name] += 1
    assert found == dict.fromkeys(names, 6)


def test_whose_line_it_is(lane: FarEnds) -> None:
    """K2, W11: a line has the id of the job that its tag names: of the one under way, and the one before; else none."""
    worker = lane.worker
    worker.concurrency = 2
    worker.lanes[0].name_job("first", 1)
    worker.lanes[0].name_job("second", 2)
    worker.lanes[0].name_job("second", 2)  # by who gave the lane up, and by who had waited for it
    assert [worker.find_job(0, number) for number in range(4)] == ["", "first", "second", ""]
    assert worker.find_job(7, 2) == ""


def test_threads_of_one_job_print(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K2, W11: none of their lines is lost."""
    log.set_level(logging.INFO)
    pool = start(HANDLERS[0], workers=1, concurrency=2)
    get(pool, "/print_much")
    wait_until(lambda: sum(record.getMessage().count("<") for record in log.records) == 800)


def test_what_no_job_printed(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """K2: a thread of the app's own has no job, and the log names none."""
    log.set_level(logging.INFO)
    pool = start(HANDLERS[0], workers=1, concurrency=2)
    get(pool, "/background_print")
    wait_until(lambda: "from no job" in log.text)
    (record,) = [record for record in log.records if "from no job" in record.getMessage()]
    assert record.job_id == ""  # type: ignore[attr-defined]


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "8", 5000])
def test_numbers_that_make_no_sense(number: Any) -> None:
    """K5: it is refused when the pool is made."""
    with pytest.raises(ConfigurationError, match="concurrency"):
        Pool(HANDLERS[0], concurrency=number)


def test_what_does_not_go_together(start: Callable[..., Pool]) -> None:
    """K5: the strict sandbox is one job's; processor time can't be told apart on one event loop."""
    with pytest.raises(ConfigurationError, match="strict"):
        Pool(HANDLERS[0], concurrency=2, sandbox=Sandbox.strict())
    with pytest.raises(ConfigurationError, match="cpu_seconds"):
        Pool(HANDLERS[1], kind="asgi", concurrency=2, limits=Limits(cpu_seconds=1))
    with pytest.raises(StartError, match="cpu_seconds"):
        start(HANDLERS[1], concurrency=2, limits=Limits(cpu_seconds=1))


@both
def test_in_the_default_sandbox(start: Callable[..., Pool], handler: str) -> None:
    """K5, S: it works there as elsewhere."""
    pool = start(handler, workers=1, concurrency=16, sandbox="default", path=[str(Path(__file__).parents[1])])
    results = at_once([lambda number=number: stream(pool, number, 10, 0.005) for number in range(16)])  # type: ignore[misc]
    assert results == [None] * 16
    with pytest.raises(JobFailed):
        get(pool, "/die")
    assert get(pool, "/hello") == b"hello"
