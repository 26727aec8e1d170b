"""What crosses the pipes, as typed data: heads, contexts and fault reports.

All are msgspec structs in array form: compact, quick to encode, and checked field by field on
decoding, which is what makes it safe to read what a worker wrote.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

import msgspec

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
    """A worker has loaded its handler and waits for jobs. `threads` says that each of several has its own."""

    kind: HandlerKind
    threads: bool = False


class FaultReport(msgspec.Struct, array_like=True, frozen=True):
    """How a job failed inside a worker that lives on: the exception's type, its words, its traceback.

    `printed` tells that the handler has printed something, as an END's payload does.
    """

    kind: Literal["raised", "aborted", "cancelled", "memory"]
    exception: str = ""
    message: str = ""
    traceback: str = ""
    printed: bool = False
