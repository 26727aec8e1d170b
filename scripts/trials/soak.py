"""Mixed traffic with faults, every answer checked, and nothing left behind: at the end, or at Ctrl-C, a report.

Exits with 1 on any wrong answer, any call that hangs, any leak, and any fault that nobody asked for.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import os
import random
import signal
import statistics
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live
from rich.table import Table

from runner import Limits, Pool, Recycle
from runner.events import Event, JobEnded, JobStarted, WorkerEnded
from scripts.trials.async_traffic import ASYNC_KINDS, run_tasks
from scripts.trials.report import Page
from scripts.trials.traffic import KINDS, WALL_SECONDS, Caller, Kind, Wrong

HUNG_AFTER = 150.0
MIB = 1 << 20


@dataclass
class Sample:
    """What one look at the processes showed; memory in bytes."""

    at: float
    calls: int
    faults: int
    host: int
    zygote: int
    worker: float
    workers: int
    descriptors: int
    threads: int


@dataclass
class Tally:
    """What the callers and the pool have counted."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    calls: collections.Counter[str] = field(default_factory=collections.Counter)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    started: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    under_way: dict[object, tuple[str, float]] = field(default_factory=dict)

    def begin(self, caller: object, kind: str) -> None:
        """A caller begins a call."""
        self.under_way[caller] = kind, time.monotonic()

    def end(self, caller: object, kind: str, error: BaseException | None) -> None:
        """It has ended, with an error where its answer was not what it has to be."""
        with self.lock:
            del self.under_way[caller]
            self.calls[kind] += 1
            if error is not None:
                words = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error)[-3:])
                self.wrong.append(f"{kind}: {words}")

    def note(self, event: Event) -> None:
        """What the pool tells."""
        with self.lock:
            if isinstance(event, JobStarted):
                self.started += 1
            elif isinstance(event, JobEnded):
                self.outcomes[event.outcome] += 1
            elif isinstance(event, WorkerEnded):
                self.ends[event.signal or f"exit {event.exit_code}"] += 1

    def hung(self) -> list[str]:
        """Calls that take longer than any of them may."""
        now = time.monotonic()
        return [kind for kind, began in list(self.under_way.values()) if now - began > HUNG_AFTER]


def call_on(pool: Pool, tally: Tally, kinds: list[Kind], seed: str, stop: threading.Event) -> None:
    """One caller's life."""
    rng = random.Random(seed)
    caller = Caller(pool, rng)
    weights = [kind.weight for kind in kinds]
    while not stop.is_set():
        kind = rng.choices(kinds, weights)[0]
        tally.begin(caller, kind.name)
        error: BaseException | None = None
        try:
            kind.run(caller)
        except BaseException as raised:  # noqa: BLE001 - it is counted
            error = raised
        tally.end(caller, kind.name, error)
    caller.close()


def look(pool: Pool, host: psutil.Process, began: float, tally: Tally, faults: set[str]) -> Sample:
    """Take a sample."""
    pids = {worker.pid for worker in pool.workers()}
    zygote, sizes = 0, []
    for child in host.children():
        try:
            zygote += child.memory_info().rss
            sizes += [process.memory_info().rss for process in child.children() if process.pid in pids]
        except psutil.Error:
            continue  # it has ended meanwhile
    calls = dict(tally.calls)
    return Sample(
        at=time.monotonic() - began,
        calls=sum(calls.values()),
        faults=sum(count for name, count in calls.items() if name in faults),
        host=host.memory_info().rss,
        zygote=zygote,
        worker=statistics.median(sizes) if sizes else 0,  # one of them may be on its way to its limit
        workers=len(pids),
        descriptors=host.num_fds(),
        threads=host.num_threads(),
    )


def table(samples: list[Sample], tally: Tally, pool: Pool, minutes: float) -> Table:
    """The live table."""
    last = samples[-1]
    earlier = samples[max(len(samples) - 6, 0)]
    rate = (last.calls - earlier.calls) / max(last.at - earlier.at, 1e-9)
    stats = pool.stats()
    shown = Table(title=f"soak, {last.at / 60:.1f} of {minutes:g} min", min_width=70)
    for name in ("what", "now", "in all"):
        shown.add_column(name)
    shown.add_row("calls", f"{rate:,.0f}/s", f"{last.calls:,}")
    shown.add_row("faults on purpose", "", f"{last.faults:,}")
    shown.add_row("wrong, hung", str(len(tally.hung())), str(len(tally.wrong)))
    shown.add_row(
        "workers idle, busy, starting", f"{stats.idle}, {stats.busy}, {stats.starting}", f"{stats.deaths:,} died"
    )
    memory = f"{last.host / MIB:.0f}, {last.zygote / MIB:.0f}, {last.worker / MIB:.0f} MiB"
    shown.add_row("memory of host, zygote, a worker", memory, "")
    shown.add_row("descriptors, threads", f"{last.descriptors}, {last.threads}", "")
    for outcome, count in sorted(tally.outcomes.items()):
        shown.add_row(f"jobs that ended: {outcome}", "", f"{count:,}")
    return shown


