"""How a host and an agent know each other on a connection: each shows that it has the secret, and none says it.

    agent → host   GREETING  a name of the protocol, and a nonce
    host → agent   HELLO     what the connection is for, which host, a nonce, a proof
    agent → host   WELCOME   the connection's number, a proof

The secret is made by the agent, and Ray carries it to hosts. Proofs are HMAC-SHA256 over both nonces (RFC 2104),
compared in constant time. Nothing else of a connection is looked at before.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

NAME: Final = b"blastdoor wire 1\n"
NONCE: Final = 16
_PROOF: Final = 32
_HOST: Final = 32

LANE: Final = b"L"
CONTROL: Final = b"C"
"""What a connection is for: jobs, one after the other; or all that is beside them."""

GREETING_SIZE: Final = len(NAME) + NONCE
HELLO_SIZE: Final = 1 + _HOST + NONCE + _PROOF
_NUMBER: Final = struct.Struct("<Q")
WELCOME_SIZE: Final = _NUMBER.size + _PROOF


Dial = Callable[[tuple[str, int], float], socket.socket]
"""What connects to an address, within so many seconds."""


class Stranger(ConnectionError):
    """Whoever is at the other end does not have the secret."""


def make_secret() -> bytes:
    """A secret for an agent and its hosts."""
    return os.urandom(32)


def greeting(nonce: bytes) -> bytes:
    """What an agent says first."""
    return NAME + nonce


def read_hello(secret: bytes, nonce: bytes, hello: bytes) -> tuple[bytes, str, bytes]:
    """Kind, host and nonce of a HELLO that answers this nonce. Stranger where the proof is wrong."""
    said, proof = hello[:-_PROOF], hello[-_PROOF:]
    if len(hello) != HELLO_SIZE or not hmac.compare_digest(_proof(secret, b"host", nonce, said), proof):
        raise Stranger("a connection did not show the pool's secret")
    kind, host, theirs = said[:1], said[1 : 1 + _HOST], said[1 + _HOST :]
    if kind not in (LANE, CONTROL):
        raise Stranger(f"a connection is for {kind!r}, which is nothing")
    return kind, host.decode("ascii"), theirs


def welcome(secret: bytes, host_nonce: bytes, number: int) -> bytes:
    """What an agent answers to a HELLO that holds."""
    said = _NUMBER.pack(number)
    return said + _proof(secret, b"agent", host_nonce, said)


def connect(
    address: tuple[str, int], secret: bytes, kind: bytes, host: str, timeout: float, dial: Dial | None = None
) -> tuple[socket.socket, int]:
    """A connection to an agent, after the handshake, and its number there. OSError where none can be had in time."""
    until = time.monotonic() + timeout
    sock = (dial or _dial)(address, timeout)
    try:
        said = _receive(sock, GREETING_SIZE, until)
        if not said.startswith(NAME):
            raise Stranger(f"{address[0]}:{address[1]} is no agent")
        nonce, own = said[len(NAME) :], os.urandom(NONCE)
        hello = kind + host.encode("ascii") + own
        sock.sendall(hello + _proof(secret, b"host", nonce, hello))
        answer = _receive(sock, WELCOME_SIZE, until)
        if not hmac.compare_digest(_proof(secret, b"agent", own, answer[: _NUMBER.size]), answer[_NUMBER.size :]):
            raise Stranger(f"{address[0]}:{address[1]} is not the pool's agent")
    except BaseException:
        sock.close()
        raise
    return sock, _NUMBER.unpack(answer[: _NUMBER.size])[0]


def _dial(address: tuple[str, int], timeout: float) -> socket.socket:
    sock = socket.create_connection(address, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def _receive(sock: socket.socket, size: int, until: float) -> bytes:
    data = b""
    while len(data) < size:
        sock.settimeout(max(until - time.monotonic(), 0.001))
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("the agent has closed the connection")
        data += piece
    return data


def _proof(secret: bytes, who: bytes, nonce: bytes, said: bytes) -> bytes:
    return hmac.new(secret, who + nonce + said, hashlib.sha256).digest()
