"""Where the tasks of an event loop stand: what faulthandler, which shows threads, can't show."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any, TextIO


def print_stacks(loop: asyncio.AbstractEventLoop, file: TextIO) -> None:
    """Print what each task waits for, from the coroutine that it runs down to the innermost. Never raises."""
    try:
        for task in asyncio.all_tasks(loop):
            frames = [frame for frame in _awaited(task.get_coro()) if frame is not None]
            stack = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
            print(f"Task {task.get_name()} waits (innermost call last):", *stack.format(), sep="\n", file=file)
    except Exception:  # noqa: BLE001 - called by a signal in the middle of anything, with the app's own stderr
        return


def _awaited(coroutine: Any) -> list[Any]:
    """The frames of a suspended coroutine and of what it awaits, whatever kind of coroutine that is."""
    frames = []
    while coroutine is not None:
        for prefix, inner in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
            if hasattr(coroutine, inner):
                frames.append(getattr(coroutine, f"{prefix}_frame"))
                coroutine = getattr(coroutine, inner)
                break
        else:
            break  # a future, or something of C's own
    return frames
