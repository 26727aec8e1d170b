"""runner.pool: workers, what they inherit, and how a pool begins and ends."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner import (
    JobClosed,
    LeaseTimeout,
    Pool,
    PoolClosed,
    ReadTimeout,
    Request,
    Sandbox,
    StartError,
    WorkerDied,
)
from runner.events import WorkerEnded
from runner.platform import descriptors
from runner.supervision.record import Worker
from runner.supervision.supervisor import Supervisor
from tests.processes import is_gone, kill, wait_gone
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]


def get(pool: Pool, target: str, **limits: Any) -> bytes:
    with pool.open(Request("GET", target), **limits) as job:
        return b"".join(job)


def state(pool: Pool) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(pool, "/state"))
    return found


def test_open_is_a_round_trip(pool: Pool) -> None:
    """W1: below any HTTP client: a request, its head, its body."""
    with pool.open(Request("POST", "/echo?y=1", headers=[("content-type", "text/plain")], body=b"hi")) as job:
        assert job.head.status == 200
        assert ("content-type", "application/json") in job.head.headers
        seen = json.loads(b"".join(job))
    assert (seen["body"], seen["target"]) == ("hi", "/echo?y=1")
    assert seen["context"]["job_id"] == job.job_id


def test_one_worker_one_job(start: Callable[..., Pool]) -> None:
    """W1: a worker runs one job at a time: as many pids as workers, and never two jobs at once on one."""
    pool = start("tests.counting:app", workers=3)
    results: list[tuple[str, str]] = []

    def call() -> None:
        for _ in range(10):
            pid, running = get(pool, "/").split()
            results.append((pid.decode(), running.decode()))

    threads = [threading.Thread(target=call) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 90
    assert {running for _, running in results} == {"1"}
    assert len({pid for pid, _ in results}) <= 3


def test_what_a_worker_holds(pool: Pool) -> None:
    """W1, W2: its two pipes, /dev/null, the log pipes and the line; nothing of the zygote's or the host's."""
    found = state(pool)
    pipes = found["descriptors"]
    assert pipes["0"] == "/dev/null"
    assert len({pipes[number] for number in "12345"}) == 5
    assert all(pipes[number].startswith("pipe:") for number in "1234")
    assert pipes["5"].startswith("socket:")
    assert set(pipes) == {"0", "1", "2", "3", "4", "5"}
    assert found["argv"] == [""]
    assert found["threads"] == 1
    assert found["session"]
    assert found["main"] is None
    assert not any(name == "pytest" or name.startswith("_pytest") for name in found["modules"])


def test_descriptors_that_a_preload_opens_are_kept(start: Callable[..., Pool]) -> None:
    """W2: what the handler's import opened stays open in the workers, all else of the zygote is closed."""
    pool = start("tests.preloaded:app", preload=True)
    first, second = (json.loads(get(pool, "/")) for _ in range(2))
    assert first["read"] == first["expected"]
    assert len(first["descriptors"]) == 7
    assert second["imported_by"] == first["imported_by"] != first["pid"]


