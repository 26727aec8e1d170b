"""transport.front and what it counts with: timers, metrics, connections that come to their end."""

from __future__ import annotations

import asyncio
import queue
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from runner.metric_families import SECONDS, Counters, Histograms
from runner.platform.deadlines import Deadlines
from tests.serving import Served, receive_all, receive_until
from tests.waiting import wait_until
from transport.front import connection
from transport.gateway import RequestFinished


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(drain=0, admin="none", max_body=1000) as served:
        yield served


def request_of(target: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def test_deadlines() -> None:
    """F5, G7: each callback comes once, in time and in order; none that was cancelled, from a callback neither."""

    async def test() -> None:
        seed = random.randrange(1 << 32)
        print("seed", seed)
        chance = random.Random(seed)
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop, 0.05)
        came: list[int] = []
        began: list[float] = []
        kept = {}
        for number in range(3000):
            kept[number] = deadlines.start(lambda number=number: came.append(number))  # type: ignore[misc]
            began.append(time.monotonic())
            if chance.random() < 0.8:
                gone = chance.choice(list(kept))
                kept.pop(gone).cancel()
            if not number % 500:
                await asyncio.sleep(0)
        assert len(deadlines._queue) <= 2 * deadlines.alive + 300
        assert deadlines.alive == len(kept)
        first = next(iter(kept))
        last = max(kept)
        deadlines.start(lambda: None).cancel()
        await asyncio.sleep(0)
        while len(came) < len(kept):
            await asyncio.sleep(0.005)
        assert time.monotonic() >= began[last] + 0.05
        assert came == sorted(kept)
        assert first == came[0]
        assert deadlines.alive == 0
        for deadline in kept.values():
            deadline.cancel()  # late: nothing happens
        assert deadlines.alive == 0
        other = deadlines.start(lambda: came.append(-1))
        deadlines.start(other.cancel)
        deadlines.close()
        await asyncio.sleep(0.06)
        assert came[-1] != -1

    asyncio.run(test())


def test_metrics_are_as_the_library_has_them() -> None:
    """G9: the same numbers, counted by us and by prometheus_client, give the same text."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histograms = Histograms(ours, "x_seconds", "X.", ("a", "b"))
    counters = Counters(ours, "y_total", "Y.", ("a",))
    histogram = Histogram("x_seconds", "X.", ("a", "b"), buckets=SECONDS, registry=theirs)
    counter = Counter("y_total", "Y.", ("a",), registry=theirs)
    chance = random.Random(1)
    for _ in range(2000):
        labels = chance.choice("pq"), chance.choice('r"\n')
        value = chance.choice([chance.random(), *SECONDS, chance.expovariate(0.01)])
        histograms.of(labels).observe(value)
        histogram.labels(*labels).observe(value)
        counters.add(labels[:1], 2)
        counter.labels(labels[0]).inc(2)

    def lines(registry: CollectorRegistry) -> list[str]:
        text = generate_latest(registry).decode()
        return sorted(line for line in text.splitlines() if "_created" not in line)

    def numbers(found: list[str]) -> list[tuple[str, float]]:
        return [(line.rpartition(" ")[0], float(line.rpartition(" ")[2])) for line in found if line[0] != "#"]

    assert [line for line in lines(ours) if line[0] == "#"] == [line for line in lines(theirs) if line[0] == "#"]
    for (name, value), (other, theirs_value) in zip(numbers(lines(ours)), numbers(lines(theirs)), strict=True):
        assert name == other
        assert value == pytest.approx(theirs_value)


def test_an_answer_before_a_body_that_nobody_reads(served: Served) -> None:
    """G7: the connection ends after it, and the client still reads all of the answer (RFC 9112, 9.6)."""
    for _ in range(20):
        with served.connect() as client:
            client.sendall(request_of("/echo", "Content-Length: 900000", "Connection: close", method="POST"))
            client.sendall(b"x" * 500_000)
            received = receive_all(client)
            assert received.startswith(b"HTTP/1.1 413 ")
            assert b"the body is over" in received
    wait_until(lambda: not served.connections)


def test_what_is_taken_for_nobody_is_bounded(served: Served) -> None:
    """G7: a client that goes on sending after it was refused is cut off."""
    with served.connect() as client:
        client.sendall(b"\x16\x03 nonsense\r\n\r\n")
        receive_until(client, b"}")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(b"x" * 100_000)


def test_idle_connections_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: after their time, counted from the last answer; one that is used goes on."""
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.4)
    with served.connect() as idle, served.connect() as used:
        idle.sendall(request_of("/hello"))
        receive_until(idle, b"hello")
        began = time.monotonic()
        for _ in range(4):
            used.sendall(request_of("/hello"))
            receive_until(used, b"hello")
            time.sleep(0.2)
        assert receive_all(idle) == b""
        assert receive_all(used) == b""
        assert time.monotonic() - began >= 0.8


def test_what_follows_the_last_request(served: Served) -> None:
    """G7: nothing after a message with `Connection: close` is taken for a request (RFC 9112, 9.6)."""
    with served.connect() as client:
        client.sendall(request_of("/hello", "Connection: close") + request_of("/die") + b"nonsense")
        received = receive_all(client)
    assert received.count(b"HTTP/1.1") == 1
    assert served.pool.stats().deaths == 0


