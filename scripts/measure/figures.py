"""What a round trip, a stream, a death and a start cost here; ratios to raw pipes from the same run."""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import requests
from requests.adapters import BaseAdapter

from runner import (
    CancelScope,
    JobClosed,
    Pool,
    Recycle,
    Request,
    WorkerDied,
)
from runner.events import Event, WorkerReady
from runner.supervision.channel import make_pipe
from transport.requests import Transport

SMALL = b"x" * 256
MIB = 1 << 20
URL = "http://app.local"

Row = tuple[str, str]


class Floor:
    """A Python process that sends back what it reads from a raw pipe: what nothing can be faster than."""

    def __enter__(self) -> Floor:
        ours, self.write = os.pipe()
        self.read, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.write)
            while data := os.read(ours, 65536):
                os.write(theirs, data)
            os._exit(0)
        os.close(ours)
        os.close(theirs)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.write)
        os.close(self.read)
        os.waitpid(self.pid, 0)

    def ping(self) -> None:
        os.write(self.write, SMALL)
        os.read(self.read, 65536)


class Nothing(BaseAdapter):
    """An adapter that answers at once, without sending anything."""

    def send(self, request: requests.PreparedRequest, *args: object, **kwargs: object) -> requests.Response:
        response = requests.Response()
        response.status_code, response._content, response.request = 200, SMALL, request
        response.url = request.url or ""
        return response

    def close(self) -> None:
        """Nothing to close."""


def interleave(rounds: int, *calls: Callable[[], object], block: int = 1) -> list[list[float]]:
    """Call one after the other, `block` times each, round by round; the times of each, in microseconds."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + rounds // 10):
        for call, own in zip(calls, times, strict=True):
            for _ in range(block):
                began = time.perf_counter()
                call()
                if number >= rounds // 10:
                    own.append((time.perf_counter() - began) * 1e6)
    return times


def middle(times: list[float]) -> float:
    return statistics.median(times)


def show(times: list[float], unit: str = "µs") -> str:
    return f"{middle(times):.1f} {unit} median, {sorted(times)[int(len(times) * 0.99)]:.1f} {unit} p99"


def round_trips(pool: Pool, rounds: int) -> Iterator[Row]:
    """A small POST, at pool.open and through requests."""

    def opened() -> None:
        with pool.open(Request("POST", "/echo", body=SMALL)) as job:
            for _ in job:
                pass

    with Floor() as floor, requests.Session() as session:
        session.mount(URL, Transport(pool))
        session.mount("http://nothing/", Nothing())
        raw, own, through, empty = interleave(
            rounds,
            floor.ping,
            opened,
            lambda: session.post(URL + "/echo", data=SMALL),
            lambda: session.post("http://nothing/echo", data=SMALL),
        )
    yield "256 B there and back over raw pipes", show(raw)
    yield "the same at pool.open", f"{show(own)}; {middle(own) / middle(raw):.2f} x raw"
    yield "requests with an adapter that does nothing", show(empty)
    ratio = middle(through) / (middle(empty) + middle(raw))
    yield "the same through requests", f"{show(through)}; {ratio:.2f} x (that + raw)"


def tokens(pool: Pool) -> Iterator[Row]:
    """From a token's writing to its reading, through iter_lines with default arguments."""
    delays = []
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        for _ in range(3):
            with session.get(URL + "/stream", stream=True) as response:
                for line in response.iter_lines():
                    now = time.monotonic()
                    delays += [(now - float(written)) * 1e3 for written in line.split()[1:]]
    yield "a token's way, written to iter_lines()", show(delays, "ms")


def bandwidth(pool: Pool, mebibytes: int) -> Iterator[Row]:
    """A large body through requests each way, against the same over a raw pipe; medians of three rounds in turns."""
    raw, down, up = [], [], []
    piece = bytes(MIB)
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        for _ in range(3):
            raw.append(raw_bandwidth(mebibytes))
            began = time.perf_counter()
            with session.get(f"{URL}/down?{mebibytes}", stream=True) as response:
                assert sum(len(chunk) for chunk in response.iter_content(MIB)) == mebibytes * MIB
            down.append(mebibytes / (time.perf_counter() - began))
            began = time.perf_counter()
            assert session.post(URL + "/up", data=(piece for _ in range(mebibytes))).text == str(mebibytes * MIB)
            up.append(mebibytes / (time.perf_counter() - began))
    yield "a raw pipe of the same size, 1 MiB writes, 64 KiB reads", f"{middle(raw):.0f} MiB/s"
    for name, rates in ((f"{mebibytes} MiB down, iter_content(1 MiB)", down), (f"{mebibytes} MiB up, a generator", up)):
        yield name, f"{middle(rates):.0f} MiB/s; {middle(rates) / middle(raw):.2f} x raw"


