"""runner.worker.handlers.async_native: `async def handler(request, response)`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import HandlerRaised, JobContext, Pool, Request
from tests.waiting import wait_until

HANDLERS = "tests.async_handlers"


def send(pool: Pool, target: str, body: Any = None, **settings: Any) -> bytes:
    with pool.open(Request("POST", target, [("X-A", "1")], body), **settings) as job:
        return b"".join(job)


@pytest.fixture
def pool(start: Callable[..., Pool]) -> Pool:
    """A pool of one worker with the async native handlers."""
    return start(f"{HANDLERS}:app", workers=1)


@pytest.mark.parametrize("handler", ["app", "called"])
def test_the_kind_is_found(start: Callable[..., Pool], handler: str) -> None:
    """H1, H4: a coroutine function of (request, response), or an object that is called as one."""
    assert send(start(f"{HANDLERS}:{handler}", workers=1), "/hello") in (b"hello", b"called")


def test_a_coroutine_function_by_value(start: Callable[..., Pool]) -> None:
    """H1, W2: sent by value as any callable."""

    async def handler(request: Any, response: Any) -> bytes:
        body: bytes = await request.body.read()
        return b"by value " + body

    assert send(start(handler, workers=1), "/", b"x") == b"by value x"


def test_request_and_response(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """H1, T6, T9: the native interface, to be awaited; the first head wins."""
    context = JobContext(delegated_api_key_id="key-1")
    with pool.open(Request("PUT", "/a/show?b=c", [("X-A", "1"), ("x-a", "2")], "bödy"), context=context) as job:
        assert (job.head.status, job.head.headers) == (203, [("x-multi", "1"), ("x-multi", "2")])
        seen = json.loads(b"".join(job))
    assert (seen["method"], seen["path"], seen["query"], seen["body"]) == ("PUT", "/a/show", "b=c", "bödy")
    assert seen["headers"] == [["X-A", "1"], ["x-a", "2"]]
    assert (seen["key"], seen["cancelled"]) == ("key-1", False)
    again = json.loads(send(pool, "/show"))
    assert (again["loop"], again["pid"]) == (seen["loop"], seen["pid"])
    assert "a second head, with status 500, was ignored" in log.text
    assert "'x-late' was set after the head" in log.text


def test_pieces_come_and_go(pool: Pool) -> None:
    """H6, T10: 20 MB through a handler that gives back each piece."""
    total = 0
    with pool.open(Request("POST", "/echo", body=(bytes(50_000) for _ in range(400)))) as job:
        for piece in job:
            total += len(piece)
    assert total == 20_000_000


def test_a_caller_that_leaves(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C3: the handler's task is cancelled, and its worker lives on."""
    pool = start(f"{HANDLERS}:app", workers=1, grace=30)
    pid = pool.workers()[0].pid
    with pool.open(Request("GET", f"/sleep?seen={tmp_path / 'seen'}")) as job:
        assert job.read() == b"begun"
    wait_until((tmp_path / "seen").exists)
    assert send(pool, "/hello") == b"hello"
    assert (tmp_path / "seen").read_text() == "cancelled True"
    assert [worker.pid for worker in pool.workers()] == [pid]


def test_faults(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """F1: what it raises, and what it returns that is no body, is the job's failure."""
    with pytest.raises(HandlerRaised, match="boom from a coroutine"):
        send(pool, "/raise")
    with pytest.raises(HandlerRaised, match="returned a str"):
        send(pool, "/text")
    assert sum(record.levelno == logging.ERROR for record in log.records) == 2
    assert send(pool, "/hello") == b"hello"


@pytest.mark.parametrize("handler", ["optional", "synchronous"])
def test_shapes_of_functions(start: Callable[..., Pool], handler: str) -> None:
    """H4: a third argument with a default makes no ASGI app, a wrapped coroutine function that is run no coroutine."""
    pool = start(f"{HANDLERS}:{handler}", workers=1)
    assert send(pool, "/") == handler.encode()


def test_a_task_that_reads_on(pool: Pool) -> None:
    """H6, C5: a task that the handler has left behind in a read takes nothing from the next job, and stops nothing."""

    def body() -> Iterator[bytes]:
        yield b"some"
        while True:
            time.sleep(0.001)
            yield b"more"

    for _ in range(20):
        with pytest.raises(HandlerRaised, match="being read"):
            send(pool, "/orphan_reader", body())
        assert send(pool, "/hello", read_timeout=20) == b"hello"


def test_a_task_that_writes_on(pool: Pool) -> None:
    """C5: nothing of a job is sent after its end; a handler that ends well has all of it sent before."""
    for _ in range(5):
        assert len(send(pool, "/orphan_writer")) == 8 << 20
        with pytest.raises(HandlerRaised, match="being written"):
            send(pool, "/orphan_writer?raise")
        assert send(pool, "/hello") == b"hello"
    assert pool.stats().deaths == 0


def test_a_write_that_outlives_its_caller(start: Callable[..., Pool]) -> None:
    """C5: a shielded write of a job that was left does not reach the next caller."""
    pool = start(f"{HANDLERS}:app", workers=1, grace=30)
    for _ in range(5):
        with pool.open(Request("GET", "/shielded")) as job:
            job.read()
        assert send(pool, "/hello") == b"hello"
    assert pool.stats().deaths == 0


def test_buffers_of_other_shapes(pool: Pool) -> None:
    """H1: sent byte by byte, or refused before anything is sent."""
    assert send(pool, "/shapes") == bytes((1, 0, 0, 0, 2, 0, 0, 0)) + b"abcd"
