"""runner.worker.handlers.asgi and runner.worker.async_loop: ASGI 3, one event loop a worker, background work."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import (
    BodyIncomplete,
    CancelScope,
    HandlerAborted,
    HandlerRaised,
    JobClosed,
    JobTimedOut,
    Limits,
    Pool,
    PoolClosed,
    Recycle,
    Request,
    StartError,
    WorkerDied,
)
from tests.processes import is_gone, wait_gone
from tests.waiting import wait_until

APPS = "tests.asgi_apps"


def send(pool: Pool, target: str, body: Any = None, method: str = "POST", **limits: Any) -> bytes:
    headers = [("X-Test", "é".encode().decode("latin-1"))]
    with pool.open(Request(method, target, headers, body), **limits) as job:
        return b"".join(job)


@pytest.fixture
def pool(start: Callable[..., Pool]) -> Pool:
    """A pool of one worker with the ASGI test app."""
    return start(f"{APPS}:app", workers=1)


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("app", ["app", "with_lifespan"])
def test_the_kind_is_found(start: Callable[..., Pool], app: str, preload: bool) -> None:
    """H4: a coroutine function of three arguments, or an object that is called as one, is an ASGI app."""
    pool = start(f"{APPS}:{app}", workers=1, preload=preload)
    assert send(pool, "/hello")


@pytest.mark.parametrize("method", ["GET", "HEAD", "post", "OPTIONS"])
@pytest.mark.parametrize("body", [None, b"body", b"x" * 100_000])
def test_a_strict_app_has_no_complaint(
    start: Callable[..., Pool], log: pytest.LogCaptureFixture, method: str, body: bytes | None
) -> None:
    """H3: each key and type of the scope, the messages and their order, and the lifespan are as the spec says."""
    pool = start(f"{APPS}:strict", workers=1)
    answer = send(pool, "/a%20b/c?d=e", body, method)
    assert answer == (b"" if method == "HEAD" else b"strict " + (body or b""))
    pool.close()
    assert "the lifespan was as it should be" in log.text
    assert [r for r in log.records if r.levelno >= logging.WARNING] == []


def test_the_scope(start: Callable[..., Pool]) -> None:
    """H3, H7, T6: what a server behind the caller's URL would pass, and the trusted context beside it."""
    pool = start(f"{APPS}:app", workers=1, root_path="/root")
    request = Request(
        "POST",
        "/root/caf%C3%A9/%2F/scope?q=%20y&",
        headers=[("Host", "app.local:8080"), ("X-Twice", "1"), ("x-twice", "2")],
        body=b"hi",
        scheme="https",
        server=("app.local", 8080),
    )
    with pool.open(request) as job:
        assert (job.head.status, job.head.headers) == (200, [("Content-Type", "application/json")])
        seen = json.loads(b"".join(job))
    assert seen["path"] == "/root/café///scope"
    assert seen["raw_path"] == "/root/caf%C3%A9/%2F/scope"
    assert seen["query_string"] == "q=%20y&"
    assert seen["root_path"] == "/root"
    assert (seen["scheme"], seen["server"], seen["method"]) == ("https", ["app.local", 8080], "POST")
    assert seen["headers"] == [["host", "app.local:8080"], ["x-twice", "1"], ["x-twice", "2"]]
    assert seen["body"] == "hi"
    assert seen["extensions"]["job_id"] == job.job_id
    with pool.open(Request("GET", "/rootless/scope")) as job:
        assert json.loads(b"".join(job))["root_path"] == ""


def test_one_loop_for_the_worker_s_whole_life(pool: Pool) -> None:
    """H3: each job runs on the same event loop."""
    answers = {send(pool, "/loop") for _ in range(5)}
    assert len(answers) == 1
    assert answers.pop().endswith(b" 1")


def test_the_loop_runs_between_jobs(start: Callable[..., Pool], pool: Pool, tmp_path: Path) -> None:
    """H3: what the app has left running on the loop goes on while the worker is idle."""
    send(pool, f"/spawn?seen={tmp_path / 'seen'}")
    wait_until((tmp_path / "seen").exists)
    counting = start(f"{APPS}:poller", workers=1)
    first = int(send(counting, "/"))
    wait_until(lambda: int(send(counting, "/")) > first + 10)


