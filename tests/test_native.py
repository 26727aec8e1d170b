"""runner.worker.handlers.native: what a native handler sees and what its writes become."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from runner import HandlerRaised, JobContext, Pool, Request


def get(pool: Pool, target: str, body: Any = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    with pool.open(Request(method, target, body=body)) as job:
        return job.head.status, dict(job.head.headers), b"".join(job)


def test_what_a_native_handler_sees(pool: Pool) -> None:
    """H1, T6: method, target, path, query, headers, streaming body, context."""
    request = Request(
        "PATCH",
        "/a%2Fb/echo?x=%20",
        headers=[("X-A", "1"), ("x-a", "2")],
        body=b"the body",
        scheme="https",
        server=("example.org", 8443),
    )
    context = JobContext("ignored", "openai", "agents", "key-1", {"workspace": "w"}, 12345.5)
    with pool.open(request, context=context) as job:
        seen = json.loads(b"".join(job))
    assert seen["method"] == "PATCH"
    assert (seen["target"], seen["path"], seen["query"]) == ("/a%2Fb/echo?x=%20", "/a%2Fb/echo", "x=%20")
    assert seen["headers"] == [["X-A", "1"], ["x-a", "2"]]
    assert (seen["scheme"], seen["server"]) == ("https", ["example.org", 8443])
    assert seen["body"] == "the body"
    assert seen["context"] == {
        "job_id": job.job_id,
        "provider": "openai",
        "source": "agents",
        "delegated_api_key_id": "key-1",
        "attribution": {"workspace": "w"},
        "deadline": 12345.5,
    }


def test_the_first_head_wins(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """T9: headers are frozen with the first head; later changes and a second head are ignored, with a log line."""
    pool = start(workers=1)
    assert get(pool, "/late_headers") == (201, {"x-first": "1"}, b"body")
    pool.close()
    assert "header 'x-late' was set after the head was sent" in log.text
    assert "a second head, with status 500, was ignored" in log.text


def test_heads_that_are_implied(pool: Pool) -> None:
    """T9: a write without a head implies 200; a handler that returns without writing gives 200 and an empty body."""
    assert get(pool, "/nothing") == (200, {}, b"")
    with pool.open(Request("GET", "/stream?count=1&pause=0")) as job:
        assert job.head.status == 200
        assert job.head.reason == "OK"
    assert get(pool, "/hello") == (200, {"content-length": "5"}, b"hello")


def test_no_content_length_is_invented(pool: Pool) -> None:
    """T10: where the length is not known beforehand; nor any other header."""
    for path in ("/nothing", "/big?size=10"):
        assert get(pool, path)[1] == {}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ('"200"', "TypeError"),
        ("200.0", "TypeError"),
        ("null", "TypeError"),
        ("true", "TypeError"),
        ("99", "ValueError"),
        ("100", "ValueError"),
        ("1000", "ValueError"),
        ("-1", "ValueError"),
    ],
)
def test_a_status_that_is_none(pool: Pool, status: str, error: str) -> None:
    """T11: a clear error in the handler, a 500 for the caller, and the pool goes on."""
    with pytest.raises(HandlerRaised, match=f"{error}: the status must"):
        get(pool, f"/status?status={quote(status)}")
    assert get(pool, "/hello")[0] == 200


@pytest.mark.parametrize(
    "pair",
    [["a b", "c"], ["", "c"], ["a", "b\r\nc: d"], ["a", "b\nc"], ["a\n", "b"], ["a", "\u20ac"], ["a", 1]],
)
def test_a_header_that_is_none(pool: Pool, pair: list[Any]) -> None:
    """H1: a header with a line break, from the handler's side, is the handler's error."""
    with pytest.raises(HandlerRaised, match="header"):
        get(pool, "/headers", json.dumps([pair]))
    assert get(pool, "/hello")[0] == 200


def test_a_response_head_over_the_cap(pool: Pool) -> None:
    """H1: told to the handler with the cap; below it, it passes."""
    with pytest.raises(HandlerRaised, match="over the cap of 262144"):
        get(pool, "/unending_head?size=300000")
    assert len(get(pool, "/unending_head?size=200000")[1]["x-big"]) == 200000


def test_headers_keep_order_and_repeats(pool: Pool) -> None:
    """H7: as the handler sent them."""
    pairs = [["X-B", "1"], ["x-a", "2"], ["X-B", "3"], ["Set-Cookie", "a=b"], ["X-Latin", "caf\xe9"]]
    with pool.open(Request("POST", "/headers", body=json.dumps(pairs))) as job:
        assert [list(pair) for pair in job.head.headers] == pairs


def test_tokens_come_as_they_are_written(pool: Pool) -> None:
    """T10: each of 20 events, 50 ms apart, is with the caller before the next one is written."""
    with pool.open(Request("GET", "/stream?count=20&pause=0.05")) as job:
        arrivals = []
        for piece in job:
            written = float(piece.split()[2])
            arrivals.append((written, time.monotonic()))
    assert len(arrivals) == 20
    # Each came before its successor was written, but for what a busy machine may delay.
    in_time = sum(seen < following for (_, seen), (following, _) in itertools.pairwise(arrivals))
    assert in_time >= 15


def test_flush_is_there(start: Callable[..., Pool]) -> None:
    """T10: flush() exists for handlers that look for it; all bytes-likes pass."""

    def handler(request: Any, response: Any) -> None:
        response.flush()
        for data in (b"bytes", bytearray(b"array"), memoryview(b"view"), b""):
            response.write(data)
        response.flush()

    assert get(start(handler), "/")[2] == b"bytesarrayview"


def test_a_thread_that_outlives_its_job_can_not_write(start: Callable[..., Pool]) -> None:
    """C5: what a leftover thread writes after the job's end reaches nobody."""

    def handler(request: Any, response: Any) -> bytes:
        import threading

        if request.path == "/leave":

            def late() -> None:
                done.wait()
                try:
                    response.write(b"secret of the first job")
                except RuntimeError as error:
                    outcome.append(str(error))
                written.set()

            done, written = threading.Event(), threading.Event()
            outcome: list[str] = []
            threading.kept = (done, written, outcome)  # type: ignore[attr-defined]
            threading.Thread(target=late).start()
            return b"left"
        done, written, outcome = threading.kept  # type: ignore[attr-defined]
        response.write(b"second ")
        done.set()
        written.wait()
        return outcome[0].encode()

    pool = start(handler, workers=1)
    assert get(pool, "/leave")[2] == b"left"
    assert get(pool, "/")[2] == b"second the response has ended: nothing can be written to it any more"


def test_one_write_each_way(start: Callable[..., Pool]) -> None:
    """T10, W1: a plain round trip with a small body is one read and one write in the worker, none of them polled."""
    pool = start(workers=1)

    def counters() -> dict[str, int]:
        counted: dict[str, int] = json.loads(get(pool, "/count_writes", b"a small body", "POST")[2])
        return counted

    counters()
    first, second = counters(), counters()
    own_reads = 2  # the handler itself reads /proc/self/io
    assert second["writes"] - first["writes"] == 1
    assert second["reads"] - first["reads"] == 1 + own_reads


def test_blanks_around_a_header_s_value(pool: Pool) -> None:
    """H1: they are no part of the value (RFC 9110, 5.5), and no client sees them."""
    body = json.dumps([["x-a", " 1\t"], ["x-b", "\t 2 "], ["x-c", " "]]).encode()
    with pool.open(Request("POST", "/headers", body=body)) as job:
        assert job.head.headers == [("x-a", "1"), ("x-b", "2"), ("x-c", "")]
