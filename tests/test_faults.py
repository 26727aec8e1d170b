"""What a caller sees when a job ends badly, before the head and after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from runner import (
    BodyIncomplete,
    HandlerAborted,
    HandlerRaised,
    JobFailed,
    Pool,
    Request,
    StartError,
    WorkerDied,
    WorkersUnavailable,
)
from transport.requests import Transport

URL = "http://app.local"


@pytest.fixture
def session(pool: Pool) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        yield session


def get(pool: Pool, target: str) -> tuple[int, bytes]:
    with pool.open(Request("GET", target)) as job:
        return job.head.status, b"".join(job)


def test_a_handler_that_raises(session: requests.Session, log: pytest.LogCaptureFixture) -> None:
    """F1: before the head a 500 as problem+json; the traceback is in the log under the job's id, not in the body."""
    response = session.get(URL + "/raise")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-should-retry"] == "false"
    problem = response.json()
    assert (problem["fault"], problem["status"], problem["title"]) == ("raised", 500, "Internal Server Error")
    assert problem["detail"] == "the handler raised an exception"
    assert "boom" not in response.text
    (record,) = (record for record in log.records if record.name == "blastdoor")
    assert problem["job_id"] in record.message
    assert record.__dict__["job_id"] == problem["job_id"]
    assert record.__dict__["worker"] > 0
    assert "ValueError: boom from the handler" in record.message
    assert "in do_raise" in record.message


def test_a_handler_that_raises_in_the_body(session: requests.Session, log: pytest.LogCaptureFixture) -> None:
    """F1: after the head a body-read error that names the failure."""
    with session.get(URL + "/raise_late", stream=True) as response:
        assert response.status_code == 200
        chunks = response.iter_content(1024)
        assert next(chunks) == b"first piece"
        with pytest.raises(ChunkedEncodingError, match="the handler raised ValueError: boom after the head"):
            next(chunks)
    assert "in do_raise_late" in log.text


def test_a_raise_does_not_cost_the_worker(start: Callable[..., Pool]) -> None:
    """F1: the worker that ran a handler that raised goes on, SystemExit and KeyboardInterrupt included."""
    pool = start(workers=1)
    pid = get(pool, "/pid")
    for path in ("/raise", "/raise_late", "/system_exit", "/abort", "/abort_late", "/unprintable"):
        with pytest.raises((HandlerRaised, HandlerAborted)):
            get(pool, path)
    assert get(pool, "/pid") == pid


def test_debug_mode_tells_the_traceback(start: Callable[..., Pool]) -> None:
    """F1: in debug mode, and only there, the caller is told all."""
    with requests.Session() as session:
        session.mount(URL, Transport(start(debug=True)))
        problem = session.get(URL + "/raise").json()
    assert "in do_raise" in problem["traceback"]
    assert problem["error"] == "the handler raised ValueError: boom from the handler"


@pytest.mark.parametrize("path", ["/abort", "/abort_late"])
def test_a_handler_that_aborts(session: requests.Session, log: pytest.LogCaptureFixture, path: str) -> None:
    """F2: 200, then an unexpected end, and nothing in the log."""
    with session.get(URL + path, stream=True) as response:
        assert response.status_code == 200
        with pytest.raises(ChunkedEncodingError, match="cut the response off"):
            response.content  # noqa: B018
    assert log.records == []


DEATHS = [
    ("segfault", None, "SIGSEGV"),
    ("exit", 3, None),
    ("exit0", 0, None),
    ("c_exit", 4, None),
    ("SIGKILL", None, "SIGKILL"),
    ("SIGABRT", None, "SIGABRT"),
    ("SIGTERM", None, "SIGTERM"),
]


@pytest.mark.parametrize(("how", "exit_code", "signal"), DEATHS)
def test_a_worker_that_dies(
    session: requests.Session, log: pytest.LogCaptureFixture, how: str, exit_code: int | None, signal: str | None
) -> None:
    """F3, W7: before the head a 500 with exit code or signal, and the worker's last words in the log."""
    response = session.get(f"{URL}/die?how={how}", timeout=30)
    assert response.status_code == 500
    problem = response.json()
    assert problem["fault"] == "died"
    assert problem.get("exit_code") == exit_code
    assert problem.get("signal") == signal
    assert response.headers["x-should-retry"] == "false"
    (record,) = (record for record in log.records if record.name == "blastdoor")
    assert problem["job_id"] in record.message
    assert "last words" in record.message
    assert session.get(URL + "/hello").text == "hello"