def raw_bandwidth(mebibytes: int) -> float:
    read, write = make_pipe()
    piece = bytes(MIB)
    pid = os.fork()
    if not pid:
        os.close(read)
        for _ in range(mebibytes):
            left = memoryview(piece)
            while left:
                left = left[os.write(write, left) :]
        os._exit(0)
    os.close(write)
    began = time.perf_counter()
    while os.read(read, 65536):  # larger reads are slower: they allocate afresh each time
        pass
    took = time.perf_counter() - began
    os.close(read)
    os.waitpid(pid, 0)
    return mebibytes / took


def deaths(pool: Pool, rounds: int) -> Iterator[Row]:
    """From a worker's SIGKILL to its caller's error, and the next request against an ordinary one."""
    told, following, ordinary = [], [], []

    def echo() -> float:
        began = time.perf_counter()
        with pool.open(Request("POST", "/echo", body=SMALL)) as job:
            for _ in job:
                pass
        return (time.perf_counter() - began) * 1e6

    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            path = os.path.join(directory, "died")
            try:
                pool.open(Request("POST", "/die", body=path))
            except WorkerDied:
                now = time.monotonic()
            with open(path) as file:
                told.append((now - float(file.read())) * 1e3)
            following.append(echo())
            ordinary.append(echo())
    yield "death of a worker to its caller's error", show(told, "ms")
    yield "the next request after a crash", f"{show(following)}; an ordinary one: {middle(ordinary):.1f} µs"


def cancels(rounds: int) -> Iterator[Row]:
    """From scope.cancel to the caller freed, and to the last process of its job gone, without a grace time."""
    for how, name in (("plain", "a handler that spins"), ("double", "having double-forked")):
        freed, gone = [], []
        with Pool("scripts.measure.handlers:handler", workers=1, spares=1, preload=True, grace=0) as pool:
            for _ in range(rounds):
                with CancelScope() as scope:
                    job = pool.open(Request("POST", "/hang", body=how))
                    pids = [int(pid) for pid in job.read().split()]
                    began: list[float] = []
                    canceller = threading.Timer(0.02, cancel, (scope, began))
                    canceller.start()
                    try:
                        job.read()
                    except JobClosed:
                        now = time.monotonic()
                    canceller.join()
                    freed.append((now - began[0]) * 1e3)
                    while any(is_alive(pid) for pid in pids):
                        pass
                    gone.append((time.monotonic() - began[0]) * 1e3)
        yield f"scope.cancel to the caller freed, {name}", show(freed, "ms")
        yield "  to the last process gone", show(gone, "ms")


def cancel(scope: CancelScope, began: list[float]) -> None:
    began.append(time.monotonic())
    scope.cancel()


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def starts(rounds: int) -> Iterator[Row]:
    """From Pool.start() to all workers ready, from ordering one more worker to its READY, and an idle one's memory."""
    for preload in (False, True):
        pools, sizes, own = [], [], []
        workers: list[float] = []
        for _ in range(rounds):
            pool = Pool("scripts.examples.shop:app", workers=8, preload=preload)
            began = time.perf_counter()
            with pool:
                pools.append((time.perf_counter() - began) * 1e3)
                memory = [psutil.Process(info.pid).memory_full_info() for info in pool.workers()]
                sizes += [each.pss / MIB for each in memory]
                own += [each.uss / MIB for each in memory]
        with Pool("scripts.examples.shop:app", workers=1, preload=preload, recycle=Recycle(after_jobs=1)) as pool:
            events: list[Event] = []
            pool.subscribe(events.append)
            while len(workers) < rounds * 10:
                with pool.open(Request("GET", "/")) as job:
                    list(job)
                workers = [event.seconds * 1e3 for event in events if isinstance(event, WorkerReady)]
        name = "preloaded" if preload else "importing it"
        yield f"pool of 8 with a Flask app, {name}, ready", show(pools, "ms")
        yield "  one more worker of it, ready", show(workers, "ms")
        yield "  an idle worker of it", f"{middle(sizes):.1f} MiB (PSS), {middle(own):.1f} MiB of them its own"


def imports(rounds: int) -> Iterator[Row]:
    """What importing runner and transport.requests adds to importing requests."""
    code = (
        "import time, requests; t = time.perf_counter(); import runner, transport.requests; from runner import Pool; "
    )
    code += "print((time.perf_counter() - t) * 1e3)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(rounds)]
    yield "importing it, after requests", show(times, "ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5000, help="round trips to measure")
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the large bodies")
    arguments = parser.parse_args()
    logging.disable()  # the deaths are on purpose
    with Pool("scripts.measure.handlers:handler", workers=2, spares=1, preload=True) as pool:
        rows = [
            *round_trips(pool, arguments.rounds),
            *tokens(pool),
            *bandwidth(pool, arguments.mebibytes),
            *deaths(pool, max(arguments.rounds // 50, 10)),
        ]
    from scripts.measure import asynchronous

    rows += [
        *asynchronous.round_trips(arguments.rounds),
        *asynchronous.slow_streams(200),
        *asynchronous.thousand_streams(),
    ]
    rows += [*cancels(50), *starts(10), *imports(10)]
    for name, value in rows:
        print(f"{name:57} {value}")


if __name__ == "__main__":
    main()