# -- lifespan --------------------------------------------------------------------------------------


def test_lifespan_once_per_worker_and_state_per_request(start: Callable[..., Pool], tmp_path: Path) -> None:
    """H3: start-up before the first job, shutdown at the end; state is copied for each request, shallowly."""
    log = tmp_path / "log"
    pool = start(f"{APPS}:with_lifespan", workers=2, env={"LIFESPAN_LOG": str(log)})
    jobs: dict[int, int] = {}
    for _ in range(20):
        seen = json.loads(send(pool, "/"))
        jobs[seen["pid"]] = jobs.get(seen["pid"], 0) + 1
        assert (seen["own"], seen["shared"]) == (1, jobs[seen["pid"]])
        assert seen["events"] == ["lifespan.startup"]
    pids = [worker.pid for worker in pool.workers()]
    pool.close()
    assert sorted(log.read_text().splitlines()) == sorted(f"lifespan.shutdown {pid}" for pid in pids)


def test_a_recycled_worker_is_shut_down(start: Callable[..., Pool], tmp_path: Path) -> None:
    """H3, W5: a worker that is replaced runs its lifespan's shutdown, too."""
    log = tmp_path / "log"
    pool = start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN_LOG": str(log)}, recycle=Recycle(after_jobs=3))
    for _ in range(7):
        send(pool, "/", lease_timeout=10)
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 2)


def test_a_start_up_that_fails(start: Callable[..., Pool]) -> None:
    """H3, F8: startup.failed is a death in start-up, with the app's message."""
    with pytest.raises(StartError, match="start-up failed: no database"):
        start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN": "fail"})


