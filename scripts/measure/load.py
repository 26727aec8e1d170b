"""`scripts/load`: requests a second and p99 under wrk's load, and what one segfault in a hundred does to the others.

Each server serves the same app with as many processes; they take turns, a few seconds each, round by round. A healthy
request counts as lost where it was sent and got no 200, but for those that were still under way at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table

FLASK: Final = "scripts.measure.served_flask:app"
FASTAPI: Final = "scripts.measure.served_fastapi:app"
SCRIPT: Final = Path(__file__).with_name("load.lua")

Result = dict[str, float]


def servers(workers: int) -> dict[str, dict[str, list[str]]]:
    """By app, then by name: the commands, which listen at {port}."""
    ours = ["transport.cli", "serve", "--port={port}", "--admin=none", "--no-access-log", "--log-level=error"]
    many = [f"--workers={workers}"]
    gunicorn = ["gunicorn", "--bind=127.0.0.1:{port}", "--log-level=critical", *many]
    uvicorn = ["uvicorn", "--port={port}", "--log-level=critical", "--no-access-log"]
    return {
        "Flask": {
            "blastdoor serve": [*ours, *many, FLASK],
            "the same, preloaded": [*ours, *many, FLASK, "--preload=scripts.measure.served_flask"],
            "gunicorn, sync": [*gunicorn, FLASK],
            "gunicorn, 8 threads": [*gunicorn, "--threads=8", FLASK],
        },
        "FastAPI": {
            "blastdoor serve": [*ours, *many, FASTAPI],
            "the same, preloaded": [*ours, *many, FASTAPI, "--preload=scripts.measure.served_fastapi"],
            "uvicorn": [*uvicorn, *many, FASTAPI],
            "uvicorn, 1 process": [*uvicorn, FASTAPI],
        },
    }


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[str]:
    """A server; gives its URL once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", *(part.format(port=port) for part in command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not answer")
            time.sleep(0.05)
        time.sleep(1)  # all of its workers
        yield f"http://127.0.0.1:{port}/"
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(30)
        for child in psutil.wait_procs(children, 5)[1]:
            child.kill()


def load(url: str, seconds: float, connections: int, every: int) -> Result:
    """One run of wrk."""
    done = subprocess.run(
        ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds:g}s", f"--script={SCRIPT}", url],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BLAST_EVERY": str(every)},
    )
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    result["rate"] = result["ok"] / result["seconds"]
    healthy = result["sent"] - result["fatal"] - 1  # wrk asks for one before it begins, to look at it
    result["lost"] = max(healthy - result["ok"] - connections, 0)
    result["healthy"] = healthy
    return result


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each run (default: 4)")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("scripts/load needs wrk: on Debian, apt-get install wrk")
    console = Console()
    for app, commands in servers(options.workers).items():
        for every, title in ((0, "healthy"), (100, "one request in a hundred segfaults")):
            results: dict[str, list[Result]] = {name: [] for name in commands}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    with running(command) as url:
                        load(url, 1, options.connections, 0)  # it is warm then
                        results[name].append(load(url, options.seconds, options.connections, every))
            console.print(_table(f"{app}, {title}", results))


def _table(title: str, results: dict[str, list[Result]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in (
        "by",
        "200s a second",
        "median, ms",
        "p99, ms",
        "healthy sent",
        "healthy lost",
        "answers to the fatal",
    ):
        table.add_column(name, justify="left" if name == "by" else "right")
    for name, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("rate", "p50", "p99")}
        total = {key: int(sum(run[key] for run in runs)) for key in ("healthy", "lost", "fatal", "failed")}
        table.add_row(
            name,
            f"{middle['rate']:,.0f}",
            f"{middle['p50']:.2f}",
            f"{middle['p99']:.1f}",
            f"{total['healthy']:,}",
            f"{total['lost']:,} ({total['lost'] / max(total['healthy'], 1):.2%})",
            f"{total['failed']:,} of {total['fatal']:,}" if total["fatal"] else "",
        )
    return table


if __name__ == "__main__":
    main()