@pytest.mark.parametrize(("how", "exit_code", "signal"), DEATHS)
def test_a_worker_that_dies_in_the_body(
    session: requests.Session, how: str, exit_code: int | None, signal: str | None
) -> None:
    """F3, W7: after the head a body-read error, never a clean end."""
    with session.get(f"{URL}/die?late=1&how={how}", stream=True, timeout=30) as response:
        assert response.status_code == 200
        chunks = response.iter_content(1024)
        assert next(chunks) == b"first piece"
        expected = signal or f"code {exit_code}"
        with pytest.raises(ChunkedEncodingError, match=expected):
            next(chunks)
    assert session.get(URL + "/hello").text == "hello"


def test_a_segfault_leaves_its_stack(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """F3: faulthandler's stack stands in the log with the job's id."""
    with pytest.raises(WorkerDied) as caught:
        get(pool, "/die?how=segfault")
    (record,) = (record for record in log.records if record.name == "blastdoor")
    assert caught.value.fault.job_id in record.message
    assert "Segmentation fault" in record.message
    assert "in do_die" in record.message


def test_a_short_body_is_a_fault(session: requests.Session, pool: Pool) -> None:
    """H5: a body shorter than its Content-Length is a body-read error."""
    with session.get(URL + "/content?length=10&body=short", stream=True) as response:
        assert response.status_code == 200
        with pytest.raises(ChunkedEncodingError, match="5 bytes short"):
            response.content  # noqa: B018
    with pool.open(Request("GET", "/content?length=10&body=short")) as job:
        assert job.read() == b"short"
        with pytest.raises(BodyIncomplete):
            job.read()


def test_faults_before_the_head_of_a_head_request(session: requests.Session) -> None:
    """H5, F1: the answer to HEAD has no body, a fault's neither."""
    response = session.head(URL + "/raise")
    assert (response.status_code, response.content) == (500, b"")
    assert int(response.headers["content-length"]) > 0


def start_error(handler: Any, **settings: Any) -> str:
    pool = Pool(handler, workers=2, **settings)
    with pytest.raises(StartError) as caught:
        pool.start()
    pool.close()
    return str(caught.value)


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("nowhere.to_be:found", "there is no module 'nowhere'"),
        ("tests.nowhere:found", "there is no module 'tests.nowhere'"),
        ("tests.handlers:nothing", "has no 'nothing'"),
        ("tests.handlers:DEATH.x", "has no 'DEATH.x'"),
        ("tests.handlers:__doc__", "can't be called"),
        ("tests.bad_handlers.raises:app", "RuntimeError: the import went wrong"),
        ("tests.bad_handlers.imports_nothing:app", "No module named 'a_module_that_is_not_there'"),
        ("tests.bad_handlers.exits:app", "SystemExit"),
        ("tests.bad_handlers.dies:app", "code 5"),
        ("tests.bad_handlers.crashes:app", "SIGSEGV"),
        ("tests.bad_handlers.kinds:one_argument", "takes the arguments (request"),
        ("tests.bad_handlers.kinds:unknown", "say kind='native', 'wsgi' or 'asgi'"),
        ("tests.bad_handlers.kinds:coroutine", "takes the arguments"),
    ],
)
def test_a_handler_that_can_not_be_loaded(handler: str, words: str, preload: bool) -> None:
    """F8, H4: start() raises with the worker's own traceback, and nothing is left."""
    assert words in start_error(handler, preload=preload)


def test_the_worker_s_own_traceback() -> None:
    """F8: the error shows where in the handler's module the import went wrong."""
    text = start_error("tests.bad_handlers.raises:app")
    assert "raises.py" in text
    assert "line 5" in text


