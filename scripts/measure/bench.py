"""What it costs, against what a user would pick instead: everything in one run, interleaved round by round.

Writes a table to the terminal, <report>.json, and <report>.html with plots.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runner import Pool, Request
from scripts.measure import asynchronous, figures, placement, processor, sandbox
from scripts.measure.figures import interleave, middle
from scripts.measure.peers import PEERS, UNISOLATED, Call
from scripts.trials.report import Page

FLOOR, OPEN, REQUESTS = "raw pipe ping-pong (the floor)", "pool.open", "requests, blastdoor"
EMPTY, GUNICORN = "requests, an adapter that does nothing", "requests, gunicorn sync, unix socket"
TOKEN = b"t" * 64
BLOCK = 20
"""How often each is called before it is the next one's turn: a caller with one thing to do does not jump about."""


@dataclass(frozen=True)
class Aim:
    """What was aimed at: a ratio, and what it may be at most, or at least."""

    what: str
    aim: str
    measured: float
    met: bool


def at_most(what: str, limit: float, measured: float) -> Aim:
    return Aim(what, f"≤ {limit:.3g} x", measured, measured <= limit)


def at_least(what: str, limit: float, measured: float) -> Aim:
    return Aim(what, f"≥ {limit:g} x", measured, measured >= limit)


