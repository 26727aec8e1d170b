"""Processor time of a small round trip: caller and worker together, on one core, in turns.

Where the time of a call depends on where its two ends run, its processor time does not. It is read from the scheduler
(/proc/<pid>/task/<tid>/schedstat, in nanoseconds).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from scripts.measure.figures import Row, middle
from scripts.measure.peers import PEERS, Call

FLOOR, OPEN, EXECUTOR = "raw pipe ping-pong (the floor)", "pool.open", "ProcessPoolExecutor"
EMPTY, REQUESTS = "requests, an adapter that does nothing", "requests, blastdoor"
NAMES = (FLOOR, OPEN, EXECUTOR, EMPTY, REQUESTS, "httpx2, blastdoor")


def _spent(pids: Sequence[int]) -> float:
    """Microseconds that these processes have run so far."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1000


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What is started in this block runs on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def times(calls: int, rounds: int = 7) -> dict[str, float]:
    """The median of several rounds, in microseconds, by each way."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with one_core(), contextlib.ExitStack() as stack:
        own = psutil.Process()
        ways: dict[str, tuple[Call, list[int]]] = {}
        for name in NAMES:
            before = {child.pid for child in own.children(recursive=True)}
            call = stack.enter_context(PEERS[name](1))
            for _ in range(200):
                call()
            started = [child.pid for child in own.children(recursive=True) if child.pid not in before]
            ways[name] = call, [os.getpid(), *started]
        for _ in range(rounds):
            for name, (call, pids) in ways.items():
                began = _spent(pids)
                for _ in range(calls):
                    call()
                found[name].append((_spent(pids) - began) / calls)
    return {name: middle(own_times) for name, own_times in found.items()}


def ratios(by_name: dict[str, float]) -> tuple[float, float]:
    """`pool.open` against ProcessPoolExecutor; and what we add to requests against what requests itself costs."""
    return by_name[OPEN] / by_name[EXECUTOR], (by_name[REQUESTS] - by_name[EMPTY]) / by_name[EMPTY]


def rows(by_name: dict[str, float]) -> list[Row]:
    """As `scripts/figures` shows it."""
    return [(f"processor time, {name}", f"{microseconds:.1f} µs") for name, microseconds in by_name.items()]


if __name__ == "__main__":
    measured = times(1000)
    for what, value in rows(measured):
        print(f"{what:57} {value}")
    against_executor, added = ratios(measured)
    print(f"pool.open against ProcessPoolExecutor {against_executor:.2f}; what we add to requests {added:.2f}")
