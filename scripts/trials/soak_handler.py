"""The handler that the soak runs: each answer can be checked, and each fault has its own path."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import signal
import sys
import time

from runner import AbortHandler, HandlerRequest, HandlerResponse

PIECE = 16 * 1024


def body_of(seed: int, size: int) -> bytes:
    """As many bytes as are asked for, which only this seed gives."""
    return random.Random(seed).randbytes(min(size, PIECE)) * (size // PIECE + 1)


def handler(request: HandlerRequest, response: HandlerResponse) -> bytes | None:
    """`/<what>?<number>,<number>`: what is to be done, and with which numbers."""
    numbers = [int(number) for number in request.query.split(",") if number]
    result: bytes | None = ACTIONS[request.path[1:]](request, response, *numbers)
    return result


def echo(request: HandlerRequest, response: HandlerResponse) -> bytes:
    response.headers["x-job"] = request.context.job_id
    return request.body.read()


def digest(request: HandlerRequest, response: HandlerResponse) -> bytes:
    seen = hashlib.sha256()
    while piece := request.body.read1(1 << 16):
        seen.update(piece)
    return seen.hexdigest().encode()


def big(request: HandlerRequest, response: HandlerResponse, seed: int, size: int) -> None:
    response.write(body_of(seed, size)[:size])


def stream(request: HandlerRequest, response: HandlerResponse, seed: int, count: int) -> None:
    for number in range(count):
        response.write(b"%d %d\n" % (seed, number))
        if number % 16 == 15:
            time.sleep(0.001)


def sleep(request: HandlerRequest, response: HandlerResponse) -> None:
    time.sleep(600)


def flood(request: HandlerRequest, response: HandlerResponse, seed: int) -> bytes:
    for _ in range(200):
        sys.stderr.write("flood " * 100 + "\n")
    return str(seed).encode()


def fork(request: HandlerRequest, response: HandlerResponse, seed: int) -> bytes:
    """Leaves a process behind that has left its session and its parent."""
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(600)
        os._exit(0)
    os.wait()
    response.headers["x-worker"] = str(os.getpid())
    return str(seed).encode()


def segfault(request: HandlerRequest, response: HandlerResponse) -> None:
    ctypes.string_at(0)


def late_segfault(request: HandlerRequest, response: HandlerResponse) -> None:
    response.write(b"the first of two")
    ctypes.string_at(0)


def leave(request: HandlerRequest, response: HandlerResponse) -> None:
    os._exit(3)


def fail(request: HandlerRequest, response: HandlerResponse) -> None:
    raise ValueError("on purpose")


def abort(request: HandlerRequest, response: HandlerResponse) -> None:
    raise AbortHandler


def bomb(request: HandlerRequest, response: HandlerResponse) -> None:
    kept = []
    while True:
        kept.append(b"x" * (4 << 20))


def spin(request: HandlerRequest, response: HandlerResponse) -> None:
    while True:
        pass


def stop(request: HandlerRequest, response: HandlerResponse) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def garbage(request: HandlerRequest, response: HandlerResponse, seed: int) -> None:
    # The worker's end of its response pipe; a first byte that is no kind of frame.
    os.write(4, b"\xff" + random.Random(seed).randbytes(200))
    time.sleep(600)


ACTIONS = {
    function.__name__: function
    for function in (
        echo, digest, big, stream, sleep, flood, fork, segfault, late_segfault, leave, fail, abort, bomb, spin, stop,
        garbage,
    )
}  # fmt: skip
