"""Run request handlers in worker processes: pools, jobs, and what can go wrong with them.

The names here are the public ones. They load when they are first used, so that a worker, which imports
this package too, carries only what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.async_job import AsyncJob as AsyncJob
    from runner.errors import AbortHandler as AbortHandler
    from runner.errors import BlastdoorError as BlastdoorError
    from runner.errors import BodyIncomplete as BodyIncomplete
    from runner.errors import ConfigurationError as ConfigurationError
    from runner.errors import DeadlineExceeded as DeadlineExceeded
    from runner.errors import HandlerAborted as HandlerAborted
    from runner.errors import HandlerRaised as HandlerRaised
    from runner.errors import InvalidRequest as InvalidRequest
    from runner.errors import JobCancelled as JobCancelled
    from runner.errors import JobClosed as JobClosed
    from runner.errors import JobFailed as JobFailed
    from runner.errors import JobTimedOut as JobTimedOut
    from runner.errors import LeaseTimeout as LeaseTimeout
    from runner.errors import MemoryExceeded as MemoryExceeded
    from runner.errors import NodeLost as NodeLost
    from runner.errors import PoolClosed as PoolClosed
    from runner.errors import PoolForked as PoolForked
    from runner.errors import QueueFull as QueueFull
    from runner.errors import ReadTimeout as ReadTimeout
    from runner.errors import StartError as StartError
    from runner.errors import WorkerDied as WorkerDied
    from runner.errors import WorkerMisbehaved as WorkerMisbehaved
    from runner.errors import WorkersUnavailable as WorkersUnavailable
    from runner.errors import WriteTimeout as WriteTimeout
    from runner.handlers.async_native import AsyncHandlerRequest as AsyncHandlerRequest
    from runner.handlers.async_native import AsyncHandlerResponse as AsyncHandlerResponse
    from runner.handlers.native import HandlerRequest as HandlerRequest
    from runner.handlers.native import HandlerResponse as HandlerResponse
    from runner.headers import Headers as Headers
    from runner.job import Job as Job
    from runner.limits import Limits as Limits
    from runner.messages import Fault as Fault
    from runner.messages import JobContext as JobContext
    from runner.messages import ResponseHead as ResponseHead
    from runner.pool import Pool as Pool
    from runner.recycle import Recycle as Recycle
    from runner.request import Request as Request
    from runner.sandbox.profile import Sandbox as Sandbox
    from runner.scope import CancelScope as CancelScope

_HOMES = {
    "errors": (
        "AbortHandler BlastdoorError BodyIncomplete ConfigurationError DeadlineExceeded HandlerAborted HandlerRaised "
        "InvalidRequest JobCancelled JobClosed JobFailed JobTimedOut LeaseTimeout MemoryExceeded NodeLost PoolClosed "
        "PoolForked QueueFull ReadTimeout StartError WorkerDied WorkerMisbehaved WorkersUnavailable WriteTimeout"
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
    if name not in _MODULES:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"runner.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
