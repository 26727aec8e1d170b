"""One start of a worker: its pipes and the order to its zygote, and the first frame that it sends."""

from __future__ import annotations

import os

import msgspec

from ..wire.frames import FAULT, READY, Frame
from ..wire.messages import FaultReport, Ready
from ..wire.printable import quoted
from .channel import Channel, make_pipe
from .line import make_line
from .logs import LogPipe
from .record import Worker
from .zygote_client import ZygoteClient

_decode_ready = msgspec.msgpack.Decoder(Ready).decode
_decode_report = msgspec.msgpack.Decoder(FaultReport).decode


def order_worker(zygote: ZygoteClient, number: int, label: str, concurrency: int) -> Worker:
    """Have the zygote fork a worker of up to so many lanes; gives its record, whose pid is still to come.

    BlockingIOError where the zygote has more orders than its socket holds, OSError where no descriptor is left, or
    where it is gone.
    """
    fds: list[int] = []
    try:
        for _ in range(4):
            fds += make_pipe()
        request_read, request_write, response_read, response_write, out_read, out_write, err_read, err_write = fds
        line, line_fd = make_line()
        try:
            channel = Channel(request_write, response_read)
        except OSError:
            line.close()
            fds.append(line_fd)
            raise
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    theirs = (request_read, response_write, out_write, err_write, line_fd)
    try:
        zygote.spawn(number, theirs)
    except OSError:
        channel.close()
        line.close()
        os.close(out_read)
        os.close(err_read)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    log = LogPipe(out_read, err_read, f"{label}worker {number} (starting)")
    worker = Worker(number, channel, line, log, concurrency)
    if concurrency > 1:
        log.find_job = worker.find_job
    return worker


def read_first_frame(worker: Worker, frames: list[Frame] | None) -> Ready | None:
    """What a worker that has started says; None where it failed, and `worker.failure` tells why, as far as it does."""
    kind, _, payload = frames[0] if frames else (None, 0, b"")
    try:
        if kind == READY and frames is not None and len(frames) == 1 and worker.channel.clean:
            return _decode_ready(payload)
        if kind == FAULT:
            report = _decode_report(payload)
            worker.failure_says_all = not report.traceback
            worker.failure = quoted(report.traceback or report.message)
        elif kind is not None:
            worker.failure = "its first frame was not READY: something in its start wrote to its response pipe"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        worker.failure = f"its first frame does not hold up: {error}"
    return None


def read_report(worker: Worker) -> None:
    """Read what a worker that is dead, and was never ready, has left in its pipe: `worker.failure` tells it."""
    channel = worker.channel
    frames: list[Frame] | None = []
    while frames == [] and not channel.starved:  # a frame has a cap
        frames = channel.receive()
    if frames:
        read_first_frame(worker, frames)
