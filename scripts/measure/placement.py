"""A small POST against raw pipes with the scheduler's choice taken out: both ends on one core, or on two.

Where the kernel puts the two processes of a ping-pong decides more than anything that they do: on one core a wake-up
is a context switch, on two it wakes a core. A ratio of two things that were placed differently says nothing of either.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from runner import Pool, Request
from runner.supervision.channel import make_pipe
from runner.wire.frames import (
    BODY,
    END,
    HEAD,
    HEADER_SIZE,
    REQUEST,
    pack_header,
)
from runner.wire.messages import JobContext, RequestHead, ResponseHead
from scripts.measure.figures import SMALL, Floor, Row, interleave, middle

Call = Callable[[], None]

BLOCK = 20

_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(RequestHead).decode
_decode_response = msgspec.msgpack.Decoder(ResponseHead).decode


@contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Run on these cores; what is started meanwhile stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Framed:
    """The floor of any protocol with typed heads: poll, read, decode, encode, write at each end, and nothing else."""

    def __enter__(self) -> Framed:
        ours, self.write = make_pipe()
        self.read, theirs = make_pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.write)
            os.close(self.read)
            answer_all(ours, theirs)
            os._exit(0)
        os.close(ours)
        os.close(theirs)
        self.poll = select.poll()
        self.poll.register(self.read, select.POLLIN)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.write)
        os.close(self.read)
        os.waitpid(self.pid, 0)

    def ping(self) -> None:
        """One request with a body there, one response with it back."""
        head = _encode(
            RequestHead(
                "POST",
                "/echo",
                [],
                "http",
                ("localhost", 80),
                True,
                JobContext("a-1", "", "", "", {}, None),
                ("127.0.0.1", 0),
            )
        )
        os.write(self.write, b"".join((pack_header(REQUEST, 1, len(head)), head, *body_and_end(SMALL))))
        self.poll.poll()
        data = os.read(self.read, 65536)
        frames = split(data)
        _decode_response(frames[0])
        assert frames[1] == SMALL


def answer_all(ours: int, theirs: int) -> None:
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    while True:
        poll.poll()
        data = os.read(ours, 65536)
        if not data:
            return
        frames = split(data)
        _decode_request(frames[0])
        head = _encode(ResponseHead(200, []))
        os.write(theirs, b"".join((pack_header(HEAD, 1, len(head)), head, *body_and_end(frames[1]))))


def body_and_end(body: bytes) -> tuple[bytes, bytes, bytes]:
    return pack_header(BODY, 1, len(body)), body, pack_header(END, 1, 0)


def split(data: bytes) -> list[bytes]:
    """The payloads of whole frames."""
    payloads = []
    at = 0
    while at < len(data):
        start = at + HEADER_SIZE
        at = start + int.from_bytes(data[at + 5 : start], "little")
        payloads.append(data[start:at])
    return payloads


def opener(pool: Pool) -> Call:
    """What is measured: a small POST at pool.open."""

    def call() -> None:
        with pool.open(Request("POST", "/echo", body=SMALL)) as job:
            for _ in job:
                pass

    return call


def placements(rounds: int) -> Iterator[Row]:
    """The floors and pool.open, on one core and on two, in turns."""
    cores = sorted(os.sched_getaffinity(0))
    for name, host, other in (("one core", cores[0], cores[0]), ("two cores", cores[0], cores[-1])):
        with contextlib.ExitStack() as stack:
            with on({other}):
                floor = stack.enter_context(Floor())
                framed = stack.enter_context(Framed())
                pool = stack.enter_context(Pool("scripts.measure.handlers:handler", workers=1, preload=True))
            stack.enter_context(on({host}))
            raw, bare, own = interleave(rounds // BLOCK, floor.ping, framed.ping, opener(pool), block=BLOCK)
        yield (
            f"256 B there and back, both ends on {name}",
            f"raw {middle(raw):.1f} µs; frames and heads and nothing else {middle(bare):.1f}; "
            f"pool.open {middle(own):.1f} µs, {middle(own) / middle(raw):.2f} x raw, "
            f"{middle(own) / middle(bare):.2f} x frames and heads",
        )


def sizes(rounds: int) -> dict[int, float]:
    """The median of a small POST with so many idle workers, in microseconds, in turns, all on one core."""
    numbers = (2, 16, 64, 256)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on({min(os.sched_getaffinity(0))}))
        pools = [
            stack.enter_context(Pool("scripts.measure.handlers:handler", workers=number, preload=True))
            for number in numbers
        ]
        times = interleave(rounds // BLOCK, *map(opener, pools), block=BLOCK)
    return {number: middle(own) for number, own in zip(numbers, times, strict=True)}