# -- what a hostile review has found ------------------------------------------------------------------


def test_nothing_is_taken_after_a_connection_s_end(tmp_path: Path) -> None:
    """G7: a request behind one that was refused, and told so, is not carried out (RFC 9112, 9.6)."""
    here, go = tmp_path / "here", tmp_path / "go"
    second, third = tmp_path / "second", tmp_path / "third"
    with Served(workers=1, drain=0, admin="none", max_body=1000) as served, served.connect() as busy:
        busy.sendall(request_of(f"/wait_for?here={here}&go={go}"))
        wait_until(here.exists)
        with served.connect() as client:
            client.sendall(request_of("/echo", "Transfer-Encoding: chunked", "Expect: 100-continue", method="POST"))
            wait_until(lambda: served.pool.stats().waiting == 1)
            behind = [request_of(f"/wait_for?here={name}&go={go}") for name in (second, third)]
            client.sendall(b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n" + b"".join(behind))
            received = receive_all(client)
        assert received.startswith(b"HTTP/1.1 413 ")
        assert received.count(b"HTTP/1.1 ") == 1
        go.touch()
        receive_until(busy, b"went")
        wait_until(lambda: served.gateway.active == 0)
        assert not second.exists()
        assert not third.exists()


def test_a_callback_that_raises_holds_up_no_other() -> None:
    """F5, G7: the others' time is up all the same."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        told: list[object] = []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        deadlines = Deadlines(loop, 0.01)
        came = asyncio.Event()

        def fail() -> None:
            raise ValueError("mine")

        deadlines.start(fail)
        deadlines.start(came.set)
        await asyncio.wait_for(came.wait(), 5)
        assert [type(error) for error in told] == [ValueError]

    asyncio.run(test())


def test_a_whole_answer_before_the_upload_s_end(tmp_path: Path) -> None:
    """H6, G7: the connection goes on, and the request is told, though its handler goes on after both."""
    app = tmp_path / "shop.py"
    app.write_text(
        "import time\n"
        "def app(request, response):\n"
        "    if request.path == '/hello':\n"
        "        return b'hello'\n"
        "    response.headers['content-length'] = '2'\n"
        "    response.write(b'ok')\n"
        "    while request.body.read(10_000):\n"
        "        pass\n"
        "    time.sleep(60)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with Served(
            "shop:app", workers=2, drain=0, admin="none", timeout=1, env={"PYTHONPATH": str(tmp_path)}
        ) as served:
            answers: queue.Queue[RequestFinished] = queue.Queue()
            served.gateway.subscribe(answers.put)
            for early in (True, False):
                with served.connect() as client:
                    head = request_of("/slow", "Content-Length: 50000", method="POST")
                    client.sendall(head if early else head + b"x" * 50_000)
                    receive_until(client, b"ok")
                    if early:
                        client.sendall(b"x" * 50_000)
                    assert answers.get(timeout=20).whole
                    client.sendall(request_of("/hello"))
                    assert receive_until(client, b"hello")
                    answers.get(timeout=20)
    finally:
        sys.path.remove(str(tmp_path))


def test_a_client_that_takes_no_answers(served: Served) -> None:
    """G7: what it asks for meanwhile is not answered into memory: nothing more is read from it."""
    with served.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.5)
        asked = request_of("/#nonsense") * 100
        with pytest.raises((TimeoutError, ConnectionError)):
            for _ in range(10_000):
                client.sendall(asked)
        for connected in served.connections:
            assert connected._transport.get_write_buffer_size() < 100_000
            assert connected.waiting <= connection.PIPELINED


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"0" * 5000 + b"5\r\n\r\nhello", 400),
        (b"GET /hello HTTP/0.9\r\nHost: x\r\n\r\n", 505),
        (b"GET /hello HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /hello HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /hello HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET http:///hello HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /hello HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n", 200),
    ],
)
def test_heads_that_are_odd(served: Served, head: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """G7: they are answered, and nobody's traceback is in the log."""
    with served.connect() as client:
        client.sendall(head)
        assert receive_all(client).startswith(b"HTTP/1.1 %d " % status)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_body_s_end_after_its_answer(served: Served) -> None:
    """G7: then the connection is idle, as after any other request."""
    with served.connect() as client:
        client.sendall(request_of("/answer_early", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n")
        receive_until(client, b"too large")
        client.sendall(b"0\r\n\r\n")
        wait_until(lambda: [one.state for one in served.connections] == [connection.State.IDLE])


def test_a_request_before_one_that_is_cut_off(served: Served) -> None:
    """G7: it is answered, though its client has sent half of another and closed its half of the connection."""
    with served.connect() as client:
        client.sendall(request_of("/stream?count=3&pause=0.05") + b"GET /half HTTP/1.1\r\nHo")
        client.shutdown(socket.SHUT_WR)
        received = receive_all(client)
    assert received.count(b"HTTP/1.1 200") == 1
    assert received.endswith(b"0\r\n\r\n")
