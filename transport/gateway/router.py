"""What is decided of a request at a gateway, whoever serves it: to which pool it goes, as what, and how faults answer.

The ASGI app `Gateway` and the front of `blastdoor serve` both ask here. Nothing of it waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from runner.errors import (
    ConfigurationError,
    InvalidRequest,
    JobClosed,
    JobFailed,
    LeaseTimeout,
    PoolClosed,
    StartError,
    WorkersUnavailable,
)
from runner.events import Batch
from runner.model.request import Request
from runner.wire.messages import Header, JobContext, ResponseHead
from transport.errors import TargetEscapes
from transport.gateway.finished import RequestFinished, RequestTime
from transport.gateway.mounts import Mount, Mounts, Unauthorized
from transport.gateway.request_ids import RequestIds
from transport.gateway.traces import Span, span_of
from transport.problem_details import problem, refusal

if TYPE_CHECKING:
    from runner.protocols import AnyPool

logger = logging.getLogger("blastdoor")

HOP_BY_HOP: Final = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers of one connection only (RFC 9110, 7.6.1); trailers are not passed on."""

_has_none: Final = HOP_BY_HOP.isdisjoint

MOST: Final = 599
"""The highest status code of HTTP (RFC 9110, 15)."""

Answer = tuple[ResponseHead, bytes]
"""Head and body of a response that is the gateway's own."""


_NOTHING: Final[Answer] = ResponseHead(204, []), b""


class BodyTooSlow(Exception):
    """The client sends less of its body than a worker can be kept waiting for."""


class BodyTooLarge(Exception):
    """The client sends more than the gateway takes."""


class Refused(Exception):
    """The request goes to no pool, or what came from there to no client; this is the answer.

    `mount` is the path of the mount that it came to, empty for none.
    """

    def __init__(
        self,
        status: int,
        details: Mapping[str, object],
        mount: str = "",
        span: Span | None = None,
        answer: Answer | None = None,
    ) -> None:
        super().__init__(status, details)
        self.answer = refusal(status, details) if answer is None else answer
        self.mount = mount
        self.span = span


class Asked:
    """A request as its server has read it. `headers` have names in small letters; `length` is that of its body in
    bytes, 0 for none, None where it is not known beforehand."""

    __slots__ = ("began", "client", "headers", "length", "method", "path", "scheme", "server", "target")

    def __init__(
        self,
        method: str,
        path: str,
        target: str,
        headers: list[Header],
        scheme: str,
        server: tuple[str, int],
        client: tuple[str, int] | None,
        length: int | None,
    ) -> None:
        self.began = time.monotonic()
        self.method = method
        self.path = path
        self.target = target
        self.headers = headers
        self.scheme = scheme
        self.server = server
        self.client = client
        self.length = length

    def header(self, name: str) -> str:
        """The first header of this name, empty for none."""
        for known, value in self.headers:
            if known == name:
                return value
        return ""


class Call:
    """A request on its way to the pool of a mount."""

    __slots__ = ("_asked", "context", "mount", "path", "request", "span")

    def __init__(
        self, mount: Mount, path: str, asked: Asked, request: Request, context: JobContext, span: Span | None
    ) -> None:
        self.mount = mount
        self.path = path
        self._asked = asked
        self.request = request
        self.context = context
        self.span = span

    def passed_on(self, head: ResponseHead) -> ResponseHead:
        """The head of the handler's response as its client gets it. Refused where it can't be passed on."""
        status = head.status
        if status > MOST:
            raise Refused(502, {"detail": f"the handler's status {status} is none of HTTP's", "fault": "protocol"})
        headers = end_to_end(head.headers)
        route = self.mount.route
        if route is not None:
            asked = self._asked
            headers = route.restore_locations(headers, asked.scheme, asked.header("host"), self.path.removesuffix("/"))
        if status == 304:  # servers would wait for as many bytes as it tells of (RFC 9110, 8.6)
            headers = [(name, value) for name, value in headers if name.lower() != "content-length" or value == "0"]
        return head if headers is head.headers else ResponseHead(status, headers, head.phrase)


