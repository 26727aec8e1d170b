"""What a job on the cluster costs, against Ray's own calls of the same cluster, in turns in one run. A table.

Two nodes on this machine; the jobs and the calls all go to the second one's processes, or to both, as a user's would.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

from runner import Request
from runner.cluster import ClusterPool

HANDLER: Final = "scripts.measure.handlers:handler"
SMALL: Final = b"x" * 64
STORE: Final = 80 << 20


class Smallest:
    """Ray's own smallest actor call."""

    def call(self, data: bytes) -> bytes:
        return b""

    def tokens(self, count: int) -> Any:
        for _ in range(count):
            yield SMALL


class SmallestAsync:
    """The same with an async method."""

    async def call(self, data: bytes) -> bytes:
        return b""


Call = Callable[[], object]


def interleaved(rounds: int, calls: dict[str, Call]) -> dict[str, float]:
    """The median time of each call in microseconds, in turns. A call that gives a time has ended then."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 20):
        for name, call in calls.items():
            began = time.perf_counter()
            ended = call()
            if number >= 20:
                times[name].append((ended if isinstance(ended, float) else time.perf_counter()) - began)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


def rate(call: Call, callers: int, seconds: float) -> float:
    """Calls a second by so many threads."""
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def work(number: int) -> None:
        while time.perf_counter() < until:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each rate")
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE}
    )
    try:
        cluster.add_node(num_cpus=2, object_store_memory=STORE)
        with ClusterPool(HANDLER, address=cluster.address, workers=8) as pool:
            measure(pool, given.rounds, given.seconds)
    finally:
        cluster.shutdown()


def measure(pool: ClusterPool, rounds: int, seconds: float) -> None:
    # One function, though long: it reads as the list of what is measured.
    node = sorted(pool._host.links)[0]
    there = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    sync: Any = ray.remote(num_cpus=0)(Smallest).options(**there).remote()
    with_loop: Any = ray.remote(num_cpus=0)(SmallestAsync).options(max_concurrency=100, **there).remote()

    def small() -> None:
        with pool.open(Request("POST", "/echo", body=SMALL)) as job:
            assert b"".join(job) == SMALL

    def first_byte() -> float:
        with pool.open(Request("GET", "/two")) as job:
            assert job.read()
            told = time.perf_counter()
            b"".join(job)
        return told

    def stream(count: int) -> float:
        began = time.perf_counter()
        with pool.open(Request("GET", f"/tokens?{count}")) as job:
            assert sum(map(len, job)) == 64 * count
        return count / (time.perf_counter() - began)

    def generator(count: int) -> float:
        began = time.perf_counter()
        tokens = sync.tokens.options(num_returns="streaming", _generator_backpressure_num_objects=8).remote(count)
        assert sum(len(ray.get(token)) for token in tokens) == 64 * count
        return count / (time.perf_counter() - began)

    def download() -> float:
        began = time.perf_counter()
        with pool.open(Request("GET", "/down?128")) as job:
            assert sum(map(len, job)) == 128 << 20
        return 128 / (time.perf_counter() - began)

    def upload() -> float:
        began = time.perf_counter()
        with pool.open(Request("POST", "/up", body=bytes(128 << 20))) as job:
            assert b"".join(job) == b"%d" % (128 << 20)
        return 128 / (time.perf_counter() - began)

    ray_call, ray_async = "Ray, smallest actor call", "Ray, smallest async call"
    times = interleaved(
        rounds,
        {
            ray_call: lambda: ray.get(sync.call.remote(SMALL)),
            ray_async: lambda: ray.get(with_loop.call.remote(SMALL)),
            "a small POST, buffered": small,
            "to the first streamed byte": first_byte,
        },
    )
    calls: list[tuple[str, Call]] = [
        (ray_call, lambda: ray.get(sync.call.remote(SMALL))),
        (ray_async, lambda: ray.get(with_loop.call.remote(SMALL))),
        ("a small POST, buffered", small),
    ]
    rates: dict[str, list[float]] = {name: [] for name, _ in calls}
    for _ in range(3):
        for name, call in calls:
            rates[name].append(rate(call, 16, seconds))
    table = Table(title="ClusterPool on two Ray nodes of this machine")
    for column in ("", "median, one caller", "x Ray's call", "calls/s, 16 callers", "x Ray's"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in times.items():
        cells = [name, f"{found:,.0f} µs", f"{found / times[ray_call]:.2f}"]
        if name in rates:
            middle = statistics.median(rates[name])
            cells += [f"{middle:,.0f}", f"{middle / statistics.median(rates[ray_call]):.2f}"]
        table.add_row(*cells)
    console = Console(width=110)
    console.print(table)
    console.print(f"20,000 frames of 64 B: {statistics.median(stream(20_000) for _ in range(3)):,.0f} a second")
    console.print(f"as yields of a streaming generator of Ray's: {generator(2_000):,.0f} a second")
    bodies: dict[str, list[float]] = {"down": [], "up": []}
    for _ in range(5):
        bodies["down"].append(download())
        bodies["up"].append(upload())
    for way, measured in bodies.items():
        middle, least, most = statistics.median(measured), min(measured), max(measured)
        console.print(f"128 MiB {way}: {middle:,.0f} MiB/s; {least:,.0f} to {most:,.0f} of five")


if __name__ == "__main__":
    main()
