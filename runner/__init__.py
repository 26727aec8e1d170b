"""Run request handlers in worker processes: pools, jobs, and what can go wrong with them.

The names here are the public ones. They load when they are first used, so that a worker, which imports
this package too, carries only what it needs.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if sys.platform != "linux":
    raise ImportError(f"blastdoor needs Linux 5.9 or newer, and this is {sys.platform}: try it in a container")

if TYPE_CHECKING:
    __version__: str

    from .errors import AbortHandler as AbortHandler
    from .errors import BlastdoorError as BlastdoorError
    from .errors import BodyIncomplete as BodyIncomplete
    from .errors import ConfigurationError as ConfigurationError
    from .errors import DeadlineExceeded as DeadlineExceeded
    from .errors import Fault as Fault
    from .errors import HandlerAborted as HandlerAborted
    from .errors import HandlerRaised as HandlerRaised
    from .errors import InvalidBody as InvalidBody
    from .errors import InvalidLength as InvalidLength
    from .errors import InvalidRequest as InvalidRequest
    from .errors import JobCancelled as JobCancelled
    from .errors import JobClosed as JobClosed
    from .errors import JobFailed as JobFailed
    from .errors import JobTimedOut as JobTimedOut
    from .errors import LeaseTimeout as LeaseTimeout
    from .errors import MemoryExceeded as MemoryExceeded
    from .errors import NodeLost as NodeLost
    from .errors import PoolClosed as PoolClosed
    from .errors import PoolForked as PoolForked
    from .errors import QueueFull as QueueFull
    from .errors import ReadTimeout as ReadTimeout
    from .errors import StartError as StartError
    from .errors import WorkerDied as WorkerDied
    from .errors import WorkerMisbehaved as WorkerMisbehaved
    from .errors import WorkersUnavailable as WorkersUnavailable
    from .errors import WriteTimeout as WriteTimeout
    from .jobs.async_job import AsyncJob as AsyncJob
    from .jobs.job import Job as Job
    from .model.cancel_scope import CancelScope as CancelScope
    from .model.limits import Limits as Limits
    from .model.recycle import Recycle as Recycle
    from .model.request import Request as Request
    from .model.retry import Retry as Retry
    from .model.sandbox import Sandbox as Sandbox
    from .pool import Pool as Pool
    from .wire.headers import Headers as Headers
    from .wire.messages import JobContext as JobContext
    from .wire.messages import ResponseHead as ResponseHead
    from .worker.handlers.async_native import AsyncHandlerRequest as AsyncHandlerRequest
    from .worker.handlers.async_native import AsyncHandlerResponse as AsyncHandlerResponse
    from .worker.handlers.native import HandlerRequest as HandlerRequest
    from .worker.handlers.native import HandlerResponse as HandlerResponse

_HOMES = {
    "errors": (
        "AbortHandler BlastdoorError BodyIncomplete ConfigurationError DeadlineExceeded Fault HandlerAborted "
        "HandlerRaised InvalidBody InvalidLength InvalidRequest JobCancelled JobClosed JobFailed JobTimedOut "
        "LeaseTimeout MemoryExceeded NodeLost PoolClosed PoolForked QueueFull ReadTimeout StartError WorkerDied "
        "WorkerMisbehaved WorkersUnavailable WriteTimeout"
    ),
    "jobs.async_job": "AsyncJob",
    "jobs.job": "Job",
    "model.limits": "Limits",
    "model.recycle": "Recycle",
    "model.retry": "Retry",
    "model.request": "Request",
    "model.sandbox": "Sandbox",
    "model.cancel_scope": "CancelScope",
    "pool": "Pool",
    "wire.headers": "Headers",
    "wire.messages": "JobContext ResponseHead",
    "worker.handlers.async_native": "AsyncHandlerRequest AsyncHandlerResponse",
    "worker.handlers.native": "HandlerRequest HandlerResponse",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("blastdoor")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
