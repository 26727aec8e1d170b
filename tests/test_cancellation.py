"""Cancels inside a worker, at every instant that there is: what the next job finds."""

from __future__ import annotations

import dis
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import msgspec
import pytest

from runner.control.line_messages import pack_cancel
from runner.control.signals import SIGNAL
from runner.wire.exchange import ResponseExchange
from runner.wire.frames import (
    BODY,
    END,
    REQUEST,
    TO_HOST,
    FrameDecoder,
    encode,
)
from runner.wire.messages import JobContext, RequestHead
from runner.worker.cancellation import Cancellation
from runner.worker.handlers.native import HandlerRequest, HandlerResponse, NativeAdapter
from runner.worker.job_loop import run_job
from runner.worker.pipes import OutgoingResponse, Pipes
from runner.worker.stdio import OutputFlag
from runner.worker.threads import ThreadCancellation

HANDLE_SIGNALS = ("CALL", "RESUME", "JUMP_BACKWARD")
"""Bytecodes after which signals are handled (CPython's eval breaker)."""


class Bench:
    """A worker's ends of its pipes, its job loop, and a host's ends, all in this thread."""

    def __init__(
        self, handler: Callable[[HandlerRequest, HandlerResponse], bytes | None], *, threads: bool = False
    ) -> None:
        self.request_read, self.request_write = os.pipe()
        self.response_read, self.response_write = os.pipe()
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line_fd = theirs.detach()
        self.cancellation = ThreadCancellation() if threads else Cancellation(self.line_fd)
        self.cancellation.install()
        self.main = ThreadPoolExecutor(1) if threads else None
        self.pipes = Pipes(self.request_read, self.response_write, self.cancellation, OutputFlag())
        self.bridge = NativeAdapter(handler)

    def send(self, number: int, body: bytes, *, apart: bool) -> None:
        head = RequestHead("POST", "/", [], "http", ("app", 80), True, JobContext("job"), ("", 0))
        payload = encode(REQUEST, number, msgspec.msgpack.encode(head))
        frames = [payload, encode(BODY, number, body), encode(END, number)]
        for piece in frames if apart else [b"".join(frames)]:
            os.write(self.request_write, piece)

    def serve(self) -> None:
        """Serve one job, as a worker does."""
        request = self.pipes.next_request()
        run_job(self.bridge, request, OutgoingResponse(self.pipes, request.number), self.cancellation)
        request.skip()

    def cancel(self, number: int) -> None:
        """The caller of a job leaves: a signal says so, or another thread."""
        if isinstance(self.cancellation, ThreadCancellation):
            assert self.main is not None
            self.main.submit(self.cancellation.cancel, number).result()
        else:
            self.line.send(pack_cancel(0, number))
            signal.raise_signal(SIGNAL)

    def answer(self, number: int) -> ResponseExchange:
        """What has come back of this job."""
        exchange = ResponseExchange(number, "POST")
        exchange.receive(FrameDecoder(TO_HOST).feed(os.read(self.response_read, 65536)))
        return exchange

    def close(self) -> None:
        ends = self.request_read, self.request_write, self.response_read, self.response_write
        for fd in (*ends, self.line_fd):
            os.close(fd)
        self.line.close()
        if self.main is not None:
            self.main.shutdown()


@pytest.fixture
def keep_signal() -> Iterator[None]:
    before = signal.getsignal(SIGNAL)
    gc.disable()  # what is raised in a callback of the collector's (Hypothesis has one) is nobody's: Python drops it
    yield
    gc.enable()
    signal.signal(SIGNAL, before)


def whole(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return request.body.read()


def in_writes(request: HandlerRequest, response: HandlerResponse) -> None:
    for byte in request.body.read():
        response.write(bytes([byte]))


def unread(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return b"abc"


def run_cancelled_at(bench: Bench, number: int, instant: int) -> bool:
    """Serve one job, whose cancel comes at the instant of that number; whether there were as many.

    The instants are those at which Python handles signals: it enters a function, has called one, or jumps backwards.
    """
    left = instant
    before: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            last = before.get(frame)
            before[frame] = frame.f_lasti
            if last is not None and dis.opname[frame.f_code.co_code[last]].startswith(HANDLE_SIGNALS):
                left -= 1
                if left == -1:
                    sys.settrace(None)
                    bench.cancel(number)
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        bench.serve()
    finally:
        sys.settrace(outer)
    return left < 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("threads", [False, True], ids=["a signal", "a thread"])
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "apart"])
@pytest.mark.parametrize("handler", [whole, in_writes, unread])
@pytest.mark.usefixtures("keep_signal")
def test_a_cancel_at_every_instant(
    handler: Callable[[HandlerRequest, HandlerResponse], bytes | None], apart: bool, threads: bool
) -> None:
    """C5, I5, K2: wherever in a job its cancel comes, its response is well formed, and the next job is served whole."""
    bench = Bench(handler, threads=threads)
    try:
        instant = 0
        number = 1
        while True:
            bench.send(number, b"abc", apart=apart)
            came = run_cancelled_at(bench, number, instant)
            answer = bench.answer(number)
            assert not answer.violation, (instant, answer.violation)
            assert not answer.unfinished, instant
            if not came:
                break
            bench.send(number + 1, b"abc", apart=apart)
            bench.serve()
            answer = bench.answer(number + 1)
            assert b"".join(answer.body) == b"abc", instant
            assert answer.whole, instant
            assert answer.report is None, instant
            instant += 1
            number += 2
    finally:
        bench.close()
    print(instant, "instants")
    assert instant > 50