class Router:
    """The mounts, and what holds for all of them.

    `mounts` is a pool, or a `Mount`, or a mapping of paths to these. Bodies over `max_body` bytes are refused (413). A
    client has `body_timeout` seconds to send its body, and a second more for each 500 bytes (408). `active` counts the
    requests under way. ConfigurationError for what can't work.
    """

    def __init__(
        self,
        mounts: AnyPool | Mount | Mapping[str, AnyPool | Mount],
        *,
        max_body: int | None = None,
        body_timeout: float = 20.0,
    ) -> None:
        if not isinstance(mounts, Mapping):
            mounts = {"/": mounts}
        for name, limit in (("max_body", max_body), ("body_timeout", body_timeout)):
            if limit is not None and not limit >= 0:
                raise ConfigurationError(f"{name} is zero or more, or None, not {limit!r}")
        self._mounts = Mounts({path: m if isinstance(m, Mount) else Mount(m) for path, m in mounts.items()})
        self.max_body = max_body
        self.body_timeout = body_timeout
        self._subscribers: tuple[Callable[[RequestFinished], object], ...] = ()
        self._batches: tuple[Batch[RequestTime], ...] = ()
        self.active = 0
        self.request_ids = RequestIds()

    @property
    def pools(self) -> dict[str, AnyPool]:
        """The pools by the path of their mount."""
        return {path or "/": mount.pool for path, mount in self._mounts.by_path.items()}

    @property
    def providers(self) -> dict[str, str]:
        """The providers of mounts that have one, by the path of the mount."""
        mounts = self._mounts.by_path.items()
        return {path or "/": mount.route.provider for path, mount in mounts if mount.route is not None}

    def replace(self, path: str, pool: AnyPool) -> AnyPool:
        """Have another pool serve a mount from now on; gives the one that did.

        Requests that wait for a worker of the old one go to the new one as it closes.
        """
        mount = self._mounts.by_path["" if path == "/" else path]
        mount.pool, old = pool, mount.pool
        return old

    def subscribe(self, subscriber: Callable[[RequestFinished], object]) -> None:
        """Have `subscriber` called with each request that is over, in the event loop: it should be quick."""
        self._subscribers = (*self._subscribers, subscriber)

    def note_times(self, batch: Batch[RequestTime]) -> None:
        """Have each request that is over noted in a batch, which costs it little."""
        self._batches = (*self._batches, batch)

    def route(self, asked: Asked) -> Call:
        """What goes to which pool. Refused for what goes to none, before anybody waits for a worker or a body."""
        found = self._mounts.find(asked.path)
        if found is None:
            if asked.path == "*":  # it asks the server as a whole (RFC 9110, 9.3.7)
                raise Refused(204, {}, answer=_NOTHING)
            raise Refused(404, {"detail": "nothing is mounted here"})
        prefix, mount = found
        path = prefix or "/"
        if asked.path == "*" and mount.route is not None:
            raise Refused(204, {}, path, answer=_NOTHING)
        try:
            headers, context = mount.admit(asked.headers)  # first: Connection has no say in what tells who acts
        except Unauthorized as error:
            raise Refused(401, {"detail": str(error)}, path) from error
        headers = end_to_end(headers)
        most = self.max_body
        if most is not None and asked.length and asked.length > most:
            raise Refused(413, {"detail": f"the body is over {most} bytes"}, path)
        span = span_of(asked.method, asked.path, asked.headers, path, context)
        if span is not None:
            headers = span.pass_on(headers)
        target = asked.target
        try:
            if mount.route is not None:
                rest = target[len(prefix) :]
                target = mount.route.rewrite(rest if rest.startswith("/") else f"/{rest}")
            scheme = "https" if asked.scheme == "https" else "http"
            client = asked.client or ("127.0.0.1", 0)
            request = Request(asked.method, target, headers, None, scheme, asked.server, client)
        except (TargetEscapes, InvalidRequest) as error:
            raise Refused(400, {"detail": str(error)}, path, span) from error
        return Call(mount, path, asked, request, context, span)

    def fault_answer(self, error: BaseException, *, debug: bool) -> Answer | None:
        """What a client is told of an error before the head; None where it is told nothing."""
        if isinstance(error, (JobFailed, LeaseTimeout, WorkersUnavailable)):
            return problem(error, debug=debug)
        if isinstance(error, (PoolClosed, StartError)):
            details = {"detail": "the service is not there at the moment", "fault": "unavailable"}
            return refusal(503, details, [("retry-after", "1")])
        if isinstance(error, JobClosed):
            details = {"detail": "the job was ended before its answer", "fault": "closed"}
            return refusal(503, details, [("x-should-retry", "false")])
        if isinstance(error, BodyTooSlow):
            return refusal(408, {"detail": "the body came too slowly"}, [("connection", "close")])
        if isinstance(error, BodyTooLarge):
            return refusal(413, {"detail": f"the body is over {self.max_body} bytes"})
        if isinstance(error, InvalidRequest):
            return refusal(431, {"detail": str(error)})
        return None

    def tell(
        self, mount: str, asked: Asked, status: int | None, sent: int, job_id: str, span: Span | None, *, whole: bool
    ) -> None:
        """A request is over: tell the subscribers."""
        if span is not None:
            span.end(status, job_id)
        now = time.monotonic()
        seconds = now - asked.began
        for batch in self._batches:
            batch.add((mount, asked.method, status, sent, whole, seconds, now))
        if not self._subscribers:
            return
        finished = RequestFinished(
            mount,
            asked.method,
            asked.target,
            asked.client[0] if asked.client else "",
            status,
            sent,
            whole,
            seconds,
            job_id,
            asked.header("x-request-id"),
            asked.headers,
        )
        for subscriber in self._subscribers:
            try:
                subscriber(finished)
            except Exception:
                logger.exception("a subscriber failed at the end of a request")


def end_to_end(headers: list[Header]) -> list[Header]:
    """The headers that are passed on: all but those of the connection that they came on (RFC 9110, 7.6.1)."""
    names = [name.lower() for name, _ in headers]
    if _has_none(names):
        return headers
    dropped = set(HOP_BY_HOP)
    for name, (_, value) in zip(names, headers, strict=True):
        if name == "connection":
            dropped.update(option.strip().lower() for option in value.split(","))
    dropped -= {"host", "content-length", "content-type"}  # a Connection header has no say in these
    return [header for name, header in zip(names, headers, strict=True) if name not in dropped]
