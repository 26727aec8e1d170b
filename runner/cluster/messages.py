"""What crosses the cluster between a host and its agents: bytes, each a msgspec struct of this file.

Only bytes come back from an agent, and every one of them is decoded as one of these: the host unpickles nothing that
an agent's methods give or raise.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from ..errors import (
    BlastdoorError,
    Fault,
    InvalidRequest,
    JobFailed,
    LeaseTimeout,
    ReadTimeout,
    WorkersUnavailable,
    WriteTimeout,
)
from ..events import WorkerEnded, WorkerInfo, WorkerReady, WorkerStarted
from ..jobs.failures import failure


class Ping(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Host to agent: it lives, has news up to number `seen`, and wants records from `level` on."""

    seen: int
    level: int


class Cancel(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Host to agent: the caller of the job on this lane has left."""

    lane: int


Beside = Ping | Cancel
"""What a host says beside the jobs."""


class JobEnd(msgspec.Struct, array_like=True, frozen=True):
    """How a job has ended at its agent: "ok"; with a fault; or for the other reasons that `Pool.open` can raise.

    "busy" says that no worker took the job, which may be placed anew.
    """

    kind: Literal["ok", "fault", "busy", "unavailable", "read", "write", "closed", "invalid"]
    words: str = ""
    fault: Fault | None = None
    retry_after: float = 0


class JoinReply(msgspec.Struct, array_like=True, frozen=True):
    """An agent is ready for a host, for so many jobs at once; or can't be, and why; or it is about to end.

    `seen` is the number of its latest news: what was before concerns others. It listens at `address` and `port`, for
    hosts that show the `secret`.
    """

    capacity: int = 0
    seen: int = 0
    error: str = ""
    ending: bool = False
    address: str = ""
    port: int = 0
    secret: bytes = b""


class LogEntry(msgspec.Struct, array_like=True, frozen=True):
    """A line of an agent's log: what its workers print, how jobs went wrong."""

    level: int
    message: str
    extra: dict[str, str]


class Heartbeat(msgspec.Struct, array_like=True, frozen=True):
    """An agent's answer to its host's ping: its workers now, and what was logged and happened up to number `seen`.

    An agent that has taken the host for gone says that it is not `known`.
    """

    known: bool
    starting: int
    idle: int
    busy: int
    waiting: int
    deaths: int
    running: int
    workers: list[WorkerInfo]
    records: list[LogEntry]
    events: list[bytes]
    seen: int


M = TypeVar("M")
encode = msgspec.msgpack.Encoder().encode


def decode(data: object, kind: type[M]) -> M:
    """A message that has come back. ValueError for what is none."""
    if not isinstance(data, bytes):
        raise ValueError(f"the agent answered with a {type(data).__name__}")
    return msgspec.msgpack.decode(data, type=kind)


class _Event(msgspec.Struct, array_like=True, frozen=True):
    kind: Literal["started", "ready", "ended"]
    event: msgspec.Raw


WorkerEvent = WorkerStarted | WorkerReady | WorkerEnded

_EVENTS: dict[str, type[WorkerEvent]] = {"started": WorkerStarted, "ready": WorkerReady, "ended": WorkerEnded}
_KINDS: dict[type, str] = {event: kind for kind, event in _EVENTS.items()}


def encode_event(event: object) -> bytes | None:
    """A worker's event, as it travels; None for another."""
    kind = _KINDS.get(type(event))
    return None if kind is None else encode((kind, event))


def decode_event(data: bytes) -> WorkerEvent:
    """What `encode_event` made. ValueError for what is none."""
    found = msgspec.msgpack.decode(data, type=_Event)
    return msgspec.msgpack.decode(found.event, type=_EVENTS[found.kind])


def ending_of(error: BaseException) -> JobEnd:
    """What an agent tells of an exception that a job has ended with."""
    words = str(error)
    if isinstance(error, JobFailed):
        return JobEnd("fault", fault=error.fault)
    if isinstance(error, LeaseTimeout):
        return JobEnd("busy", words)
    if isinstance(error, WorkersUnavailable):
        return JobEnd("unavailable", words, retry_after=error.retry_after)
    if isinstance(error, ReadTimeout):
        return JobEnd("read", words)
    if isinstance(error, WriteTimeout):
        return JobEnd("write", words)
    if isinstance(error, InvalidRequest):
        return JobEnd("invalid", words)
    return JobEnd("closed", words if isinstance(error, BlastdoorError) else f"{type(error).__name__}: {words}")


def error_of(ending: JobEnd, job_id: str) -> BlastdoorError:
    """The error that a caller gets for the end of its job, which is not "ok" and not "busy"."""
    if ending.kind == "fault" and ending.fault is not None:
        return failure(ending.fault)
    if ending.kind == "unavailable":
        return WorkersUnavailable(ending.words, ending.retry_after)
    if ending.kind == "read":
        return ReadTimeout(ending.words)
    if ending.kind == "write":
        return WriteTimeout(ending.words)
    if ending.kind == "invalid":
        return InvalidRequest(ending.words)
    return lost(job_id, f"its agent has ended it: {ending.words}")


def lost(job_id: str, why: str) -> JobFailed:
    """The failure of a job whose node, or agent, is gone."""
    return failure(Fault(kind="lost", detail=f"the node that ran the job was lost: {why}", job_id=job_id))
