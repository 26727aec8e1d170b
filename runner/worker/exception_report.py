"""What a handler raised, as the report that crosses the pipe; whatever its exception's own methods do."""

from __future__ import annotations

import importlib
import os
import traceback
from types import TracebackType
from typing import Final

from ..control.import_isolation import HOME
from ..errors import AbortHandler, ErrorWithoutTraceback, JobCancelled
from ..wire.messages import FaultReport

_MAX_TEXT: Final = 16 * 1024
_SKIPPED: Final = (
    HOME + os.sep,
    os.path.dirname(importlib.__file__) + os.sep,
    "<frozen importlib",
)


def _from_the_app_on(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_SKIPPED):
        trace = trace.tb_next
    return trace


def report_on(error: BaseException) -> FaultReport:
    """The report of a job whose handler raised this."""
    if isinstance(error, JobCancelled):
        return FaultReport("cancelled", "JobCancelled")
    if isinstance(error, AbortHandler):
        return FaultReport("aborted")
    return FaultReport("memory" if isinstance(error, MemoryError) else "raised", *describe(error), explain(error))


def describe(error: BaseException) -> tuple[str, str]:
    """The exception's type and its words, whatever its `__str__` does."""
    try:
        words = str(error)[:1000]
    except BaseException:  # noqa: BLE001 - it is the handler's own code
        words = "(its message can't be shown)"
    name = type(error).__qualname__[:200].encode(errors="replace").decode()
    return name, words.encode(errors="replace").decode()


def report_on_start(error: BaseException, *, debug: bool) -> FaultReport:
    """The report of a worker that could not start. With `debug` all frames are shown."""
    if isinstance(error, ErrorWithoutTraceback) and not debug:
        return FaultReport("raised", *describe(error))
    return FaultReport("raised", *describe(error), explain(error, whole=debug))


def explain(error: BaseException, *, whole: bool = False) -> str:
    """The traceback as text, capped, whatever the exception's methods do.

    It begins with the handler's first frame: ours, and those of the import system, say nothing; but `whole` has all.
    """
    if not whole:
        error = error.with_traceback(_from_the_app_on(error.__traceback__))
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001
        text = "".join(traceback.format_tb(error.__traceback__)) + ": ".join(describe(error))
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]}\n...\n{text[-_MAX_TEXT // 2 :]}"
    return text.encode(errors="replace").decode()
