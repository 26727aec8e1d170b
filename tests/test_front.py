"""transport.front and what it counts with: timers, metrics, connections that come to their end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from runner.metric_families import SECONDS, Counters, Histograms
from runner.platform.deadlines import Deadlines
from tests.serving import Served, receive_all, receive_until
from tests.waiting import wait_until
from transport.front import connection


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
