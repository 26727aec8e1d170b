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

    from .async_job import AsyncJob as AsyncJob
    from .errors import AbortHandler as AbortHandler
    from .errors import BlastdoorError as BlastdoorError
    from .errors import BodyIncomplete as BodyIncomplete
    from .errors import ConfigurationError as ConfigurationError
    from .errors import DeadlineExceeded as DeadlineExceeded
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
    from .handlers.async_native import AsyncHandlerRequest as AsyncHandlerRequest
    from .handlers.async_native import AsyncHandlerResponse as AsyncHandlerResponse
    from .handlers.native import HandlerRequest as HandlerRequest
    from .handlers.native import HandlerResponse as HandlerResponse
    from .headers import Headers as Headers
    from .job import Job as Job
    from .limits import Limits as Limits
    from .messages import Fault as Fault
    from .messages import JobContext as JobContext
    from .messages import ResponseHead as ResponseHead
    from .pool import Pool as Pool
    from .recycle import Recycle as Recycle
    from .request import Request as Request
    from .sandbox.profile import Sandbox as Sandbox
    from .scope import CancelScope as CancelScope

_HOMES = {
    "errors": (
        "AbortHandler BlastdoorError BodyIncomplete ConfigurationError DeadlineExceeded HandlerAborted HandlerRaised "
        "InvalidBody InvalidLength InvalidRequest JobCancelled JobClosed JobFailed JobTimedOut LeaseTimeout "
        "MemoryExceeded NodeLost PoolClosed PoolForked QueueFull ReadTimeout StartError WorkerDied WorkerMisbehaved "
        "WorkersUnavailable WriteTimeout"
    ),
    "async_job": "AsyncJob",
    "handlers.async_native": "AsyncHandlerRequest AsyncHandlerResponse",
    "handlers.native": "HandlerRequest HandlerResponse",
    "headers": "Headers",
    "job": "Job",
    "limits": "Limits",
    "messages": "Fault JobContext ResponseHead",
    "pool": "Pool",
    "recycle": "Recycle",
    "request": "Request",
    "sandbox.profile": "Sandbox",
    "scope": "CancelScope",
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
