"""The soak's traffic: what callers ask for, and what each answer has to be."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2
import requests
from requests.exceptions import ChunkedEncodingError, ReadTimeout
from requests.exceptions import ConnectionError as RequestsConnectionError

from runner import CancelScope, Pool
from scripts.trials.soak_handler import body_of
from transport.httpx2 import Transport as Httpx2Transport
from transport.requests import Transport

URL = "http://soak.local"
WALL_SECONDS = 2.0

# What ends a body before its time, in either client.
CUT = (ChunkedEncodingError, httpx2.RemoteProtocolError)
LEFT = (RequestsConnectionError, ReadTimeout, ChunkedEncodingError, httpx2.ReadError, httpx2.ReadTimeout)


class Wrong(Exception):
    """An answer that is not what it has to be."""


def expect(condition: object, words: str) -> None:
    if not condition:
        raise Wrong(words)


class Caller:
    """One caller's clients: which of them makes a call is for the random numbers to say."""

    def __init__(self, pool: Pool, rng: random.Random) -> None:
        self.rng = rng
        self.session = requests.Session()
        self.session.mount(URL, Transport(pool))
        self.client = httpx2.Client(transport=Httpx2Transport(pool), timeout=120)

    def close(self) -> None:
        self.session.close()
        self.client.close()

    def post(self, path: str, body: bytes | Iterator[bytes] = b"") -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer."""
        if self.rng.random() < 0.5:
            response = self.session.post(URL + path, data=body, timeout=120)
            return response.status_code, response.content, {**response.headers}
        answer = self.client.post(URL + path, content=body)
        return answer.status_code, answer.content, {**answer.headers}

    def fault(self, path: str, status: int, kind: str) -> None:
        """A fault before the head: its status, and its kind in the answer."""
        code, body, _ = self.post(path)
        expect(code == status and f'"fault": "{kind}"'.encode() in body, f"{path}: {code} {body[:200]!r}")

    # -- healthy ---------------------------------------------------------------------------------------

    def plain(self) -> None:
        body = self.rng.randbytes(self.rng.randrange(300))
        code, answer, _ = self.post("/echo", body)
        expect((code, answer) == (200, body), f"echo: {code} {answer[:100]!r}")

    def big(self) -> None:
        seed, size = self.rng.getrandbits(32), self.rng.randrange(1 << 21)
        code, answer, _ = self.post(f"/big?{seed},{size}")
        expect(code == 200 and answer == body_of(seed, size)[:size], f"big: {code}, {len(answer)} of {size} bytes")

    def upload(self) -> None:
        pieces = [self.rng.randbytes(self.rng.randrange(1, 60_000)) for _ in range(self.rng.randrange(20))]
        code, answer, _ = self.post("/digest", iter(pieces))
        expect(answer == hashlib.sha256(b"".join(pieces)).hexdigest().encode(), f"upload: {code} {answer[:100]!r}")

    def stream(self) -> None:
        seed, count = self.rng.getrandbits(32), self.rng.randrange(200)
        read = self.rng.choice((count, self.rng.randrange(count + 1)))  # to its end, or left early
        lines: list[str] = []
        path = f"{URL}/stream?{seed},{count}"
        if self.rng.random() < 0.5:
            with self.session.get(path, stream=True, timeout=120) as response:
                for line in response.iter_lines():
                    lines.append(line.decode())
                    if len(lines) >= read:
                        break
        else:
            with self.client.stream("GET", path) as answer:
                for text in answer.iter_lines():
                    lines.append(text)
                    if len(lines) >= read:
                        break
        expect(lines[:read] == [f"{seed} {number}" for number in range(read)], f"stream: {lines[:3]} of {count}")

    def cancel(self) -> None:
        """A scope that is cancelled, or whose time is up, at some moment of a call."""
        seed = self.rng.getrandbits(32)
        by_thread = self.rng.random() < 0.3
        with CancelScope(timeout=None if by_thread else self.rng.uniform(0, 0.02)) as scope:
            timer = threading.Timer(self.rng.uniform(0, 0.02), scope.cancel, ("on purpose",))
            if by_thread:
                timer.start()
            try:
                code, answer, _ = self.post(f"/stream?{seed},500")
                expected = b"".join(b"%d %d\n" % (seed, number) for number in range(500))
                expect(code == 200 and answer == expected, f"a cancelled stream: {code}, {len(answer)} bytes")
            except LEFT:
                pass
            finally:
                if by_thread:
                    timer.cancel()
                    timer.join()

    def time_out(self) -> None:
        try:
            if self.rng.random() < 0.5:
                self.session.get(f"{URL}/sleep", timeout=(120, 0.02))
            else:
                self.client.get(f"{URL}/sleep", timeout=httpx2.Timeout(120, read=0.02))
        except (ReadTimeout, httpx2.ReadTimeout):
            return
        raise Wrong("a handler that sleeps has answered")

    # -- faults ----------------------------------------------------------------------------------------

    def flood(self) -> None:
        seed = self.rng.getrandbits(32)
        code, answer, _ = self.post(f"/flood?{seed}")
        expect((code, answer) == (200, b"%d" % seed), f"flood: {code} {answer[:100]!r}")

    def fork(self) -> None:
        seed = self.rng.getrandbits(32)
        code, answer, _ = self.post(f"/fork?{seed}")
        expect((code, answer) == (200, b"%d" % seed), f"fork: {code} {answer[:100]!r}")

    def segfault(self) -> None:
        self.fault("/segfault", 500, "died")

    def leave(self) -> None:
        self.fault("/leave", 500, "died")

    def fail(self) -> None:
        self.fault("/fail", 500, "raised")

    def bomb(self) -> None:
        self.fault("/bomb", 500, "memory")

    def spin(self) -> None:
        self.fault("/spin", 504, "timeout")

    def stop(self) -> None:
        self.fault("/stop", 504, "timeout")

    def garbage(self) -> None:
        self.fault(f"/garbage?{self.rng.getrandbits(32)}", 502, "protocol")

    def cut(self, path: str) -> None:
        try:
            code, answer, _ = self.post(path)
        except CUT:
            return
        raise Wrong(f"{path} has ended well: {code} {answer[:100]!r}")

    def abort(self) -> None:
        self.cut("/abort")

    def late_segfault(self) -> None:
        self.cut("/late_segfault")


@dataclass(frozen=True)
class Kind:
    """A kind of call: how often it comes, and the outcomes that the pool may count for it."""

    run: Callable[[Caller], None]
    weight: float
    outcomes: frozenset[str]
    fault: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


def _kind(run: Callable[[Caller], None], weight: float, *outcomes: str, fault: bool = False) -> Kind:
    return Kind(run, weight, frozenset(outcomes), fault)


KINDS = [
    _kind(Caller.plain, 1000, "ok"),
    _kind(Caller.big, 30, "ok"),
    _kind(Caller.upload, 50, "ok"),
    _kind(Caller.stream, 100, "ok", "left"),
    _kind(Caller.cancel, 40, "ok", "left"),
    _kind(Caller.time_out, 3, "left"),
    _kind(Caller.flood, 3, "ok", fault=True),
    _kind(Caller.fork, 2, "ok", fault=True),
    _kind(Caller.segfault, 5, "died", fault=True),
    _kind(Caller.late_segfault, 3, "died", fault=True),
    _kind(Caller.leave, 5, "died", fault=True),
    _kind(Caller.fail, 10, "raised", fault=True),
    _kind(Caller.abort, 10, "aborted", fault=True),
    _kind(Caller.bomb, 0.5, "memory", fault=True),
    _kind(Caller.spin, 0.1, "timeout", fault=True),
    _kind(Caller.stop, 0.1, "timeout", fault=True),
    _kind(Caller.garbage, 3, "protocol", fault=True),
]