def test_a_start_up_that_raises_is_no_lifespan(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """H3: the specification has the server go on without a lifespan; what was raised is in the log."""
    pool = start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN": "raise"})
    wait_until(lambda: "ValueError: boom in the lifespan" in log.text)
    with pytest.raises(HandlerRaised, match="shared"):
        send(pool, "/")


def test_a_start_up_that_hangs(start: Callable[..., Pool]) -> None:
    """H3: the start has a time limit, and the error names the lifespan."""
    with pytest.raises(StartError, match=r"not ready 0\.5 s .* lifespan's start-up"):
        start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN": "hang"}, start_timeout=0.5)


def test_a_shutdown_that_hangs(start: Callable[..., Pool]) -> None:
    """H3: the stop has a time limit: then the worker is killed."""
    pool = start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN": "hang at the end"}, stop_timeout=0.3)
    began = time.monotonic()
    pool.close()
    assert 0.3 <= time.monotonic() - began < 3


def test_a_shutdown_that_fails(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """H3: shutdown.failed is told in the log."""
    start(f"{APPS}:with_lifespan", workers=1, env={"LIFESPAN": "fail at the end"}).close()
    assert "lifespan shutdown failed: can't flush" in log.text


def test_threads_of_the_loop_s_executor_end(start: Callable[..., Pool]) -> None:
    """H3: a worker with executor threads exits by itself: a close does not have to wait until it is killed."""
    pool = start(f"{APPS}:threads", workers=1, stop_timeout=60)
    assert b"asyncio" in send(pool, "/")
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 30


# -- bodies ----------------------------------------------------------------------------------------


def pieces(count: int, size: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(size)


@pytest.mark.parametrize("size", [0, 1, 10_000, 40_000, 1_000_000, 30_000_000])
def test_request_bodies(pool: Pool, size: int) -> None:
    """H6: bytes of any size come whole; a small body is one message."""
    counted, messages = send(pool, "/count", bytes(size)).split()
    assert int(counted) == size
    if size <= 32 * 1024:
        assert int(messages) == 1


def test_a_body_of_unknown_length(pool: Pool) -> None:
    """H6: a generator's pieces come as they are given."""
    assert send(pool, "/count", pieces(1000, 5000)).split()[0] == b"5000000"


def test_both_directions_at_once(pool: Pool) -> None:
    """H6: 50 MB go up and come back at once."""
    total = 0
    with pool.open(Request("POST", "/echo", body=pieces(1000, 50_000))) as job:
        for piece in job:
            total += len(piece)
    assert total == 50_000_000


@pytest.mark.parametrize("size", [0, 1, 30_000, 32 * 1024, 32 * 1024 + 1, 5_000_000])
def test_response_bodies(pool: Pool, size: int) -> None:
    """H3: one message of any size comes whole."""
    assert len(send(pool, f"/big?size={size}")) == size


def test_an_early_answer_stops_the_upload(pool: Pool) -> None:
    """H6: a handler that does not read does not have to; its worker serves the next job."""
    assert send(pool, "/hello", pieces(10_000, 50_000)) == b"hello"
    assert send(pool, "/count", b"abc") == b"3 1"


def test_tokens_come_as_they_are_written(pool: Pool) -> None:
    """T10: each piece is there long before the last one is written."""
    with pool.open(Request("GET", "/stream?count=10&pause=0.05")) as job:
        lags = [time.monotonic() - float(piece.split()[1]) for piece in job]
    assert len(lags) == 10
    assert max(lags) < 0.05


def test_the_head_leaves_with_the_first_body_message(pool: Pool) -> None:
    """H3, T10: an empty one is enough."""
    with pool.open(Request("GET", "/head_only"), read_timeout=10) as job:
        assert job.head.status == 202


def test_a_slow_reader_slows_the_app(pool: Pool, tmp_path: Path) -> None:
    """T12, H3: send waits while nobody reads, and then the caller's leaving is heard all the same."""
    written, stopped = tmp_path / "written", tmp_path / "stopped"
    with pool.open(Request("GET", f"/endless?written={written}&stopped={stopped}")) as job:
        job.read()
        wait_until(written.exists)
        reached = -1
        while (now := int(written.read_text() or 0)) != reached:
            reached = now
            time.sleep(0.05)
        assert reached < 1_000_000
    wait_until(lambda: stopped.exists() and stopped.read_text() in ("CallerGone", "CancelledError"))
    assert send(pool, "/hello", lease_timeout=10) == b"hello"


# -- the caller leaves -----------------------------------------------------------------------------


def leave(pool: Pool, target: str, begun: Path) -> None:
    """Open a job, and cancel it once its handler runs."""
    with CancelScope() as scope:

        def cancel() -> None:
            wait_until(begun.exists)
            scope.cancel("the user left")

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(JobClosed):
            pool.open(Request("GET", f"{target}begun={begun}"))
        thread.join()


def test_disconnect_is_heard_and_send_raises(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3, C4, H3: receive gives http.disconnect, send raises OSError, and the worker lives on."""
    pool = start(f"{APPS}:app", workers=1, grace=30)
    leave(pool, f"/listen?seen={tmp_path / 'seen'}&", tmp_path / "begun")
    pid = pool.workers()[0].pid
    assert send(pool, "/hello") == b"hello"
    assert (tmp_path / "seen").read_text() == f"http.disconnect True {pid}"


def test_a_deaf_app_s_task_is_cancelled(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3: an app that does not listen has its task cancelled within the grace time, and its worker lives on."""
    pool = start(f"{APPS}:app", workers=1, grace=2)
    pid = pool.workers()[0].pid
    leave(pool, f"/sleep?seen={tmp_path / 'seen'}&", tmp_path / "begun")
    assert json.loads(send(pool, "/scope"))["pid"] == pid
    assert (tmp_path / "seen").read_text() == "cancelled"


@pytest.mark.parametrize("how", ["stubborn", "block"])
def test_an_app_that_will_not_end_is_killed(start: Callable[..., Pool], tmp_path: Path, how: str) -> None:
    """C3: one that swallows its cancellation, or blocks its loop, costs its worker."""
    pool = start(f"{APPS}:app", workers=1, grace=0.1)
    leave(pool, f"/{how}?", tmp_path / "begun")
    wait_gone([int((tmp_path / "begun").read_text())], 5)
    assert send(pool, "/hello", lease_timeout=10) == b"hello"


def test_a_late_cancel_touches_no_other_job(start: Callable[..., Pool]) -> None:
    """C5: jobs that are left at random moments, and the ones after them, which are never the ones to suffer."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    pool = start(f"{APPS}:app", workers=1, grace=30)
    pid = pool.workers()[0].pid
    for _ in range(500):
        job = pool.open(Request("GET", "/stream?count=3&pause=0"))
        for _ in range(rng.randrange(5)):
            job.read()
        job.close()
        for _ in range(rng.randrange(3)):
            assert send(pool, "/hello") == b"hello"
    assert [worker.pid for worker in pool.workers()] == [pid]


def test_two_listeners(pool: Pool, tmp_path: Path) -> None:
    """H3: two tasks of an app may receive at once."""
    seen = tmp_path / "seen"
    send(pool, f"/two_listeners?seen={seen}", b"body")
    wait_until(lambda: seen.exists() and bool(seen.read_text()))
    assert seen.read_text() == "http.disconnect http.request"


# -- background work -------------------------------------------------------------------------------


def test_background_work_keeps_the_worker_busy(pool: Pool, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """H3: the caller has the whole response at once; the worker takes its next job when the work is done."""
    first = send(pool, f"/background?go={tmp_path / 'go'}")
    assert (pool.stats().idle, pool.stats().busy) == (0, 1)
    (tmp_path / "go").touch()
    assert json.loads(send(pool, "/scope"))["pid"] == int(first)
    assert pool.stats().outcomes == {"ok": 2}
    assert "the background work is done" in log.text


def test_background_work_that_raises(pool: Pool, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """H3, F1: the caller's response is whole, the log has the traceback, the worker lives."""
    first = send(pool, f"/background?go={tmp_path / 'go'}&then=raise")
    (tmp_path / "go").touch()
    assert json.loads(send(pool, "/scope"))["pid"] == int(first)
    assert "the handler raised after its response" in log.text
    assert "ValueError: boom in the background" in log.text


def test_background_work_that_kills_its_worker(pool: Pool, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """F3: nobody's response suffers, and it is told in the log."""
    send(pool, f"/background?go={tmp_path / 'go'}&then=SIGSEGV")
    (tmp_path / "go").touch()
    assert send(pool, "/hello", lease_timeout=10) == b"hello"
    assert "SIGSEGV during its background work" in log.text
    assert pool.stats().outcomes == {"ok": 2}


def test_background_work_over_the_time_limit(
    start: Callable[..., Pool], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """F5, W12: the limit holds for it as well: stacks are logged, and the worker is killed."""
    pool = start(f"{APPS}:app", workers=1, limits=Limits(wall_seconds=0.3))
    pid = int(send(pool, f"/background?go={tmp_path / 'never'}"))
    assert send(pool, "/hello", lease_timeout=10) == b"hello"
    wait_gone([pid], 5)
    assert "in its background work the job took longer than 0.3 s" in log.text
    assert "do_background" in log.text


def test_a_blocked_loop_shows_where(start: Callable[..., Pool], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """W12: a job over its time whose app blocks the event loop: the log has the thread's stack, and the true reason."""
    pool = start(f"{APPS}:app", workers=1, limits=Limits(wall_seconds=0.3), grace=0.2)
    with pytest.raises(JobTimedOut):
        send(pool, f"/block?begun={tmp_path / 'begun'}")
    assert send(pool, "/hello", lease_timeout=20) == b"hello"
    assert "in do_block" in log.text
    assert "the job took longer than 0.3 s, and its handler did not end" in log.text
    assert "its caller has left" not in log.text


def test_background_work_and_close(pool: Pool, tmp_path: Path) -> None:
    """W11: a close waits for background work as for any job, and kills it when the drain time is over."""
    pid = int(send(pool, f"/background?go={tmp_path / 'never'}"))
    pool.close(drain=0.1)
    assert is_gone(pid)
    with pytest.raises(PoolClosed):
        send(pool, "/hello")


def test_background_work_is_drained(pool: Pool, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """W11: background work that ends in the drain time ends by itself."""
    send(pool, f"/background?go={tmp_path / 'go'}")
    (tmp_path / "go").touch()
    pool.close(drain=30)
    assert "the background work is done" in log.text


@pytest.mark.parametrize("rounds", [0, 1, 3, 7, 8, 9, 20, 100])
def test_an_app_that_takes_its_time_to_return(pool: Pool, rounds: int) -> None:
    """H3: whether the end goes out with the last bytes or after them, the next job is always served."""
    for _ in range(20):
        assert send(pool, f"/patient?rounds={rounds}") == b"patient"
    assert pool.stats().deaths == 0


# -- faults ----------------------------------------------------------------------------------------


def test_an_app_that_raises(pool: Pool) -> None:
    """F1: before the head and after it."""
    with pytest.raises(HandlerRaised, match="boom from the app"):
        send(pool, "/raise")
    with pool.open(Request("GET", "/raise_late")) as job:
        assert job.read() == b"first"
        with pytest.raises(HandlerRaised, match="boom after the head"):
            job.read()
    assert send(pool, "/hello") == b"hello"


def test_abort_in_an_app(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """F2: AbortHandler, also out of a task group: an unexpected end, and no log."""
    with pool.open(Request("GET", "/abort")) as job:
        assert job.head.status == 200
        with pytest.raises(HandlerAborted):
            job.read()
    assert [r for r in log.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("late", ["", "1"])
def test_a_death_in_an_app(pool: Pool, late: str) -> None:
    """F3: told as that of any other worker."""
    with pytest.raises(WorkerDied, match="SIGSEGV"):
        send(pool, f"/die?late={late}")
    assert send(pool, "/hello", lease_timeout=10) == b"hello"


def test_system_exit(pool: Pool) -> None:
    """F1: it ends the job; raised in another task, it ends that; the worker lives."""
    pid = pool.workers()[0].pid
    with pytest.raises(HandlerRaised, match="SystemExit"):
        send(pool, "/exit")
    assert send(pool, "/exit_in_task") == b"still here"
    assert [worker.pid for worker in pool.workers()] == [pid]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/nothing", "without having sent http.response.start"),
        ("/half", "before the end of its response"),
        ("/wrong?what=body_first", "before http.response.start"),
        ("/wrong?what=two_heads", "second time"),
        ("/wrong?what=unknown", "websocket.send"),
        ("/wrong?what=text", "must be bytes"),
        ("/wrong?what=status", "status"),
        ("/wrong?what=header", "not a token"),
    ],
)
def test_an_app_that_breaks_the_protocol(pool: Pool, target: str, words: str) -> None:
    """H3: it is the app's error, and says what was wrong."""
    with pytest.raises(HandlerRaised, match=words):
        send(pool, target)
    assert send(pool, "/hello") == b"hello"


def test_a_message_after_the_end(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """H3: the caller has its whole response; the app's mistake is in the log."""
    assert send(pool, "/wrong?what=after_end") == b""
    assert send(pool, "/hello") == b"hello"
    assert "the response has ended" in log.text


def test_trailers_are_ignored(pool: Pool) -> None:
    """H3: trailers go nowhere, and do no harm."""
    assert send(pool, "/trailers") == b"body"
    assert send(pool, "/hello") == b"hello"


@pytest.mark.parametrize("query", ["", "?raise"])
def test_a_body_that_is_too_short(pool: Pool, query: str) -> None:
    """H5: an error to the caller, whatever the app does after its end."""
    with pytest.raises(BodyIncomplete, match="5 bytes short"):
        send(pool, f"/short{query}")
    assert send(pool, "/hello") == b"hello"


def test_an_app_that_blocks_after_its_last_byte(pool: Pool, tmp_path: Path) -> None:
    """T10: the caller has had all bytes by then; only the end has to wait."""
    with pool.open(Request("GET", f"/block_at_the_end?go={tmp_path / 'go'}"), read_timeout=20) as job:
        assert job.read() == b"all of it"
        (tmp_path / "go").touch()
        assert job.read() == b""


@pytest.mark.parametrize(
    ("what", "limits", "words"),
    [
        ("cpu", Limits(cpu_seconds=0.3), "processor time"),
        ("memory", Limits(memory="150MiB"), "over its limit of 150 MiB"),
    ],
)
def test_background_work_over_its_limits(
    start: Callable[..., Pool], log: pytest.LogCaptureFixture, what: str, limits: Limits, words: str
) -> None:
    """F4, F5, W6: the limits of a job hold for its background work."""
    pool = start(f"{APPS}:app", workers=1, limits=limits)
    pid = int(send(pool, f"/greedy?what={what}"))
    assert send(pool, "/hello", lease_timeout=20) == b"hello"
    wait_gone([pid], 5)
    assert words in log.text
    assert "background work" in log.text
