"""How a job that ended badly is told: from what is known of its response, its worker or its limits to an error."""

from __future__ import annotations

from typing import Final, Literal

from ..control.zygote_messages import describe_exit
from ..errors import (
    BodyIncomplete,
    Fault,
    HandlerAborted,
    HandlerRaised,
    JobFailed,
    JobTimedOut,
    MemoryExceeded,
    NodeLost,
    WorkerDied,
    WorkerMisbehaved,
)
from ..wire.exchange import ResponseExchange, State
from ..wire.messages import FaultReport

_ERRORS: Final[dict[str, type[JobFailed]]] = {
    "raised": HandlerRaised,
    "aborted": HandlerAborted,
    "incomplete": BodyIncomplete,
    "died": WorkerDied,
    "memory": MemoryExceeded,
    "timeout": JobTimedOut,
    "protocol": WorkerMisbehaved,
    "lost": NodeLost,
}


def failure(fault: Fault) -> JobFailed:
    """The error that tells this fault."""
    return _ERRORS.get(fault.kind, JobFailed)(fault)


def response_failure(exchange: ResponseExchange, job_id: str) -> JobFailed | None:
    """The failure that a response has ended with, None where it ended well or goes on."""
    if exchange.whole and exchange.missing:
        detail = f"the response body is {exchange.missing} bytes short of its Content-Length"
        return BodyIncomplete(Fault(kind="incomplete", detail=detail, job_id=job_id))
    if exchange.whole:
        return None
    if exchange.state is State.FAULTED and exchange.report is not None:
        return _reported(exchange.report, job_id)
    if exchange.state is State.BROKEN:
        detail = f"the worker broke the protocol of its pipe and was killed: {exchange.violation}"
        return WorkerMisbehaved(Fault(kind="protocol", detail=detail, job_id=job_id))
    return None


def _reported(report: FaultReport, job_id: str) -> JobFailed:
    if report.kind == "aborted":
        return HandlerAborted(Fault(kind="aborted", detail="the handler cut the response off", job_id=job_id))
    if report.kind == "memory":
        return over_limit("memory", "the handler ran out of the memory that its worker may take", job_id)
    fault = Fault(
        kind="raised",
        detail="the handler raised an exception",
        job_id=job_id,
        error=f"the handler raised {report.exception}: {report.message}",
        traceback=report.traceback,
    )
    return HandlerRaised(fault)


def over_limit(kind: Literal["memory", "timeout"], detail: str, job_id: str) -> JobFailed:
    """The failure of a job that was over a limit of its pool."""
    error = JobTimedOut if kind == "timeout" else MemoryExceeded
    return error(Fault(kind=kind, detail=detail, job_id=job_id))


def worker_death(status: int | None, job_id: str, casualties: int = 1) -> WorkerDied:
    """The failure of a job whose worker ended with this status, as `Died` carries it, at so many jobs."""
    what, exit_code, signal_name = describe_exit(status)
    detail = f"the worker process {what} during the job"
    if casualties > 1:
        detail += f", with {casualties - 1} other{'s' if casualties > 2 else ''}"
    return WorkerDied(Fault(kind="died", detail=detail, job_id=job_id, exit_code=exit_code, signal=signal_name))
