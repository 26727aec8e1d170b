"""Faults as HTTP responses: `application/problem+json` (RFC 9457), the same for every client."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

from runner.errors import JobFailed, LeaseTimeout, QueueFull, WorkersUnavailable
from runner.wire.messages import Header, ResponseHead

STATUS: Final[dict[str, int]] = {
    "raised": 500,
    "died": 500,
    "memory": 500,
    "timeout": 504,
    "protocol": 502,
    "lost": 502,
    "unavailable": 503,
    "overload": 503,
}
"""The status of a response that stands for a fault, by the fault's kind."""


def problem(error: JobFailed | WorkersUnavailable | LeaseTimeout, *, debug: bool) -> tuple[ResponseHead, bytes]:
    """Head and body of the response that tells a caller of a fault before the head.

    The handler's own words and its traceback are told in debug mode only. `x-should-retry: false` asks SDKs
    not to run a job again that may have had effects; a job that no worker saw may be sent again.
    """
    headers: list[Header] = []
    details: dict[str, object]
    if isinstance(error, LeaseTimeout):
        kind = "overload"
        detail = (
            "all workers are busy, and the queue is full" if isinstance(error, QueueFull) else "all workers are busy"
        )
        details = {"detail": detail, "fault": kind}
        headers.append(("retry-after", "1"))
    elif isinstance(error, WorkersUnavailable):
        kind = "unavailable"
        details = {"detail": str(error) if debug else "no worker can be started at the moment", "fault": kind}
        headers.append(("retry-after", str(math.ceil(error.retry_after))))
    else:
        fault = error.fault
        kind = fault.kind
        details = {"detail": fault.detail, "fault": kind, "job_id": fault.job_id}
        if fault.exit_code is not None:
            details["exit_code"] = fault.exit_code
        if fault.signal is not None:
            details["signal"] = fault.signal
        if debug and fault.error:
            details["error"] = fault.error
        if debug and fault.traceback:
            details["traceback"] = fault.traceback
        headers.append(("x-should-retry", "false"))
    return refusal(STATUS[kind], details, headers)


def refusal(status: int, details: Mapping[str, object], headers: Sequence[Header] = ()) -> tuple[ResponseHead, bytes]:
    """Head and body of an `application/problem+json` response with these details."""
    problem_details = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, **details}
    body = json.dumps(problem_details).encode()
    own: list[Header] = [("content-type", "application/problem+json"), ("content-length", str(len(body)))]
    return ResponseHead(status, [*own, *headers]), body
