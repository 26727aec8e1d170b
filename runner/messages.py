"""What crosses the pipes, as typed data: heads, contexts, fault reports, and the zygote's orders.

All are msgspec structs in array form: compact, quick to encode, and checked field by field on
decoding, which is what makes it safe to read what a worker wrote. Nothing here is ever pickled.
"""

from __future__ import annotations

import signal
from http import HTTPStatus
from typing import Annotated, Literal

import msgspec

from .limits import Limits
from .sandbox.profile import Sandbox

Header = tuple[str, str]
"""A header's name and value, both latin-1 text as on the wire of HTTP/1.1 (RFC 9110, section 5)."""

HandlerKind = Literal["native", "wsgi", "asgi"]
"""How a handler is called, once that is known."""

Kind = Literal["auto", HandlerKind]
"""How a handler is called; `auto` finds out by looking at it."""

KINDS: tuple[Kind, ...] = ("auto", "native", "wsgi", "asgi")

MOST_PHRASE = 512
"""The most characters of a reason phrase."""

PHRASES: dict[int, str] = {status.value: status.phrase for status in HTTPStatus}
PHRASES[418] = "I'm a Teapot"


class JobContext(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What the host vouches for about a job. It travels beside the request's headers, never among them.

    `deadline` is Unix time in seconds, or None; `attribution` is a str-to-str mapping such as a workspace id.
    """

    job_id: str = ""
    provider: str = ""
    source: str = ""
    delegated_api_key_id: str = ""
    attribution: dict[str, str] = {}
    deadline: float | None = None


class RequestHead(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The first frame of a job, host to worker. `target` is origin-form (RFC 9112, 3.2.1), byte for byte."""

    method: str
    target: str
    headers: list[Header]
    scheme: str
    server: tuple[str, int]
    has_body: bool
    context: JobContext
    client: tuple[str, int]


class ResponseHead(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Status and headers of a response. Repeated headers stand as often as the handler sent them.

    `phrase` is a reason of the app's own, None for the status's.
    """

    status: Annotated[int, msgspec.Meta(ge=200, le=999)]
    headers: list[Header]
    phrase: Annotated[str, msgspec.Meta(max_length=MOST_PHRASE)] | None = None

    @property
    def reason(self) -> str:
        """The reason phrase: the app's own, or the status's (RFC 9110, section 15), empty where there is none."""
        return PHRASES.get(self.status, "") if self.phrase is None else self.phrase


class Ready(msgspec.Struct, array_like=True, frozen=True):
    """A worker has loaded its handler and waits for jobs."""

    kind: HandlerKind


class FaultReport(msgspec.Struct, array_like=True, frozen=True):
    """How a job failed inside a worker that lives on: the exception's type, its words, its traceback.

    `printed` tells that the handler has printed something, as an END's payload does.
    """

    kind: Literal["raised", "aborted", "cancelled", "memory"]
    exception: str = ""
    message: str = ""
    traceback: str = ""
    printed: bool = False


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


class ZygoteConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a zygote is told once, on its standard input. The handler is an import string, or a dill pickle.

    `grace` is the pool's grace time in seconds, which the workers have a share of for asking before they insist.
    `modules` are imported in the zygote, once for all workers. `path` are the directories that the pool's owner wants
    the app looked for in; and once a zygote is told, the whole `sys.path` of its workers, of which one with a sandbox
    takes only what is trusted. `taken` are names of this project's that the app has modules of its own for.
    `spool_uploads` is the most bytes of a body without a length that a WSGI app's worker takes before it calls it.
    """

    handler: str
    pickle: bytes | None
    kind: Kind
    preload: bool
    modules: tuple[str, ...]
    path: list[str]
    root_path: str
    limits: Limits
    grace: float
    sandbox: Sandbox | None
    label: str = ""
    factory: bool = False
    debug: bool = False
    taken: list[str] = []
    spool_uploads: int | None = None

    @property
    def by_name(self) -> bool:
        """Whether the handler is imported, not sent by value."""
        return self.pickle is None


class Spawn(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Host to zygote, with a worker's ends: request pipe, response pipe, stdout, stderr, cancel pipe."""

    worker: int


class Born(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host, with the worker's pidfd."""

    worker: int
    pid: int


class Died(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: a worker was reaped. `status` is its exit code, or minus the signal that ended it, if known."""

    worker: int
    status: int | None


class Stopped(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: a worker was stopped, as by SIGSTOP."""

    worker: int


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: it can't do what it is for, and why."""

    why: str


class Lacking(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: layers of the sandbox that this machine can't give, and that it was told to go without."""

    layers: list[str]


class Noted(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: what whoever started the pool should know."""

    lines: list[str]


News = Born | Died | Stopped | Failed | Lacking | Noted
"""What a zygote tells its host."""


def describe_exit(status: int | None) -> tuple[str, int | None, str | None]:
    """A sentence part, the exit code and the signal's name for an exit status as `Died` carries it."""
    if status is None:
        return "ended, and its exit status is not known", None, None
    if status >= 0:
        return f"exited with code {status}", status, None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}", None, name
