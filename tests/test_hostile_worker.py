"""What a worker that speaks nonsense on its pipe can do: lose its job and its life."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from runner import JobFailed, Pool, Request, WorkerDied, WorkerMisbehaved
from runner.wire.frames import (
    BODY,
    END,
    FAULT,
    HEAD,
    MAX_BODY,
    MAX_HEAD,
    READY,
    encode,
    pack_header,
)
from runner.wire.messages import ResponseHead
from tests.processes import is_gone
from transport.requests import Transport

URL = "http://app.local"


def head(status: int = 200, job: int = 1) -> bytes:
    return encode(HEAD, job, msgspec.msgpack.encode(ResponseHead(status, [])))


GARBAGE = {
    "garbage": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "zeros": b"\0" * 100,
    "a pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'touch /tmp/pwned'\ntR." * 3,
    "a 4 GiB head": pack_header(HEAD, 1, 0xFFFFFFFF),
    "a 4 GiB body": head() + pack_header(BODY, 1, 0xFFFFFFFF),
    "a head over the cap": pack_header(HEAD, 1, MAX_HEAD + 1),
    "a body over the cap": head() + pack_header(BODY, 1, MAX_BODY + 1),
    "an empty body frame": head() + pack_header(BODY, 1, 0),
    "a body without a head": encode(BODY, 1, b"x"),
    "an end without a head": encode(END, 1),
    "a second READY": encode(READY, 1, b"x"),
    "two heads": head() + head(),
    "a head that is no head": encode(HEAD, 1, b"\xc1\xff"),
    "a status of 7": head(7),
    "another job's head": head(job=2),
    "another job's body": head() + encode(BODY, 7, b"secret"),
    "a broken report": encode(FAULT, 1, b"\xc1"),
}


@pytest.mark.parametrize(
    ("name", "late"),
    [(name, late) for name in GARBAGE for late in ("", "&late=1") if not (late and "without a head" in name)],
)
def test_nonsense(start: Callable[..., Pool], log: pytest.LogCaptureFixture, name: str, late: str) -> None:
    """F6: before the head a 502, after it a body-read error; the worker is killed, and the pool goes on."""
    pool = start(workers=1)
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        (worker,) = pool._supervisor._workers.values()  # type: ignore[union-attr]
        before = worker.pid or 0
        try:
            response = session.post(f"{URL}/protocol?then=wait{late}", data=GARBAGE[name], timeout=30)
            assert response.status_code == 502
            assert response.json()["fault"] == "protocol"
            assert not late
        except ChunkedEncodingError as error:
            assert "broke the protocol" in str(error)
        assert session.get(URL + "/pid", timeout=30).text != str(before)
    assert is_gone(before)
    assert "broke the protocol" in log.text


def test_half_a_frame_and_then_death(pool: Pool) -> None:
    """F6, F3: the rest of a frame that never comes is no clean end."""
    for data in (b"\x06", pack_header(HEAD, 1, 100) + b"half", head() + pack_header(BODY, 1, 100) + b"half"):
        with pytest.raises(JobFailed), pool.open(Request("POST", "/protocol?then=exit", body=data)) as job:
            b"".join(job)
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"


def test_a_worker_that_closes_its_pipe(pool: Pool) -> None:
    """F3: one that lives on without its response pipe is killed, and its caller told at once."""
    with pytest.raises(WorkerDied, match="SIGKILL"):
        pool.open(Request("POST", "/protocol?then=close", body=b"x"[:0]), read_timeout=30)


def test_an_answer_and_then_garbage(start: Callable[..., Pool]) -> None:
    """F6: a whole answer stands; the worker that wrote on after its end is not used again."""
    pool = start(workers=1)
    with pool.open(Request("GET", "/pid")) as job:
        pid = b"".join(job)
    data = head(201, 2) + encode(BODY, 2, b"whole") + encode(END, 2) + b"garbage"
    with pool.open(Request("POST", "/protocol", body=data)) as job:
        assert job.head.status == 201
        assert b"".join(job) == b"whole"
    with pool.open(Request("GET", "/pid")) as job:
        assert b"".join(job) != pid


def test_a_late_byte_reaches_nobody(start: Callable[..., Pool], tmp_path: Path) -> None:
    """C5, F6: what a job's leftover thread writes to the pipe is not taken for the next job's answer."""
    pool = start(workers=1)
    forged = encode(BODY, 1, b"secret of the first job")
    with pool.open(Request("POST", f"/leave_writer?go={tmp_path}", body=forged)) as job:
        assert b"".join(job) == b"left"
    (tmp_path / "go").touch()
    while not (tmp_path / "written").exists():
        time.sleep(0.001)
    with pytest.raises(WorkerMisbehaved, match="broke the protocol"):
        pool.open(Request("GET", "/hello"))
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"


@pytest.mark.parametrize("what", ["body", "heads"])
def test_a_flood(start: Callable[..., Pool], what: str) -> None:
    """F6, T12: 100 MB that nobody asked for: memory stays flat, the worker is killed or waits."""
    pool = start(workers=1)
    data = encode(BODY, 1, b"x" * MAX_BODY) if what == "body" else encode(HEAD, 1, b"x" * MAX_HEAD) * 4
    before = psutil.Process().memory_info().rss
    with pytest.raises(WorkerMisbehaved):
        pool.open(Request("POST", "/protocol", body=data * 100))
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"


def test_random_bytes(start: Callable[..., Pool]) -> None:
    """I14: 300 streams of random bytes, and of honest frames with bytes changed: never a hang, never a wrong answer."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start(workers=2, preload=True)
    honest = head() + encode(BODY, 1, b"honest") + encode(END, 1)
    for _ in range(300):
        data = bytearray(honest)
        if chance.random() < 0.5:
            data = bytearray(chance.randbytes(chance.randrange(1, 200)))
        else:
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            with pool.open(Request("POST", "/protocol?then=exit", body=bytes(data)), read_timeout=30) as job:
                b"".join(job)
        except JobFailed:
            pass
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"
    assert not os.path.exists("/tmp/pwned")


def test_a_head_that_is_nested_without_end(pool: Pool) -> None:
    """F6: what exhausts the decoder's recursion is a violation like any other."""
    with pytest.raises(WorkerMisbehaved, match="does not hold up"):
        pool.open(Request("GET", "/deep"))


def test_a_cut_off_without_a_head(pool: Pool) -> None:
    """F6: an abort before the head is no answer that an honest worker gives."""
    report = encode(FAULT, 1, msgspec.msgpack.encode(["aborted"]))
    with pytest.raises(WorkerMisbehaved):
        pool.open(Request("POST", "/protocol", body=report))


def test_an_array_is_no_misbehavior(pool: Pool) -> None:
    """H1: a memoryview of wider items is sent as the bytes that it is."""
    with pool.open(Request("GET", "/array")) as job:
        assert len(b"".join(job)) == 40_000