def at_rest(pool: Pool, workers: int, seconds: float = 30) -> bool:
    """Wait until all workers are idle again; whether that came to be."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = pool.stats()
        if (stats.idle, stats.busy, stats.starting) == (workers, 0, 0):
            return True
        time.sleep(0.05)
    return False


def given_back(host: psutil.Process, before: tuple[int, int], seconds: float = 5) -> tuple[int, int]:
    """Descriptors and threads of the host; a thread that was joined may take a moment more to be gone."""
    deadline = time.monotonic() + seconds
    while True:
        now = host.num_fds(), host.num_threads()
        if all(held <= was for held, was in zip(now, before, strict=True)) or time.monotonic() > deadline:
            return now
        time.sleep(0.02)


def growth(samples: list[Sample], name: str) -> float:
    """By how much a memory grew over the second half, in bytes, as a straight line through it has it."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0
    slope, _ = statistics.linear_regression([each.at for each in half], [getattr(each, name) for each in half])
    return slope * (half[-1].at - half[0].at)


def unaccounted(tally: Tally, kinds: list[Kind]) -> list[str]:
    """Where the pool's count of how jobs ended is not what the calls have asked for."""
    expected: collections.Counter[str] = collections.Counter()
    for kind in kinds:
        if len(kind.outcomes) == 1:
            expected[next(iter(kind.outcomes))] += tally.calls[kind.name]
    complaints = [
        f"{tally.outcomes[outcome]} jobs ended as {outcome!r}, {expected[outcome]} were asked for"
        for outcome in ("died", "raised", "aborted", "memory", "timeout", "protocol", "incomplete")
        if tally.outcomes[outcome] != expected[outcome]
    ]
    if tally.started != sum(tally.outcomes.values()):
        complaints.append(f"{tally.started} jobs were started, {sum(tally.outcomes.values())} have ended")
    whole = tally.outcomes["ok"] + tally.outcomes["left"]
    asked = sum(tally.calls[kind.name] for kind in kinds if kind.outcomes <= {"ok", "left"})
    unsure = sum(tally.calls[kind.name] for kind in kinds if "cancel" in kind.name)  # may end before they have a worker
    if not asked - unsure <= whole <= asked:
        complaints.append(f"{whole} jobs ended well or were left, {asked} calls asked for such")
    return complaints


def leaks(before: tuple[int, int], after: tuple[int, int], samples: list[Sample]) -> list[str]:
    """What was not given back."""
    complaints = [
        f"{name}: {was} at rest before, {now} after"
        for name, was, now in zip(("descriptors", "threads"), before, after, strict=True)
        if now > was
    ]
    for name in ("host", "zygote", "worker"):
        grown, size = growth(samples, name), statistics.fmean(getattr(each, name) for each in samples)
        if grown > max(8 * MIB, size * 0.1):
            complaints.append(f"memory of the {name} grew by {grown / MIB:.1f} MiB in the second half")
    return complaints


def plots(samples: list[Sample]) -> Figure:
    """Rates, workers, memory and descriptors over time."""
    figure = Figure(figsize=(9, 9))
    axes = figure.subplots(4, 1, sharex=True)
    times = [each.at / 60 for each in samples]
    pairs = list(itertools.pairwise(samples))
    for name, label in (("calls", "calls"), ("faults", "faults on purpose")):
        rates = [(getattr(b, name) - getattr(a, name)) / (b.at - a.at) for a, b in pairs]
        axes[0].plot(times[1:], rates, label=label, linewidth=0.8)
    axes[1].plot(times, [each.workers for each in samples], label="workers", linewidth=0.8)
    for name in ("host", "zygote", "worker"):
        axes[2].plot(times, [getattr(each, name) / MIB for each in samples], label=name, linewidth=0.8)
    for name in ("descriptors", "threads"):
        axes[3].plot(times, [getattr(each, name) for each in samples], label=name, linewidth=0.8)
    for each, label in zip(axes, ("per second", "workers", "RSS, MiB", "of the host"), strict=True):
        each.set_ylabel(label)
        each.set_ylim(bottom=0)
        each.legend(loc="upper right", fontsize=7)
    axes[-1].set_xlabel("minutes")
    return figure


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all random choices; it is printed")
    parser.add_argument("--faults", default="all", help="all (default), none, or some names, separated by commas")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--callers", type=int, default=16, help="a quarter of them are tasks of one event loop")
    parser.add_argument("--report", type=Path, default=Path("soak"), help="where to: <report>.html and <report>.json")
    arguments = parser.parse_args()
    names = {kind.name for kind in KINDS if kind.fault}
    chosen = names if arguments.faults == "all" else set(arguments.faults.split(",")) - {"none"}
    if unknown := chosen - names:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    kinds = [kind for kind in KINDS if not kind.fault or kind.name in chosen]
    logging.disable()  # the faults are on purpose
    console = Console()
    console.print(f"seed {arguments.seed}")
    return soak(arguments, kinds, console)


