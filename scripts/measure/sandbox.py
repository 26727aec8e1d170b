"""What a sandbox costs: a request through it, and one more worker in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from runner import Pool, Recycle, Request, Sandbox
from runner.events import Event, WorkerReady
from scripts.measure.figures import Row, interleave, middle, show
from scripts.measure.placement import BLOCK, on, opener

PROFILES = {"no sandbox": None, "Sandbox.default()": Sandbox.default(), "Sandbox.strict()": Sandbox.strict()}


def requests_through(rounds: int) -> Iterator[Row]:
    """A small POST through the default profile against one without, both ends on one core, in turns."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(on({min(os.sched_getaffinity(0))}))
        pools = [
            stack.enter_context(Pool("scripts.measure.handlers:handler", workers=1, sandbox=PROFILES[name]))
            for name in ("no sandbox", "Sandbox.default()")
        ]
        free, confined = interleave(rounds // BLOCK, *map(opener, pools), block=BLOCK)
    yield "256 B through Sandbox.default()", f"{show(confined)}; {middle(confined) / middle(free):.2f} x one without"


def starts(rounds: int) -> Iterator[Row]:
    """From ordering one more worker to its READY."""
    for name, sandbox in PROFILES.items():
        events: list[Event] = []
        recycle = Recycle(after_jobs=1)
        with Pool("scripts.measure.tiny:handler", workers=1, sandbox=sandbox, recycle=recycle) as pool:
            pool.subscribe(events.append)
            for _ in range(rounds):
                with pool.open(Request("GET", "/")) as job:
                    list(job)
            times = [event.seconds * 1e3 for event in events if isinstance(event, WorkerReady)]
        yield f"one more worker of a small handler, {name}, ready", show(times, "ms")
