"""What a handler raised, as the report that crosses the pipe; whatever its exception's own methods do."""

from __future__ import annotations

import os
import traceback
from typing import Final

from .errors import AbortHandler, JobCancelled
from .messages import FaultReport

_MAX_TEXT: Final = 16 * 1024
_OWN_DIRECTORY: Final = os.path.dirname(__file__) + os.sep


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


def explain(error: BaseException) -> str:
    """The traceback as text, from the handler's first frame on, capped, whatever the exception's methods do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_DIRECTORY) and trace.tb_next:
        trace = trace.tb_next
    error = error.with_traceback(trace)
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001
        text = "".join(traceback.format_tb(error.__traceback__)) + ": ".join(describe(error))
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]}\n...\n{text[-_MAX_TEXT // 2 :]}"
    return text.encode(errors="replace").decode()
