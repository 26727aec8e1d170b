"""Every error of the runner: one root, and leaves that say what happened and what to do.

Three families: what the caller did wrong (`ConfigurationError`, `InvalidRequest`, `PoolClosed`,
`PoolForked`), what the pool could not do (`StartError`, `WorkersUnavailable`, `LeaseTimeout`,
`ReadTimeout`, `WriteTimeout`, `JobClosed`), and how a job ended badly (`JobFailed`, one leaf per kind of fault).
`AbortHandler` is what a handler raises,
`JobCancelled` what is raised in one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FaultKind = Literal["raised", "aborted", "incomplete", "died", "memory", "timeout", "protocol", "unavailable", "lost"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a job ended badly.

    `detail` is one sentence that may be shown to anybody; `error` (the exception's own words) and `traceback`
    are not for strangers. `exit_code` or `signal` is set where a worker died.
    """

    kind: FaultKind
    detail: str
    job_id: str
    exit_code: int | None = None
    signal: str | None = None
    error: str = ""
    traceback: str = ""


class AbortHandler(BaseException):
    """Raised by a handler to cut its response off: the caller sees an unexpected end, nothing is logged.

    A `BaseException`, so that a framework's `except Exception` does not turn it into an error page.
    """


class JobCancelled(BaseException):
    """Raised in a handler, once, when its caller has left: clean up and let it pass, within the grace time.

    A `BaseException`, so that `except Exception` does not swallow it.
    """


class ErrorWithoutTraceback(Exception):
    """An error whose words say all: where it was raised helps nobody."""


class BlastdoorError(Exception):
    """The root of all errors that blastdoor raises."""


class ConfigurationError(BlastdoorError, ValueError):
    """A pool, factory or transport was set up with something that can't work."""


class InvalidRequest(BlastdoorError, ValueError):
    """The request can't be sent as HTTP: a bad method, target, header, or a head over the size cap."""


class InvalidBody(InvalidRequest, TypeError):
    """A request's body is, or has given, what is no bytes."""


class InvalidLength(InvalidRequest):
    """A request's body has more bytes than its Content-Length announces, or fewer."""


class PoolClosed(BlastdoorError):
    """The pool was closed: open a new one."""


class PoolForked(BlastdoorError):
    """This process was forked from the one that owns the pool: make a pool of its own after the fork."""


class StartError(BlastdoorError):
    """The pool could not start. The message carries the worker's own traceback, as text."""


class WorkersUnavailable(BlastdoorError):
    """No worker can be started at the moment.

    `retry_after` is the time in seconds until the pool tries again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LeaseTimeout(BlastdoorError, TimeoutError):
    """No worker became free in the time given (`lease_timeout`, seconds)."""


class QueueFull(LeaseTimeout):
    """As many callers as the pool lets wait are waiting already."""


class ReadTimeout(BlastdoorError, TimeoutError):
    """The job made no progress for `read_timeout` seconds; its worker is taken off it."""


class WriteTimeout(BlastdoorError, TimeoutError):
    """The job took nothing of its request body for `write_timeout` seconds; its worker is taken off it."""


class JobClosed(BlastdoorError):
    """The job was closed, or its scope cancelled, before its end. `__cause__` is what it was closed with."""


class DeadlineExceeded(BlastdoorError, TimeoutError):
    """A scope's time was up. It is the `__cause__` of the JobClosed that its callers get."""


class JobFailed(BlastdoorError):
    """A job ended badly; `fault` says how (kind, job id, exit code or signal)."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.error or fault.detail} (job {fault.job_id})")
        self.fault = fault


class HandlerRaised(JobFailed):
    """The handler raised an exception. Its traceback is in the host's log under the job's id."""


class HandlerAborted(JobFailed):
    """The handler raised `AbortHandler`: the response ends before its time, on purpose."""


class BodyIncomplete(JobFailed):
    """The handler ended its response before the Content-Length that it had announced."""


class WorkerDied(JobFailed):
    """The worker process ended in the middle of the job; `fault` has its exit code or signal."""


class JobTimedOut(JobFailed):
    """The job took longer, or more processor time, than the pool's limits allow. Its stacks are in the log."""


class MemoryExceeded(JobFailed):
    """The job took more memory than the pool's limits allow."""


class WorkerMisbehaved(JobFailed):
    """The worker broke the protocol of its pipe and was killed."""


class NodeLost(JobFailed):
    """The cluster's node that ran the job was lost: what the job did, or did not, is not known. It is not run again."""


def closed_by(cause: BaseException, what: str = "the request") -> JobClosed:
    """The JobClosed that a caller gets whose job, or whose scope, was ended with this cause."""
    words = f" ({cause})" if str(cause) else ""
    why = str(cause) if type(cause) is JobClosed else f"{type(cause).__name__}{words}"
    error = JobClosed(f"{what} was ended before its time: {why}")
    error.__cause__ = cause
    return error