def latencies(rounds: int) -> dict[str, list[float]]:
    """The times of a small POST by each peer with two workers, in microseconds, in turns."""
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(peer(2)) for name, peer in PEERS.items()}
        return dict(zip(calls, interleave(rounds // BLOCK, *calls.values(), block=BLOCK), strict=True))


def rate(call: Call, threads: int, seconds: float) -> float:
    """Calls a second from so many threads at once."""
    counts = [0] * threads
    stop, start = threading.Event(), threading.Barrier(threads + 1)

    def work(number: int) -> None:
        call()  # what a thread's own client does once
        start.wait()
        while not stop.is_set():
            call()
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)


def throughputs(seconds: float, tick: Callable[[], None]) -> dict[str, dict[int, float]]:
    """Calls a second at 1, 8 and 32 threads, with as many workers as cores; the median of three interleaved rounds."""
    cores = os.cpu_count() or 1
    found: dict[str, dict[int, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(peer(cores)) for name, peer in PEERS.items() if name not in UNISOLATED}
        for _ in range(3):
            for threads in (1, 8, 32):
                for name, call in calls.items():
                    found.setdefault(name, {}).setdefault(threads, []).append(rate(call, threads, seconds))
                    tick()
    return {name: {threads: middle(rates) for threads, rates in own.items()} for name, own in found.items()}


def token_rates(tokens: int) -> tuple[float, float]:
    """Tokens of 64 bytes a second, each its own write: through a raw pipe, and on one stream."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        for _ in range(tokens):
            os.write(write, TOKEN)
        os._exit(0)
    os.close(write)
    began = time.perf_counter()
    while os.read(read, 65536):
        pass
    raw = tokens / (time.perf_counter() - began)
    os.close(read)
    os.waitpid(pid, 0)
    with Pool("scripts.measure.handlers:handler", workers=1, preload=True) as pool:
        began = time.perf_counter()
        with pool.open(Request("GET", f"/tokens?{tokens}")) as job:
            size = sum(len(piece) for piece in job)
        ours = tokens / (time.perf_counter() - began)
    assert size == tokens * len(TOKEN)
    return raw, ours


def judge(
    times: dict[str, list[float]],
    rates: dict[str, dict[int, float]],
    tokens: tuple[float, float],
    by_size: dict[int, float],
    bandwidth: tuple[float, float],
    spent: dict[str, float],
) -> list[Aim]:
    """What was aimed at, and what came of it."""
    p50 = {name: middle(own) for name, own in times.items()}
    aims = [
        at_most("pool.open, against raw pipes", 1.5, p50[OPEN] / p50[FLOOR]),
        at_most(
            "requests, against (an adapter that does nothing + raw pipes)",
            1.25,
            p50[REQUESTS] / (p50[EMPTY] + p50[FLOOR]),
        ),
        at_most("requests, against requests to gunicorn over a unix socket", 1 / 3, p50[REQUESTS] / p50[GUNICORN]),
        at_most("pool.open, against ProcessPoolExecutor", 0.25, p50[OPEN] / p50["ProcessPoolExecutor"]),
    ]
    pools = ("pebble", "loky", "multiprocess.Pool")
    aims += [at_most(f"pool.open, against {name}", 1, p50[OPEN] / p50[name]) for name in pools]
    for threads in (1, 8, 32):
        best = max(own[threads] for name, own in rates.items() if "blastdoor" not in name and name != OPEN)
        aims.append(
            at_least(
                f"calls a second of pool.open at {threads} threads, against the best peer",
                1,
                rates[OPEN][threads] / best,
            )
        )
        http = max(own[threads] for name, own in rates.items() if name.startswith("requests, gunicorn"))
        aims.append(
            at_least(
                f"calls a second of requests at {threads} threads, against gunicorn's best",
                1,
                rates[REQUESTS][threads] / http,
            )
        )
    aims.append(at_least("a large body down, against a raw pipe", 0.7, bandwidth[0]))
    aims.append(at_least("a large body up, against a raw pipe", 0.7, bandwidth[1]))
    aims.append(at_least("tokens of 64 B, each its own write, against a raw pipe", 0.5, tokens[1] / tokens[0]))
    aims.append(at_most("256 idle workers, against 2", 1.1, by_size[256] / by_size[2]))
    against_executor, added = processor.ratios(spent)
    aims.append(at_most("processor time of pool.open, against ProcessPoolExecutor", 0.4, against_executor))
    aims.append(at_most("processor time that we add to requests, against its own", 0.7, added))
    return aims


def distributions(times: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    names = sorted(times, key=lambda name: middle(times[name]))
    axes.boxplot(
        [times[name] for name in names], orientation="horizontal", tick_labels=names, whis=(1, 99), showfliers=False
    )
    axes.set_xscale("log")
    axes.set_xlabel("microseconds for 256 bytes there and back: median, quartiles, 1st and 99th percentile")
    axes.invert_yaxis()
    return figure


def by_threads(rates: dict[str, dict[int, float]]) -> Figure:
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    for name, own in sorted(rates.items(), key=lambda item: -item[1][8]):
        axes.plot([str(threads) for threads in own], list(own.values()), marker="o", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("threads, with as many workers as cores")
    axes.set_ylabel("calls a second")
    axes.legend(fontsize=7)
    return figure


def by_number(by_size: dict[int, float]) -> Figure:
    figure = Figure(figsize=(9, 3))
    axes = figure.subplots()
    axes.plot([str(number) for number in by_size], list(by_size.values()), marker="o")
    axes.set_xlabel("idle workers of the pool, all on one core")
    axes.set_ylabel("µs, median")
    axes.set_ylim(bottom=0)
    return figure


def main() -> int:
    """Measure, print, and write the reports."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="rounds of the latency comparison (default: 2000)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each throughput measurement (default: 0.5)")
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the large bodies (default: 1024)")
    parser.add_argument("--report", type=Path, default=Path("bench"), help="where to: <report>.html and <report>.json")
    arguments = parser.parse_args()
    logging.disable()  # the deaths are on purpose
    console = Console(width=120)
    with Progress(console=console, transient=True) as progress:
        peers = len(PEERS) - len(UNISOLATED)
        task = progress.add_task("measuring", total=10 + 9 * peers)

        def step(words: str, ticks: int = 2) -> None:
            progress.update(task, description=words, advance=ticks)

        step("latencies of all peers", 0)
        times = latencies(arguments.rounds)
        step("throughput of all peers")
        rates = throughputs(arguments.seconds, lambda: progress.advance(task))
        step("tokens")
        tokens = sorted(token_rates(100_000) for _ in range(3))[1]
        step("pool sizes")
        by_size = placement.sizes(arguments.rounds)
        step("processor time", 0)
        spent = processor.times(1000)
        step("large bodies, deaths, cancels, starts")
        rows, bandwidth = supervision(arguments)
        step("done")
    aims = judge(times, rates, tokens, by_size, bandwidth, spent)
    rows = [*processor.rows(spent), *rows]
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release()}"
    console.print(machine)
    show(console, times, rates, aims, rows)
    write(arguments.report, machine, times, rates, tokens, by_size, aims, rows)
    console.print(f"report: {arguments.report.with_suffix('.html')}, {arguments.report.with_suffix('.json')}")
    return 0


def supervision(arguments: Any) -> tuple[list[figures.Row], tuple[float, float]]:
    """The figures of `scripts/figures`, and the bandwidths against raw, down and up."""
    with Pool("scripts.measure.handlers:handler", workers=2, spares=1, preload=True) as pool:
        rows = [*figures.tokens(pool), *figures.bandwidth(pool, arguments.mebibytes), *figures.deaths(pool, 100)]
    rows += [*placement.placements(arguments.rounds * 2)]
    rows += [
        *asynchronous.round_trips(arguments.rounds),
        *asynchronous.slow_streams(200),
        *asynchronous.thousand_streams(),
    ]
    rows += [*sandbox.requests_through(arguments.rounds), *sandbox.starts(50)]
    rows += [*figures.cancels(30), *figures.starts(5), *figures.imports(5)]
    ratios = [float(value.rpartition("; ")[2].split()[0]) for name, value in rows if " MiB " in name and "; " in value]
    return rows, (ratios[0], ratios[1])


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def show(
    console: Console,
    times: dict[str, list[float]],
    rates: dict[str, dict[int, float]],
    aims: list[Aim],
    rows: list[figures.Row],
) -> None:
    """Print the tables."""
    table = Table(title="256 bytes there and back")
    for name in ("by", "median µs", "p99 µs", "x floor", "1 thread /s", "8 /s", "32 /s"):
        table.add_column(name)
    for name in sorted(times, key=lambda name: middle(times[name])):
        own = times[name]
        counts = [f"{rates[name][threads]:,.0f}" for threads in (1, 8, 32)] if name in rates else ["", "", ""]
        ratio = f"{middle(own) / middle(times[FLOOR]):.2f}"
        table.add_row(name, f"{middle(own):.1f}", f"{p99(own):.1f}", ratio, *counts)
    console.print(table)
    table = Table(title="what was aimed at")
    for name in ("what", "aim", "measured", ""):
        table.add_column(name)
    for aim in aims:
        table.add_row(aim.what, aim.aim, f"{aim.measured:.2f} x", "met" if aim.met else "[red]missed")
    console.print(table)
    for name, value in rows:
        console.print(f"{name:57} {value}", highlight=False)


def write(
    report: Path,
    machine: str,
    times: dict[str, list[float]],
    rates: dict[str, dict[int, float]],
    tokens: tuple[float, float],
    by_size: dict[int, float],
    aims: list[Aim],
    rows: list[figures.Row],
) -> None:
    """Write the JSON and the page."""
    latency = {name: {"p50": middle(own), "p99": p99(own)} for name, own in times.items()}
    found = {
        "machine": machine,
        "latency, µs": latency,
        "calls a second by threads": rates,
        "tokens a second": {"raw": tokens[0], "stream": tokens[1]},
        "median µs by idle workers": by_size,
        "aims": [{"what": aim.what, "aim": aim.aim, "measured": aim.measured, "met": aim.met} for aim in aims],
        "other": dict(rows),
    }
    report.with_suffix(".json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    page = Page("blastdoor bench")
    page.text(f"{machine}. Everything in one run, interleaved; ratios count, microseconds are this machine's.")
    page.heading("What was aimed at")
    verdicts = [(aim.what, aim.aim, f"{aim.measured:.2f} x", "met" if aim.met else "missed") for aim in aims]
    page.table(("what", "aim", "measured", ""), verdicts)
    page.heading("256 bytes there and back")
    page.plot(distributions(times))
    page.heading("Calls a second by concurrency")
    page.plot(by_threads(rates))
    page.heading("Cost by pool size")
    page.plot(by_number(by_size))
    page.heading("Deaths, cancels, starts, bodies")
    page.table(("what", "measured"), rows)
    page.save(report.with_suffix(".html"))


if __name__ == "__main__":
    sys.exit(main())