def test_the_environment(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """W2: None passes the host's environment on, a mapping just that."""
    monkeypatch.setenv("BLASTDOOR_TEST_SECRET", "secret")
    assert state(start())["environment"]["BLASTDOOR_TEST_SECRET"] == "secret"
    found = state(start(env={"ONLY": "this"}))["environment"]
    assert found.pop("LC_CTYPE", None) in (None, "C.UTF-8")  # Python sets it in a C locale (PEP 538)
    assert found == {"ONLY": "this"}


def test_path_and_directory(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W2: the worker gets the host's sys.path and working directory; the host never imports the handler."""
    (tmp_path / "only_here.py").write_text(
        "def app(request, response):\n    import os\n    return os.getcwd().encode()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert get(start("only_here:app"), "/") == str(tmp_path).encode()
    assert "only_here" not in sys.modules


def test_callables_go_by_value(start: Callable[..., Pool]) -> None:
    """W2: a closure and a lambda run in the workers, with what they refer to."""
    greeting = b"by value"
    assert get(start(lambda request, response: greeting), "/") == b"by value"

    class Greeter:
        def __call__(self, request: Any, response: Any) -> bytes:
            return greeting + b" too"

    assert get(start(Greeter()), "/") == b"by value too"


def test_the_host_loads_nothing_from_workers() -> None:
    """W2: no module of the host's side can unpickle, evaluate or import on a worker's word."""
    sources = [path for room in ("wire", "jobs", "supervision") for path in (ROOT / "runner" / room).glob("*.py")]
    assert len(sources) > 20
    for path in sources:
        source = path.read_text()
        for word in ("pickle", "dill", "marshal", "eval(", "exec(", "importlib", "__import__"):
            assert word not in source, (path, word)


def test_first_in_first_out(start: Callable[..., Pool], tmp_path: Path) -> None:
    """W4: callers that wait get workers in the order in which they came."""
    pool = start(workers=1)
    blocker = pool.open(Request("GET", f"/head_then_wait?go={tmp_path / 'go'}"))
    order: list[int] = []

    def call(number: int) -> None:
        with pool.open(Request("GET", "/hello")):
            order.append(number)

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=call, args=(number,)))
        threads[-1].start()
        while len(pool._leases._waiters) <= number:
            threads[-1].join(0.001)
    (tmp_path / "go").touch()
    blocker.close()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_waiting_has_a_limit(start: Callable[..., Pool]) -> None:
    """F7: LeaseTimeout says what to do; whoever gave up does not take a worker from the next one."""
    pool = start(workers=1)
    with pool.open(Request("GET", "/endless")):
        for wait in (0, 0.02):
            with pytest.raises(LeaseTimeout, match="more workers"):
                get(pool, "/hello", lease_timeout=wait)
    assert get(pool, "/hello") == b"hello"


def test_a_job_left_early(start: Callable[..., Pool]) -> None:
    """C1, C4: one that ends within the grace time leaves its worker warm; one that does not costs it."""
    pool = start(workers=1, grace=5)
    pid = get(pool, "/pid")
    with pool.open(Request("GET", "/big?size=1000000")) as job:
        assert job.read()
    assert get(pool, "/pid") == pid
    hasty = start(workers=1, grace=0.05)
    pid = get(hasty, "/pid")
    with hasty.open(Request("GET", "/stubborn")) as job:
        assert job.read()
    assert get(hasty, "/pid") != pid


def test_a_job_dropped(start: Callable[..., Pool]) -> None:
    """C1: a job that is garbage-collected ends, with a ResourceWarning that names it."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/endless"))
    with pytest.warns(ResourceWarning, match=job.job_id):
        del job
    assert get(pool, "/hello") == b"hello"


def test_a_closed_job_gives_no_clean_end(pool: Pool) -> None:
    """C2: reading on after close() raises, with the cause that was given."""
    job = pool.open(Request("GET", "/endless"))
    job.read()
    cause = RuntimeError("the user left")
    job.close(cause)
    job.close()
    with pytest.raises(JobClosed) as caught:
        b"".join(job)
    assert caught.value.__cause__ is cause


def test_a_blocked_reader_is_freed(pool: Pool) -> None:
    """C2: by close() from another thread, at once, with the cause."""
    job = pool.open(Request("GET", "/stream?count=2&pause=600"))
    job.read()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            job.read()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while job._user is None:
        thread.join(0.001)
    cause = RuntimeError("enough")
    job.close(cause)
    thread.join(10)
    assert isinstance(caught[0], JobClosed)
    assert caught[0].__cause__ is cause
    assert get(pool, "/hello") == b"hello"


def test_a_read_timeout_ends_the_job(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """F5: no progress for so long: the job is ended, and its worker is free, or replaced with a log line."""
    pool = start(workers=1, grace=0.05)
    with pytest.raises(ReadTimeout, match="no progress"):
        get(pool, "/spin", read_timeout=0.05)
    assert get(pool, "/hello") == b"hello"
    assert "did not end within 0.05 s" in log.text


def test_a_stopped_worker(start: Callable[..., Pool]) -> None:
    """W7: a worker that was stopped in its job is found by the caller's own limit, and killed after the grace time."""
    pool = start(workers=1)
    (worker,) = pool._leases.idle()
    with pytest.raises(ReadTimeout):
        get(pool, "/die?how=SIGSTOP", read_timeout=0.05)
    assert get(pool, "/hello", read_timeout=10) == b"hello"
    assert is_gone(worker.pid or 0)


@pytest.mark.parametrize("sandbox", [None, Sandbox.default(), Sandbox.strict()], ids=["plain", "default", "strict"])
def test_an_idle_worker_is_stopped(
    start: Callable[..., Pool], sandbox: Sandbox | None, log: pytest.LogCaptureFixture
) -> None:
    """I10, W7: a worker that is stopped while it has no job is killed and replaced, before anybody is given it."""
    pool = start(workers=1, sandbox=sandbox)
    (worker,) = pool._leases.idle()
    ended: queue.Queue[object] = queue.Queue()
    pool.subscribe(lambda event: ended.put(event) if isinstance(event, WorkerEnded) else None)
    kill(worker.pid, signal.SIGSTOP)
    assert ended.get(timeout=20) == WorkerEnded(worker.pid, None, "SIGKILL", 0)
    assert get(pool, "/hello") == b"hello"
    assert "stopped without a job" in log.text


def test_a_worker_that_was_stopped_goes_on(start: Callable[..., Pool]) -> None:
    """W7: one that is stopped in its job, and continued, has lost nothing but time."""
    pool = start(workers=1)
    (worker,) = pool._leases.idle()
    with pool.open(Request("GET", "/endless")) as job:
        kill(worker.pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
        kill(worker.pid, signal.SIGCONT)
        assert [job.read() for _ in range(100)]
    assert get(pool, "/pid") == str(worker.pid).encode()


def test_idle_workers_that_die(start: Callable[..., Pool]) -> None:
    """W7, I1: a worker that was killed while it was idle costs the next caller nothing."""
    pool = start(workers=2, preload=True)
    for _ in range(200):
        for worker in list(pool._leases.idle()):
            with contextlib.suppress(ProcessLookupError):  # dead since the round before, and not yet noted
                kill(worker.pid)
        assert get(pool, "/hello") == b"hello"


def test_exit_statuses_are_recorded(start: Callable[..., Pool]) -> None:
    """W7: each death is seen by event, with its own code."""
    pool = start(workers=1)
    for code in (1, 2, 77, 255):
        with pytest.raises(WorkerDied) as caught:
            get(pool, f"/exit_with?code={code}")
        assert caught.value.fault.exit_code == code


def test_close_is_final_and_idempotent(start: Callable[..., Pool]) -> None:
    """W11: afterwards nothing is left, and requests are refused with a clear error."""
    pool = start(workers=3)
    processes = psutil.Process().children(recursive=True)
    assert len(processes) == 4
    pool.close()
    pool.close()
    assert not any(process.is_running() for process in processes)
    with pytest.raises(PoolClosed, match="open a new one"):
        get(pool, "/hello")
    with pytest.raises(PoolClosed):
        pool.start()


def test_close_waits_for_jobs_and_then_kills(start: Callable[..., Pool], tmp_path: Path) -> None:
    """W11: jobs under way may end within the drain time; what goes on longer is killed and its caller told."""
    pool = start(workers=2)
    go = tmp_path / "go"
    results: list[bytes] = []
    job = pool.open(Request("GET", f"/head_then_wait?go={go}"))
    reader = threading.Thread(target=lambda: results.append(b"".join(job)))
    reader.start()
    endless = pool.open(Request("GET", "/endless"))
    closer = threading.Thread(target=pool.close, args=(1.0,))
    closer.start()
    while not pool._closed:
        closer.join(0.001)
    go.touch()
    reader.join(10)
    assert results == [b"done"]
    closer.join(10)
    assert not closer.is_alive()
    with pytest.raises(JobClosed):
        b"".join(endless)


def test_close_frees_waiting_callers(start: Callable[..., Pool]) -> None:
    """W11: whoever waits for a worker is told that there will be none."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/endless"))
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            get(pool, "/hello")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not pool._leases._waiters:
        thread.join(0.001)
    pool.close(drain=0)
    thread.join(10)
    assert isinstance(caught[0], PoolClosed)
    job.close()


@pytest.mark.parametrize("how", ["plain", "session", "double"])
def test_close_leaves_no_descendants(start: Callable[..., Pool], how: str) -> None:
    """W11: what a handler has started is gone with its worker, also what left its session or was forked twice."""
    pool = start(workers=1)
    process = psutil.Process(int(get(pool, f"/spawn?how={how}")))
    assert process.is_running()
    pool.close()
    assert not process.is_running()


@pytest.mark.parametrize("how", ["plain", "session", "double"])
def test_a_dead_worker_leaves_no_descendants(start: Callable[..., Pool], how: str) -> None:
    """F3, W11: nor does one that dies; its caller sees the end though a descendant holds the pipes open."""
    pool = start(workers=1)
    pid = int(get(pool, f"/spawn?how={how}"))
    with pytest.raises(WorkerDied):
        get(pool, "/die?how=SIGKILL", read_timeout=10)
    wait_gone([pid], 1)
    assert get(pool, "/hello") == b"hello"


def test_workers_outlive_the_thread_that_started_them(start: Callable[..., Pool]) -> None:
    """W8: a pool that a short-lived thread has started lives on."""
    pools: list[Pool] = []
    thread = threading.Thread(target=lambda: pools.append(start(workers=1)))
    thread.start()
    thread.join()
    pid = get(pools[0], "/pid")
    assert get(pools[0], "/pid") == pid


def test_a_pool_starts_with_its_first_request(start: Callable[..., Pool]) -> None:
    """W11: without a with block it starts by itself, and has to be closed."""
    pool = Pool("tests.handlers:app", workers=1)
    assert get(pool, "/hello") == b"hello"
    pool.close()


def test_a_dropped_pool_closes(start: Callable[..., Pool]) -> None:
    """W11: with a ResourceWarning; the leak check of every test sees that nothing is left."""
    pool = Pool("tests.handlers:app", workers=1).start()
    with pytest.warns(ResourceWarning, match="without being closed"):
        del pool


def test_a_pickled_pool(start: Callable[..., Pool]) -> None:
    """R: in this process a pickle refers to the same pool; elsewhere it becomes one that is set up alike."""
    pool = start(workers=1)
    data = pickle.dumps(pool)
    assert pickle.loads(data) is pool
    pool.close()
    del pool
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import gc

        gc.collect()
    from runner import pool_base

    pool_base.pools.clear()
    with pickle.loads(data) as copy:
        assert get(copy, "/hello") == b"hello"


def test_the_zygote_dies(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W7: all workers end with it; a new one starts, and requests go on."""
    pool = start(workers=2)
    assert pool._supervisor is not None
    zygote = pool._supervisor._zygote
    assert zygote is not None
    workers = [worker.pid for worker in psutil.Process(zygote.pid).children()]
    assert len(workers) == 2
    os.kill(zygote.pid, signal.SIGKILL)
    wait_gone(workers, 10)
    deadline = time.monotonic() + 30
    while True:
        try:
            assert get(pool, "/hello", lease_timeout=30) == b"hello"
            break
        except WorkerDied:
            assert time.monotonic() < deadline
    assert "the zygote process was ended by SIGKILL" in log.text


def test_reading_on_after_a_death(pool: Pool) -> None:
    """F3: the same fault again, at once, and not a look at descriptors that are closed."""
    with pool.open(Request("GET", "/die?late=1&how=SIGKILL")) as job:
        assert job.read() == b"first piece"
        for _ in range(3):
            with pytest.raises(WorkerDied, match="SIGKILL"):
                job.read()


def test_grace_times_do_not_mix(start: Callable[..., Pool]) -> None:
    """C3, C5: the grace time of one left job does not end the next one's on the same worker."""
    pool = start(workers=1, grace=0.6)
    pid = get(pool, "/pid")
    pool.open(Request("GET", "/stream?count=2&pause=0.02")).close()
    assert get(pool, "/pid") == pid  # settled; its timer is still to come
    time.sleep(0.4)  # the timer of the first job is due in the middle of the second one's grace time
    pool.open(Request("GET", "/stream?count=2&pause=0.2")).close()
    assert get(pool, "/pid") == pid


def test_a_death_is_seen_through_a_pipe_that_a_descendant_holds(start: Callable[..., Pool]) -> None:
    """I8, F3: with the zygote killed as well there is nobody to sweep, and the caller is told all the same."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/spawn_and_stream"))
    descendant = int(job.read().partition(b".")[0])  # pieces that have come together are read together
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    os.kill(pool._supervisor._zygote.pid, signal.SIGKILL)
    try:
        with pytest.raises(WorkerDied):
            b"".join(job)
    finally:
        os.kill(descendant, signal.SIGKILL)


def test_a_stopped_zygote_does_not_hold_up_close(start: Callable[..., Pool]) -> None:
    """W11: a zygote that reports nothing is killed at the deadline, and its workers end with it."""
    pool = start(workers=2)
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    os.kill(pool._supervisor._zygote.pid, signal.SIGSTOP)
    pool.close(drain=0)


def test_a_preload_that_hangs(start: Callable[..., Pool]) -> None:
    """F8: start() tells it after the start time, though no worker was even forked."""
    with pytest.raises(StartError, match=r"not ready 0\.3 s after its start"):
        start("tests.bad_handlers.hangs:app", preload=True, start_timeout=0.3)


def test_a_preload_that_changes_signals(start: Callable[..., Pool]) -> None:
    """W7: deaths are seen though the handler's import has set SIGCHLD for purposes of its own."""
    pool = start("tests.bad_handlers.ignores_children:app", preload=True, workers=1)
    for _ in range(3):
        with pytest.raises(WorkerDied, match="code 1"):
            get(pool, "/die")
        assert get(pool, "/") == b"alive"


def test_workers_that_die_right_after_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: a worker that says READY and dies without having run a job counts against the brake."""
    monkeypatch.setenv("BLASTDOOR_TEST_DIR", str(tmp_path))
    with Pool("tests.bad_handlers.dies_soon:app", workers=2) as pool:
        (tmp_path / "broken").touch()
        assert pool._supervisor is not None
        for worker in list(pool._supervisor._workers.values()):
            kill(worker.pid)
        deadline = time.monotonic() + 20
        while not pool._supervisor._backoff.engaged:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert len((tmp_path / "starts").read_text()) <= 2 + 8


def test_settings_that_the_machine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: whatever keeps the zygote from starting is told, and nothing waits for it."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/tmp")])
    with Pool("tests.handlers:app", workers=1) as pool:
        assert get(pool, "/hello") == b"hello"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StartError, match="/nowhere/python"):
        Pool("tests.handlers:app", workers=1).start()


def test_descriptors_run_out(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """W3, F8: at start it is told; later workers are tried again, without a storm, until there are some."""
    pool = start(workers=4)
    monkeypatch.setattr(descriptors, "make_room", lambda count, owner: count)  # others take what there was room for
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(8)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))

    def take_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))

    try:
        take_all()
        whole = len(taken)
        for spare in range(6):
            for _ in range(spare):
                os.close(taken.pop())
            with pytest.raises(StartError, match="Too many open files"):
                Pool("tests.handlers:app", workers=4).start()
            take_all()
            assert len(taken) == whole, "a start that failed has kept descriptors"
        while pool.stats().idle or pool.stats().starting:
            for worker in list(pool._leases.idle()):
                with contextlib.suppress(ProcessLookupError):
                    kill(worker.pid)
            take_all()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: pool.stats().idle == 4)
    assert get(pool, "/hello") == b"hello"
    assert pool._supervisor is not None
    assert len(pool._supervisor._reactor._timers) < 50


def test_a_job_that_feigns_not_to_have_been_taken(start: Callable[..., Pool], tmp_path: Path) -> None:
    """F3: a worker that refills its own request pipe and dies is not given job after job."""
    pool = start(workers=1)
    with pytest.raises(WorkerDied):
        get(pool, f"/feign?runs={tmp_path / 'runs'}")
    assert len((tmp_path / "runs").read_text()) <= 3


def test_warnings_as_errors_leak_nothing(start: Callable[..., Pool]) -> None:
    """C1, W11: where ResourceWarning is an error, a dropped job or pool is closed all the same."""
    pool = start(workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        job = pool.open(Request("GET", "/endless"))
        with unraisable() as raised:
            del job
        assert raised
    assert get(pool, "/hello", lease_timeout=10) == b"hello"


@contextlib.contextmanager
def unraisable() -> Iterator[list[str]]:
    """What finalizers raise meanwhile."""
    raised: list[str] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda caught: raised.append(str(caught.exc_value))
    try:
        yield raised
    finally:
        sys.unraisablehook = hook


def test_an_interrupt_while_closing(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """W11: a Ctrl-C that ends the drain does not leave the pool half closed."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/endless"))

    def interrupt(timeout: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._leases, "wait_drained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    with pytest.raises(JobClosed):
        b"".join(job)


def test_a_failed_start_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: nothing of it is left; a pool that starts by itself says so to each caller, and begins anew."""
    monkeypatch.setenv("BLASTDOOR_TEST_DIR", str(tmp_path))
    (tmp_path / "broken").touch()
    with contextlib.closing(Pool("tests.bad_handlers.sometimes:app", workers=1)) as pool:
        for attempt in (pool.start, lambda: get(pool, "/"), pool.start):
            with pytest.raises(StartError, match="broken for now"):
                attempt()
        (tmp_path / "broken").unlink()
        assert get(pool, "/") == b"sometimes"


LIMITED = """
import resource, sys
from runner import Pool, Request, StartError
soft, hard, workers, concurrency = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    with Pool("tests.handlers:app", workers=workers, concurrency=concurrency) as pool:
        with pool.open(Request("GET", "/hello")) as job:
            print(b"".join(job), resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft)
except StartError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((32, 400, 4, 1), "b'hello' True"),
        ((32, 400, 100, 1), "the limit of open files has no room for 100 workers: there is room for 4"),
        ((200, 400, 2, 100), "the limit of open files has no room for 2 workers of 100 jobs each: there is room for 4"),
    ],
)
def test_room_for_descriptors(tmp_path: Path, numbers: tuple[int, ...], told: str) -> None:
    """K5, W3: the soft limit is raised where that helps; else the start says how many there is room for."""
    program = tmp_path / "program.py"
    program.write_text(LIMITED)
    done = subprocess.run(
        [sys.executable, program, *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.startswith(told), (done.stdout, done.stderr)


def test_the_news_of_a_death_overtakes_its_report(
    start: Callable[..., Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8: a worker that fails before the host has dealt with its birth: the caller has its report all the same."""
    born = Supervisor._born
    overtaken = []

    def late(supervisor: Supervisor, worker: Worker, pid: int, pidfd: int) -> None:
        born(supervisor, worker, pid, pidfd)
        wait_gone([pid], 10)
        assert supervisor._zygote is not None
        select.select([supervisor._zygote.control_fd], [], [])  # it is the first that epoll gives next
        overtaken.append(pid)

    monkeypatch.setattr(Supervisor, "_born", late)
    monkeypatch.setenv("BLASTDOOR_TEST_DIR", str(tmp_path))
    (tmp_path / "broken").touch()
    with pytest.raises(StartError, match="broken for now"):
        start("tests.bad_handlers.sometimes:app", workers=1)
    assert overtaken
