"""What a connection is told in heads that are not plain: upgrades that are not made, hosts, permissions of sockets."""

from __future__ import annotations

import itertools
import json
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import ConfigurationError
from tests.serving import Served
from transport.serving.settings import Settings

OFFERS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n",
    b"Upgrade: TLS/1.0\r\nconnection: upgrade\r\n",
    b"Connection: keep-alive, upgrade\r\nUpgrade: anything, else\r\n",
]
INNER = b"GET /status?status=418 HTTP/1.1\r\nHost: inner\r\n\r\n"
LAST = b"GET /pid?last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def framed(body: bytes, how: str) -> tuple[bytes, bytes]:
    """The framing's header, and the body as it goes out."""
    if how == "length":
        return b"Content-Length: %d\r\n" % len(body), body
    if how == "chunked":
        halves = body[: len(body) // 2], body[len(body) // 2 :]
        return b"Transfer-Encoding: chunked\r\n", b"".join(
            b"%x\r\n%b\r\n" % (len(h), h) for h in halves if h
        ) + b"0\r\n\r\n"
    return b"", b""


def answers(data: bytes) -> list[tuple[int, bytes]]:
    """Statuses and bodies of the responses in a stream."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 100:
            continue
        if b"chunked" in head.lower():
            body = b""
            while True:
                size, _, data = data.partition(b"\r\n")
                body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
                if not int(size, 16):
                    break
        else:
            (length,) = (
                int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            )
            body, data = data[:length], data[length:]
        found.append((status, body))
    return found


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(drain=0, admin="none") as served:
        yield served


def exchange(served: Served, pieces: list[bytes]) -> list[tuple[int, bytes]]:
    with served.connect() as client:
        for piece in pieces:
            client.sendall(piece)
        received = b""
        while data := client.recv(1 << 16):
            received += data
    return answers(received)


@pytest.mark.parametrize("how", ["length", "chunked", "none"])
@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket", "tls", "else"])
def test_an_upgrade_that_is_not_made(served: Served, offer: bytes, how: str) -> None:
    """G1, G7: the message is read as any other (RFC 9110, 7.8), whatever its framing, and however its bytes come."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    framing, body = framed(INNER, how)
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + offer + framing + b"\r\n"
    whole = head + body + head + body + LAST
    splits = [[], [len(head)], [len(head) + 1], [len(head) - 1], [len(head) + len(body)]]
    splits += [sorted(chance.sample(range(1, len(whole)), chance.randrange(1, 12))) for _ in range(20)]
    for split in splits:
        pieces = [whole[start:end] for start, end in itertools.pairwise([0, *split, len(whole)])]
        found = exchange(served, pieces)
        assert [status for status, _ in found] == [200, 200, 200], split
        for _, answer in found[:2]:
            assert json.loads(answer)["body"] == (INNER.decode() if how != "none" else "")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /pid HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET /pid HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400),
        (b"GET /pid HTTP/1.1\r\nHost: a\r\nhost: a\r\nConnection: close\r\n\r\n", 400),
        (b"GET /pid HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /hello HTTP/1.0\r\n\r\n", 200),
        (b"GET /hello HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 200),
    ],
)
def test_hosts(served: Served, head: bytes, status: int) -> None:
    """G7: one Host header (RFC 9112, 3.2); HTTP/1.0 knows none."""
    ((found, _),) = exchange(served, [head])
    assert found == status


@pytest.mark.parametrize(("umask", "mode", "expected"), [(0o077, "", 0o700), (0o022, "660", 0o660), (0, "", 0o777)])
def test_who_may_connect(tmp_path: Path, umask: int, mode: str, expected: int) -> None:
    """G10: to a unix socket, by the umask or by what is said."""
    path = tmp_path / "socket"
    before = os.umask(umask)
    try:
        with Served(uds=str(path), uds_mode=mode, drain=0, admin="none"):
            assert stat.S_IMODE(path.stat().st_mode) == expected
    finally:
        os.umask(before)


def test_a_mode_that_is_none() -> None:
    """G10: refused at the start."""
    with pytest.raises(ConfigurationError, match="uds_mode"):
        Settings(app="shop:app", uds_mode="rw-rw----")