def soak(arguments: Any, kinds: list[Kind], console: Console) -> int:
    """Warm up, let the callers loose until the time is up or Ctrl-C comes, and account for everything."""
    stop, tally, host = threading.Event(), Tally(), psutil.Process()
    signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    pool = Pool(
        "scripts.trials.soak_handler:handler",
        workers=arguments.workers,
        preload=True,
        limits=Limits(memory="256MiB", wall_seconds=WALL_SECONDS),
        recycle=Recycle(after_jobs=2000, jitter=0.2),
    ).start()
    began = time.monotonic()
    faults = {kind.name for kind in kinds if kind.fault}
    samples: list[Sample] = []
    problems: list[str] = []
    try:
        warm_up(pool, kinds, arguments)
        if not at_rest(pool, arguments.workers):
            problems.append(f"not at rest after the warm-up: {pool.stats()}")
        # A worker that serves its first task costs the host one descriptor more, for as long as it lives.
        before = host.num_fds() + arguments.workers, host.num_threads()
        pool.subscribe(tally.note)
        threads = [
            threading.Thread(target=call_on, args=(pool, tally, kinds, f"{arguments.seed}/{number}", stop), daemon=True)
            for number in range(arguments.callers - arguments.callers // 4)
        ]
        tasks = (pool, tally, arguments.callers // 4, arguments.seed, stop)
        threads.append(threading.Thread(target=run_tasks, args=tasks, daemon=True))
        began = time.monotonic()
        for thread in threads:
            thread.start()
        watch(pool, host, began, tally, faults, samples, arguments.minutes, stop, console)
        stop.set()
        for thread in threads:
            thread.join(HUNG_AFTER)
        problems += [f"hung: {kind}" for kind, _ in tally.under_way.values()]
        if not at_rest(pool, arguments.workers):
            problems.append(f"not at rest at the end: {pool.stats()}")
        problems += unaccounted(tally, [*kinds, *ASYNC_KINDS])
        problems += leaks(before, given_back(host, before), samples)
    finally:
        pool.close(drain=0)
    if left := host.children(recursive=True):
        problems.append(f"processes left: {left}")
    return finish(arguments, tally, samples, problems, time.monotonic() - began, console)


def warm_up(pool: Pool, kinds: list[Kind], arguments: Any) -> None:
    """Each kind once, so that what is loaded or opened once is there."""
    caller = Caller(pool, random.Random(arguments.seed))
    for kind in kinds:
        kind.run(caller)
    caller.close()
    ended = threading.Event()
    ended.set()
    run_tasks(pool, Tally(), 1, arguments.seed, ended)


def watch(
    pool: Pool,
    host: psutil.Process,
    began: float,
    tally: Tally,
    faults: set[str],
    samples: list[Sample],
    minutes: float,
    stop: threading.Event,
    console: Console,
) -> None:
    """Take samples and show them until the time is up, somebody stops it, or a call hangs."""
    samples.append(look(pool, host, began, tally, faults))
    with Live(table(samples, tally, pool, minutes), console=console, auto_refresh=False, transient=True) as live:
        while time.monotonic() - began < minutes * 60 and not stop.wait(1) and not tally.hung():
            samples.append(look(pool, host, began, tally, faults))
            if console.is_terminal:
                live.update(table(samples, tally, pool, minutes), refresh=True)
            elif len(samples) % 60 == 0:
                last = samples[-1]
                console.print(
                    f"{last.at / 60:.0f} min: {last.calls:,} calls, {len(tally.wrong)} wrong", highlight=False
                )
    samples.append(look(pool, host, began, tally, faults))
    console.print(table(samples, tally, pool, minutes))


def finish(
    arguments: Any, tally: Tally, samples: list[Sample], problems: list[str], seconds: float, console: Console
) -> int:
    """Write the reports; 1 where anything is wrong."""
    problems = [*tally.wrong[:20], *problems]
    summary = {
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "calls": sum(tally.calls.values()),
        "wrong": len(tally.wrong),
        "problems": problems,
        "calls by kind": dict(sorted(tally.calls.items())),
        "jobs by outcome": dict(sorted(tally.outcomes.items())),
        "workers ended by": dict(sorted(tally.ends.items())),
        "second half's growth, MiB": {
            name: round(growth(samples, name) / MIB, 2) for name in ("host", "zygote", "worker")
        },
        "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0]},
    }
    arguments.report.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    page = Page("blastdoor soak")
    words = f"{summary['calls']:,} calls in {seconds / 60:.1f} minutes, seed {arguments.seed}: "
    page.text(words + ("nothing wrong" if not problems else "see below"), "bad" if problems else "good")
    for problem in problems:
        page.text(problem, "bad")
    page.plot(plots(samples))
    for title, counts in (
        ("Calls", tally.calls),
        ("Jobs as the pool counts their ends", tally.outcomes),
        ("Ends of workers", tally.ends),
    ):
        page.heading(title)
        page.table(("which", "how many"), sorted(counts.items()))
    page.save(arguments.report.with_suffix(".html"))
    for problem in problems:
        console.print(f"[red]{problem}", highlight=False)
    console.print(f"{words}{'NOT as it should be' if problems else 'all as it should be'}", highlight=False)
    console.print(f"report: {arguments.report.with_suffix('.html')}, {arguments.report.with_suffix('.json')}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