@pytest.mark.parametrize(("handler", "kind"), [("tests.handlers:app", "wsgi"), ("tests.wsgi_apps:simple", "native")])
def test_a_kind_that_does_not_fit(handler: str, kind: str) -> None:
    """H4: a handler that shows another kind than the one given is refused at start."""
    assert "looks like a" in start_error(handler, kind=kind)


def test_preload_refuses_threads() -> None:
    """W2: an import that starts threads can't be preloaded, since a fork would lose them."""
    text = start_error("tests.bad_handlers.threads:app", preload=True)
    assert "preload=False" in text
    with Pool("tests.bad_handlers.threads:app", workers=1) as pool:
        assert get(pool, "/") == (200, b"threaded")


def test_a_start_that_hangs(log: pytest.LogCaptureFixture) -> None:
    """F8: a worker that is not ready in time is killed, and start() says so."""
    assert "not ready 0.3 s after its start" in start_error("tests.bad_handlers.hangs:app", start_timeout=0.3)


def test_a_start_that_writes_to_the_response_pipe() -> None:
    """F6: garbage in place of READY is told, and the worker is killed."""
    assert "not READY" in start_error("tests.bad_handlers.garbles:app")


def test_workers_that_can_not_start_any_more(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """F8: later deaths in start-up are braked: 503 with Retry-After, few tries, and back by itself."""
    broken, starts = tmp_path / "broken", tmp_path / "starts"
    os.environ["BLASTDOOR_TEST_DIR"] = str(tmp_path)
    try:
        with Pool("tests.bad_handlers.sometimes:app", workers=2) as pool, requests.Session() as session:
            session.mount(URL, Transport(pool))
            assert len(starts.read_text()) == 2
            broken.touch()
            for _ in range(2):
                assert session.get(URL + "/die").status_code == 500
            deadline = time.monotonic() + 30
            while (response := session.get(URL + "/", timeout=(30, 30))).status_code != 503:
                assert time.monotonic() < deadline
            assert response.json()["fault"] == "unavailable"
            assert int(response.headers["retry-after"]) >= 1
            assert "x-should-retry" not in response.headers
            with pytest.raises(WorkersUnavailable):
                get(pool, "/")
            assert len(starts.read_text()) <= 2 + 6  # the budget of five, and at most one more try
            broken.unlink()
            while (response := session.get(URL + "/", timeout=(30, 30))).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # what a client does after a 503
            assert response.text == "sometimes"
            assert "the import is broken for now" in log.text
            assert "next try in" in log.text
    finally:
        del os.environ["BLASTDOOR_TEST_DIR"]


@pytest.mark.parametrize("late", ["", "late=1"])
def test_exceptions_that_can_not_be_shown(session: requests.Session, pool: Pool, late: str) -> None:
    """I9: an exception that can't be pickled or printed is a fault like any other, in every phase."""
    if late:
        with pytest.raises(HandlerRaised, match="Unprintable"):
            get(pool, "/unprintable?late=1")
    else:
        response = session.get(URL + "/unprintable", timeout=30)
        assert response.status_code == 500
        assert response.json()["detail"] == "the handler raised an exception"
    assert session.get(URL + "/hello").text == "hello"


def test_objects_that_can_not_be_pickled_at_import(start: Callable[..., Pool]) -> None:
    """I9: an import that raises such an exception is told, and nothing hangs."""
    assert "Unprintable" in start_error("tests.bad_handlers.unprintable:app")


def test_return_values_that_are_no_body(start: Callable[..., Pool]) -> None:
    """I9: what a handler returns is never pickled: all but bytes is the handler's own error."""

    def handler(request: Any, response: Any) -> Any:
        return lambda: (yield)

    pool = start(handler, workers=1)
    with pytest.raises(HandlerRaised, match="returned a function"):
        get(pool, "/")


def test_bodies_of_the_wrong_type(start: Callable[..., Pool]) -> None:
    """I9: writing what is no bytes is the handler's own error."""

    def handler(request: Any, response: Any) -> None:
        response.write(request.query)

    with pytest.raises(JobFailed, match="TypeError"):
        get(start(handler), "/?text")
