"""`blastdoor top`: a server's status as a table in the terminal, live."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import requests
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runner.wire.printable import one_line

_INTERVAL = 1.0
_PIPED_WIDTH = 200


def watch(url: str, *, once: bool) -> int:
    """Show the status of a server until interrupted; 1 where it can't be asked."""
    if "://" not in url:
        url = f"http://{url}"
    url = f"{url.rstrip('/').removesuffix('/-/status')}/-/status.json"
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    try:
        with requests.Session() as session:
            shown = render(_ask(session, url))
            if once:
                console.print(shown)
                return 0
            stopped = threading.Event()
            # An exception might be raised where nobody passes it on; this is heard whatever runs.
            signal.signal(signal.SIGINT, lambda *_: stopped.set())
            with Live(shown, console=console, screen=True, auto_refresh=False) as live:
                while not stopped.wait(_INTERVAL):
                    live.update(render(_ask(session, url)), refresh=True)
        return 0
    except KeyboardInterrupt:
        return 0
    except (requests.RequestException, ValueError, KeyError) as error:
        hint = "is a 'blastdoor serve' running, with its --admin there?"
        print(f"blastdoor: {url} can't be asked ({type(error).__name__}): {hint}", file=sys.stderr)
        return 1


def render(status: dict[str, Any]) -> Group:
    """The status as it is shown. What handlers have said is text, never markup."""
    last = [second["answers"] for second in status["history"] if status["now"] - 10 <= second["at"] < status["now"]]
    failed = f"  {one_line(status['reload_error'])}" if status["reload_error"] else ""
    errors = sum(second["errors"] for second in status["history"])
    state = "draining" if status["draining"] else "ready" if status["ready"] else "no worker is ready"
    head = Text.assemble(
        ("blastdoor ", "bold"),
        (state, "green" if state == "ready" else "red"),
        f"  up {_time(status['uptime'])}  {sum(last) / 10:.1f} requests/s  {errors} errors in 5 min  "
        f"median {_time(status['latency']['p50'])}  p99 {_time(status['latency']['p99'])}  "
        f"{status['active']} under way",
        *(f"  front {n}: pid {front['pid']}, {front['state']}" for n, front in enumerate(status.get("fronts", ()), 1)),
        (failed, "red"),
    )
    return Group(head, *(_pool(path, pool) for path, pool in status["pools"].items()), _faults(status["faults"]))


def _pool(path: str, pool: dict[str, Any]) -> Table:
    counts = ", ".join(
        f"{pool[name]} {name}" for name in ("running", "lanes", "busy", "idle", "starting", "waiting", "deaths")
    )
    table = Table(title=Text(f"{path} {pool['app']}: {counts}"), title_justify="left", expand=True)
    for name in ("pid", "state", "job", "request", "jobs", "age", "memory", "processor"):
        table.add_column(name, justify="left" if name in ("state", "job", "request") else "right")
    for worker in pool["workers"]:
        single = worker["concurrency"] == 1
        state = worker["state"] if single else f"{worker['state']} {worker['running']}/{worker['concurrency']}"
        table.add_row(
            str(worker["pid"]),
            Text(
                f"leaving, {state}" if worker["leaving"] else state, "green" if worker["state"] == "idle" else "yellow"
            ),
            Text(one_line(worker["job_id"]) if single else ""),
            Text(one_line(worker["request"][:80]) if single else ""),
            str(worker["jobs"]),
            _time(worker["age"]),
            f"{worker['rss'] / (1 << 20):.1f} MiB",
            _time(worker["cpu_seconds"]),
        )
        for lane, job_id, request, seconds in () if single else worker["lanes"]:
            of_lane = Text(f"lane {lane}", "dim"), Text(one_line(job_id)), Text(one_line(request[:80]))
            table.add_row("", *of_lane, "", _time(seconds), "", "")
    return table


def _faults(faults: list[dict[str, Any]]) -> Table:
    table = Table(title="last faults", title_justify="left", expand=True)
    for name in ("at", "mount", "what", "request", "job", "detail"):
        table.add_column(name)
    for fault in faults[:10]:
        at = time.strftime("%H:%M:%S", time.localtime(fault["at"]))
        outcome, detail = Text(one_line(fault["outcome"]), "red"), Text(one_line(fault["detail"]))
        mount, request = Text(one_line(fault["mount"])), Text(one_line(fault["request"][:80]))
        table.add_row(at, mount, outcome, request, Text(one_line(fault["job_id"])), detail)
    return table


def _ask(session: requests.Session, url: str) -> dict[str, Any]:
    response = session.get(url, timeout=5)
    response.raise_for_status()
    told: dict[str, Any] = response.json()
    return told


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
