"""Bodies of every kind and size, both ways: lazily, in constant memory, without a deadlock."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from runner import HandlerRaised, JobCancelled, Pool, Request, WorkerDied
from tests.processes import kill
from transport.requests import Transport

URL = "http://app.local"
MIB = 1 << 20


def send(pool: Pool, target: str, body: Any, method: str = "POST") -> bytes:
    with pool.open(Request(method, target, body=body)) as job:
        return b"".join(job)


class Counted(io.RawIOBase):
    """A body of `size` bytes that notes how far it was read, and whether it was closed."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.given = 0

    def read(self, size: int = -1, /) -> bytes:
        piece = b"x" * min(size, self.left)
        self.left -= len(piece)
        self.given += len(piece)
        return piece


def test_bodies_of_every_type(pool: Pool, tmp_path: Path) -> None:
    """H6: none, bytes, str, file, generator: each arrives whole."""
    data = random.Random(7).randbytes(3 * MIB)
    path = tmp_path / "body"
    path.write_bytes(data)

    def generate() -> Iterator[bytes]:
        for at in range(0, len(data), 77_777):
            yield data[at : at + 77_777]

    with path.open("rb") as file:
        for body in (data, bytearray(data), memoryview(data), file, generate(), [data[:1], b"", data[1:]]):
            seen = json.loads(send(pool, "/echo", body))
            assert (seen["size"], seen["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert json.loads(send(pool, "/echo", None))["size"] == 0
    assert json.loads(send(pool, "/echo", "tëxt"))["body"] == "tëxt".encode().decode("latin-1")
    assert json.loads(send(pool, "/echo", iter([])))["size"] == 0


@pytest.mark.parametrize("size", [1, 32767, 32768, 32769, 65535, 65536, 65537, MIB, 5 * MIB + 1])
def test_sizes_around_the_seams(pool: Pool, size: int) -> None:
    """H6, T12: sizes around every buffer's end, both ways at once."""
    data = random.Random(size).randbytes(size)
    assert send(pool, "/mirror", data) == data
    assert send(pool, "/mirror", iter([data])) == data


def test_bodies_through_requests(pool: Pool, tmp_path: Path) -> None:
    """H6: what requests makes of bodies: bytes, text, forms, files, multipart, generators."""
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        assert session.post(URL + "/echo", data="tëxt".encode()).json()["body"] == "tÃ«xt"
        assert session.post(URL + "/echo", data="tëxt").json()["size"] == 5
        assert session.post(URL + "/echo", data={"a": "b"}).json()["body"] == "a=b"
        seen = session.post(URL + "/echo", files={"f": io.BytesIO(b"x" * MIB)}).json()
        assert seen["size"] > MIB
        assert dict(seen["headers"])["Content-Length"] == str(seen["size"])
        seen = session.post(URL + "/echo", data=iter([b"a", b"b"])).json()
        assert seen["body"] == "ab"
        assert dict(seen["headers"])["Transfer-Encoding"] == "chunked"


def test_uploads_are_read_lazily(pool: Pool) -> None:
    """H6: no further than the worker takes: a handler that does not read leaves the source nearly whole."""
    body = Counted(100 * MIB)
    with pool.open(Request("POST", "/answer_early", body=body)) as job:
        assert job.head.status == 413
        assert b"".join(job) == b"too large"
    assert body.given <= 4 * MIB


def endlessly(piece: bytes) -> Generator[bytes, None, None]:
    while True:
        yield piece


def test_an_early_answer_stops_the_upload(start: Callable[..., Pool]) -> None:
    """H6: the rest of the body is never pulled, the generator is closed, and the worker goes on with its next job."""
    pool = start(workers=1)
    pid = send(pool, "/pid", None, "GET")
    for _ in range(50):
        endless = endlessly(b"x" * 50_000)
        assert send(pool, "/answer_early", endless) == b"too large"
        assert inspect.getgeneratorstate(endless) == inspect.GEN_CLOSED
        assert send(pool, "/answer_early", b"y" * MIB) == b"too large"
        assert send(pool, "/pid", None, "GET") == pid


def test_a_body_that_raises(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """H6: the caller gets its own generator's error; the handler can't take the cut for the end."""
    pool = start(workers=1, grace=5)
    pid = send(pool, "/pid", None, "GET")

    def broken() -> Iterator[bytes]:
        yield b"x" * 100
        raise LookupError("the source is broken")

    with pytest.raises(LookupError, match="the source is broken"):
        send(pool, "/count", broken())
    assert send(pool, "/pid", None, "GET") == pid


def test_a_cut_body_is_an_error_to_the_handler(start: Callable[..., Pool], tmp_path: Path) -> None:
    """H6, C3: a handler that reads is told that the body was cut off, or that its caller has left."""
    seen, reading = tmp_path / "seen", tmp_path / "reading"

    def handler(request: Any, response: Any) -> bytes:
        try:
            reading.touch()
            request.body.read()
        except BaseException as error:
            try:
                seen.write_text(type(error).__name__)
            except JobCancelled:  # told once that the body was cut, once that the caller has left
                seen.write_text(type(error).__name__)
            raise
        return b""

    pool = start(handler, workers=1, grace=5)

    def broken() -> Iterator[bytes]:
        yield b"x"
        while not reading.exists():
            time.sleep(0.001)
        raise LookupError

    with pytest.raises(LookupError):
        send(pool, "/", broken())
    assert send(pool, "/", b"whole") == b""
    assert seen.read_text() in ("UploadStopped", "JobCancelled")


def test_a_body_of_nonsense(pool: Pool) -> None:
    """H6: a generator that gives what is no bytes is the caller's error, and the pool goes on."""
    with pytest.raises(ValueError, match="dict"):
        send(pool, "/count", iter([b"a", {}]))
    assert send(pool, "/hello", None) == b"hello"


def test_both_directions_at_once(pool: Pool) -> None:
    """H6, T12: 64 MiB there and back at the same time, with no more memory than pipes hold."""
    body = Counted(64 * MIB)
    digest, size = hashlib.sha256(), 0
    with pool.open(Request("POST", "/mirror", body=body)) as job:
        for piece in job:
            assert body.given - size <= 4 * MIB
            digest.update(piece)
            size += len(piece)
    assert size == 64 * MIB
    assert digest.digest() == hashlib.sha256(b"x" * size).digest()


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_the_worker_dies_while_a_body_uploads(pool: Pool, pause: float) -> None:
    """I2: the caller has its answer within a second of the death, and the body is closed."""
    closed = threading.Event()

    class Body:
        """An iterator that is told of its end also where it was never begun, as a generator is not."""

        def __iter__(self) -> Iterator[bytes]:
            return self

        def __next__(self) -> bytes:
            return b"x" * 65536

        def close(self) -> None:
            closed.set()

    before = time.monotonic()
    with pytest.raises(WorkerDied, match="code 9"):
        send(pool, f"/die_while_reading?after={int(pause * 10_000_000)}", Body())
    assert time.monotonic() - before < 1
    assert closed.is_set()
    assert send(pool, "/hello", None) == b"hello"


def test_a_worker_that_never_reads_dies(start: Callable[..., Pool]) -> None:
    """I2: the same where the pipe is full and nobody takes anything out of it."""
    pool = start(workers=1)
    body = Counted(100 * MIB)
    killed: list[float] = []

    def kill_when_full() -> None:
        given = -1
        while given != body.given or not given:  # until the pipe is full
            given = body.given
            time.sleep(0.05)
        (worker,) = pool._supervisor._workers.values()  # type: ignore[union-attr]
        killed.append(time.monotonic())
        kill(worker.pid)

    killer = threading.Thread(target=kill_when_full)
    killer.start()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        send(pool, "/never_read", body)
    assert time.monotonic() - killed[0] < 1
    killer.join()


def rss(pid: int) -> int:
    size: int = psutil.Process(pid).memory_info().rss
    return size


def watch_memory(pids: list[int], done: threading.Event) -> list[int]:
    """The most that each of the processes takes until `done`, in bytes."""
    most = [0] * len(pids)
    while not done.wait(0.02):
        most = [max(before, rss(pid)) for before, pid in zip(most, pids, strict=True)]
    return most


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_gibibyte_in_constant_memory(start: Callable[..., Pool], direction: str) -> None:
    """T12: 1 GiB each way through requests; host and worker stay within 32 MiB of where they began."""
    pool = start(workers=1)
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        session.get(URL + "/big?size=1000000")
        (worker,) = pool._supervisor._workers.values()  # type: ignore[union-attr]
        pids = [os.getpid(), worker.pid or 0]
        before = [rss(pid) for pid in pids]
        done = threading.Event()
        most: list[int] = []
        watcher = threading.Thread(target=lambda: most.extend(watch_memory(pids, done)))
        watcher.start()
        if direction == "down":
            with session.get(f"{URL}/big?size={1 << 30}", stream=True) as response:
                size = sum(len(chunk) for chunk in response.iter_content(MIB))
        else:
            size = int(session.post(URL + "/count", data=Counted(1 << 30)).text)
        done.set()
        watcher.join()
    assert size == 1 << 30
    assert [after - start for after, start in zip(most, before, strict=True)] < [32 * MIB, 32 * MIB]


def test_a_stream_that_nobody_reads(start: Callable[..., Pool]) -> None:
    """T12: a slow reader slows the handler: the host holds no more than it was asked to, and others go on."""
    pool = start(workers=2)
    with pool.open(Request("GET", f"/big?size={1 << 30}")) as job:
        job.read()
        before = rss(os.getpid())
        for _ in range(200):
            assert send(pool, "/hello", None) == b"hello"
        assert rss(os.getpid()) - before < 8 * MIB
        assert sum(map(len, job._exchange.body)) < MIB


def test_a_slow_handler_blocks_nobody(start: Callable[..., Pool], tmp_path: Path) -> None:
    """T12: other jobs run to their end while one waits."""
    pool = start(workers=2)
    with pool.open(Request("GET", f"/head_then_wait?go={tmp_path / 'go'}")) as slow:
        for _ in range(50):
            assert send(pool, "/hello", None) == b"hello"
        (tmp_path / "go").touch()
        assert b"".join(slow) == b"done"


@pytest.mark.parametrize(
    ("method", "status", "expected"), [("HEAD", 200, b""), ("GET", 204, b""), ("GET", 304, b""), ("GET", 205, b"body")]
)
def test_answers_that_carry_no_body(pool: Pool, method: str, status: int, expected: bytes) -> None:
    """H5: HEAD, 204 and 304 carry none, whatever the handler writes; but at 204 their headers stand."""
    with pool.open(Request(method, f"/content?status={status}&length=4&body=body")) as job:
        assert job.head.status == status
        assert (("content-length", "4") in job.head.headers) is (status != 204)
        assert b"".join(job) == expected


def test_a_long_body_is_cut(pool: Pool, log: pytest.LogCaptureFixture) -> None:
    """H5: a body longer than its Content-Length is cut, with one log line."""
    assert send(pool, "/content?length=4&body=much-too-long", None) == b"much"
    assert len([r for r in log.records if "longer than its Content-Length" in r.message]) == 1


@pytest.mark.parametrize("length", ["-1", "abc", "1,2", "1e3"])
def test_a_content_length_that_is_none(pool: Pool, length: str) -> None:
    """H5: the handler's own error, told before anything is sent."""
    with pytest.raises(HandlerRaised, match="Content-Length"):
        send(pool, f"/content?length={length}&body=x", None)


def test_transfer_encoding_is_dropped(pool: Pool) -> None:
    """H5: a handler's Transfer-Encoding does not reach the caller; the body is whole."""
    pairs = [["Transfer-Encoding", "chunked"], ["X-Kept", "1"]]
    with pool.open(Request("POST", "/headers?body=plain", body=json.dumps(pairs))) as job:
        assert job.head.headers == [("X-Kept", "1")]
        assert b"".join(job) == b"plain"
