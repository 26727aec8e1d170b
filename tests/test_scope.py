"""runner.model.cancel_scope and cancels: who is freed when, what the handler sees, and whose worker dies."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from requests.exceptions import ChunkedEncodingError, ReadTimeout
from requests.exceptions import ConnectionError as RequestsConnectionError

from runner import (
    CancelScope,
    ConfigurationError,
    DeadlineExceeded,
    JobClosed,
    Pool,
    Request,
)
from tests.processes import is_gone, wait_gone
from transport.requests import Transport

URL = "http://app.local"


class UserLeft(Exception):
    """A cause of the tests' own."""


def get(pool: Pool, target: str, body: object = None) -> bytes:
    with pool.open(Request("POST", target, body=body)) as job:  # type: ignore[arg-type]
        return b"".join(job)


class Caller(threading.Thread):
    """Makes a call in a scope of its own on another thread; `outcome` is what came of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call
        self.scope = CancelScope()
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            with self.scope:
                self.outcome = self.call()
        except BaseException as error:
            self.outcome = error

    def cancel(self) -> None:
        """Cancel, and see that the caller is freed with the cause."""
        cause = UserLeft("the user has left")
        self.scope.cancel(cause)
        self.join(10)
        assert not self.is_alive()
        assert isinstance(self.outcome, JobClosed)
        assert self.outcome.__cause__ is cause
        assert "the user has left" in str(self.outcome)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_cancel_before_the_lease(pool: Pool) -> None:
    """C1, C2: a scope that was cancelled lets nothing begin."""
    with CancelScope() as scope:
        scope.cancel(UserLeft("early"))
        with pytest.raises(JobClosed, match="early"):
            get(pool, "/hello")
    assert get(pool, "/hello") == b"hello"


def test_a_cancel_while_queued(start: Callable[..., Pool]) -> None:
    """C1, C2: a caller that waits for a worker is freed at once, and takes none from the next one."""
    pool = start(workers=1)
    with pool.open(Request("GET", "/endless")):
        caller = Caller(lambda: get(pool, "/hello"))
        while not pool._leases._waiters:
            time.sleep(0.001)
        caller.cancel()
        assert not pool._leases._waiters
    assert get(pool, "/hello") == b"hello"


def test_a_cancel_before_the_head(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C2, C3: the caller is freed, the handler is told, and its worker stays warm."""
    pool = start(workers=1, grace=10)
    pid = get(pool, "/pid")
    caller = Caller(lambda: get(pool, f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"))
    wait_for(tmp_path / "here")
    caller.cancel()
    assert get(pool, "/pid") == pid


def test_a_cancel_in_the_body(start: Callable[..., Pool]) -> None:
    """C2, C3: never a clean end; a handler that streams without end stops where it is."""
    pool = start(workers=1, grace=10)
    pid = get(pool, "/pid")
    pieces: list[bytes] = []

    def call() -> None:
        with pool.open(Request("GET", "/endless")) as job:
            pieces.extend(job)

    caller = Caller(call)
    while not pieces:
        time.sleep(0.001)
    caller.cancel()
    assert get(pool, "/pid") == pid


def test_a_cancel_in_the_upload(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C2, H6: the source is closed, and the handler that reads is told."""
    pool = start(workers=1, grace=10)
    pid = get(pool, "/pid")
    closed, pulled = threading.Event(), threading.Event()

    def body() -> Iterator[bytes]:
        try:
            while True:
                pulled.set()
                yield b"x" * 10_000
        finally:
            closed.set()

    caller = Caller(lambda: get(pool, "/count", body()))
    assert pulled.wait(10)
    caller.cancel()
    assert closed.is_set()
    assert get(pool, "/pid") == pid


def test_a_cancel_at_the_very_end(start: Callable[..., Pool]) -> None:
    """C5: a cancel after the job's end touches nothing, not the body that has come, not the next job."""
    pool = start(workers=1)
    with CancelScope() as scope, pool.open(Request("GET", "/hello")) as job:
        assert job.read() == b"hello"
        while not job.settled:
            job.read()
        scope.cancel(UserLeft())
        assert job.read() == b""
    pid = get(pool, "/pid")
    assert get(pool, "/pid") == pid


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cancels_at_random_instants(start: Callable[..., Pool]) -> None:
    """I5, C5: 10,000 cancels at random instants: each call is right or cancelled, and all workers are free after it."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start(workers=2, preload=True)
    right = cancelled = 0
    for number in range(10_000):
        data = b"%d" % number * 50
        scope = CancelScope()
        canceller = threading.Timer(chance.random() * 0.0015, scope.cancel, (UserLeft(),))
        canceller.start()
        try:
            with scope:
                assert get(pool, chance.choice(["/mirror", "/echo_body", "/slow_mirror"]), data) == data
            right += 1
        except JobClosed as error:
            assert isinstance(error.__cause__, UserLeft)
            cancelled += 1
        canceller.join()
    print("right", right, "cancelled", cancelled)
    assert min(right, cancelled) > 100
    deadline = time.monotonic() + 10
    while len(pool._leases.idle()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for number in range(20):
        assert get(pool, "/mirror", b"%d" % number) == b"%d" % number


def test_a_deadline_while_reading(start: Callable[..., Pool]) -> None:
    """C1: when the scope's time is up, the call ends with DeadlineExceeded as its cause."""
    pool = start(workers=1)
    with CancelScope(timeout=0.1), pytest.raises(JobClosed, match=r"0\.1 s is up") as caught:
        get(pool, "/never_read")
    assert isinstance(caught.value.__cause__, DeadlineExceeded)
    assert get(pool, "/hello") == b"hello"


def test_a_deadline_while_queued(start: Callable[..., Pool]) -> None:
    """C1: the same for a caller that waits for a worker."""
    pool = start(workers=1)
    with (
        pool.open(Request("GET", "/endless")),
        CancelScope(timeout=0.05),
        pytest.raises(JobClosed, match="is up"),
    ):
        get(pool, "/hello")


def test_the_handler_sees_the_deadline(pool: Pool) -> None:
    """T6: the nearest deadline travels as trusted context, as Unix time."""
    import json

    with CancelScope(timeout=60), CancelScope(timeout=120):
        seen = json.loads(get(pool, "/echo"))
    assert 50 < seen["context"]["deadline"] - time.time() <= 60


def test_scopes_nest(pool: Pool) -> None:
    """C1: cancelling an outer scope ends the inner one's jobs, not the other way round."""
    with CancelScope() as outer:
        with CancelScope() as inner:
            inner.cancel("only this")
            with pytest.raises(JobClosed, match="only this"):
                get(pool, "/hello")
        assert get(pool, "/hello") == b"hello"
        with CancelScope() as second:
            outer.cancel(UserLeft("all"))
            assert second.cancelled
            with pytest.raises(JobClosed, match="all"):
                get(pool, "/hello")
    assert get(pool, "/hello") == b"hello"


def test_a_job_keeps_its_scope(pool: Pool) -> None:
    """C1: a job belongs to the scope it was opened in, also after its block."""
    with CancelScope() as scope:
        job = pool.open(Request("GET", "/endless"))
    job.read()
    scope.cancel(UserLeft("later"))
    with pytest.raises(JobClosed, match="later"):
        b"".join(job)


def test_the_first_cause_stands() -> None:
    """C2: cancelling again changes nothing; a scope is entered once."""
    scope = CancelScope()
    first = UserLeft()
    scope.cancel(first)
    scope.cancel(UserLeft())
    assert scope.cause is first
    with scope, pytest.raises(RuntimeError, match="once"), scope:
        pass
    with pytest.raises(ConfigurationError):
        CancelScope(timeout=-1)


@pytest.mark.parametrize(
    ("timeout", "before", "after"),
    [(None, RequestsConnectionError, ChunkedEncodingError), (0.2, ReadTimeout, ChunkedEncodingError)],
)
def test_scopes_serve_requests(
    pool: Pool, timeout: float | None, before: type[Exception], after: type[Exception]
) -> None:
    """C1, C2: through requests, before the head and after it, with the cause in the error's words."""
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        for target, kind in (("/never_read", before), ("/stream?count=2&pause=600", after)):
            with CancelScope(timeout) as scope:
                if timeout is None:
                    threading.Timer(0.1, scope.cancel, (UserLeft("gone"),)).start()
                with pytest.raises(kind, match=r"gone|is up"):
                    session.get(URL + target)
        assert session.get(URL + "/hello").text == "hello"


def test_what_a_native_handler_sees(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3: JobCancelled is raised in it, request.cancelled is true, and its clean-up runs."""
    pool = start(workers=1, grace=10)
    pid = get(pool, "/pid")
    caller = Caller(lambda: get(pool, f"/clean_up?place={tmp_path}"))
    wait_for(tmp_path / "running")
    caller.cancel()
    wait_for(tmp_path / "cleaned")
    assert (tmp_path / "cleaned").read_text() == "JobCancelled True"
    assert get(pool, "/pid") == pid


def test_what_a_wsgi_app_sees(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3: an exception in the running app, and close() on its iterable."""
    pool = start("tests.wsgi_apps:patient", workers=1, grace=10)
    caller = Caller(lambda: get(pool, f"/{tmp_path}"))
    wait_for(tmp_path / "running")
    caller.cancel()
    wait_for(tmp_path / "closed")
    assert (tmp_path / "raised").read_text() == "JobCancelled"


def test_a_handler_that_does_not_listen(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3: after the grace time the worker is killed, one that swallows the exception or spins as well."""
    for target in ("/swallow", "/spin"):
        pool = start(workers=1, grace=0.1)
        pid = int(get(pool, "/pid"))
        caller = Caller(lambda pool=pool, target=target: get(pool, f"{target}?here={tmp_path / target[1:]}"))  # type: ignore[misc]
        wait_for(tmp_path / target[1:])
        caller.cancel()
        wait_gone([pid], 20)
        assert get(pool, "/hello") == b"hello"


@pytest.mark.parametrize("how", ["plain", "session", "double"])
def test_what_a_cancelled_job_has_started(start: Callable[..., Pool], tmp_path: Path, how: str) -> None:
    """C3, I8: a worker that is killed takes all that its job has started with it, within a second."""
    pool = start(workers=1, grace=0)
    worker = int(get(pool, "/pid"))
    caller = Caller(lambda: get(pool, f"/spawn_and_hang?how={how}&here={tmp_path / 'pid'}"))
    wait_for(tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    assert not is_gone(pid)
    caller.cancel()
    wait_gone([worker, pid], 1)
    assert get(pool, "/hello") == b"hello"


def test_a_reader_that_has_all_it_wants(start: Callable[..., Pool]) -> None:
    """C4: a client that stops at the last event does not cost a worker, 200 times."""
    pool = start(workers=1)
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        pid = session.get(URL + "/pid").text
        for _ in range(200):
            with session.get(URL + "/stream?count=3&pause=0", stream=True) as response:
                for line in response.iter_lines():
                    if line.startswith(b"data: 2"):
                        break
        assert session.get(URL + "/pid").text == pid


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_secret_reaches_the_next_job(start: Callable[..., Pool]) -> None:
    """I4: a job times out and writes a secret then; the next one never sees it, 10,000 times, at random."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start(workers=1, grace=0.5)
    for number in range(10_000):
        with CancelScope(timeout=chance.random() * 0.003):
            try:
                get(pool, f"/late_secret?pause={chance.random() * 0.003}", b"secret")
            except JobClosed:
                pass
        assert get(pool, "/mirror", b"%d" % number) == b"%d" % number


def test_a_blocked_reader_and_a_closer(start: Callable[..., Pool]) -> None:
    """I6: one thread blocked in a read, another closes: both return, and the job is gone, 50 times."""
    pool = start(workers=1, grace=0)
    for _ in range(50):
        job = pool.open(Request("GET", "/stream?count=2&pause=600"))
        pid = job._worker.pid
        job.read()
        outcome: list[BaseException] = []

        def read(job: object = job, outcome: list[BaseException] = outcome) -> None:
            try:
                job.read()  # type: ignore[attr-defined]
            except JobClosed as error:
                outcome.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        while job._user is None:
            time.sleep(0.0005)
        job.close()
        reader.join(1)
        assert outcome
        assert pid
        wait_gone([pid], 1)
