"""The gateway's ASGI app: a request comes in, a job of a pool answers it, a client that leaves ends its job.

It streams both ways and passes on what belongs to the message, not to the connection. Faults are problem+json before
the head; after it the app raises, so that its server breaks the connection off and no client takes the part for the
whole. Every request ends in one `RequestFinished`, which logs and metrics subscribe to.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import anyio
import msgspec

from runner.errors import (
    BlastdoorError,
    ConfigurationError,
    InvalidRequest,
    JobClosed,
    JobFailed,
    LeaseTimeout,
    PoolClosed,
    StartError,
    WorkersUnavailable,
)
from runner.model.request import INLINE, Request
from runner.wire.messages import JobContext, ResponseHead
from transport.errors import TargetEscapes
from transport.gateway.client_connection import (
    AttendedClient,
    BodyTooLarge,
    BodyTooSlow,
    ClientConnection,
    ClientGone,
    Receive,
)
from transport.gateway.mounts import Mount, Mounts, Unauthorized
from transport.gateway.protocol import EXTENSION, BrokenOff, Connection, RequestFinished
from transport.gateway.response import MOST, ClientResponse, Send, end_to_end
from transport.gateway.traces import Span, span_of
from transport.problem_details import problem, refusal

if TYPE_CHECKING:
    from runner.protocols import AnyAsyncJob, AnyPool

logger = logging.getLogger("blastdoor")

Scope = Mapping[str, Any]

_PORTS: Final = {"http": 80, "https": 443}
_PATH_CHARACTERS: Final = "/!$&'()*+,;=:@~"


class Gateway:
    """An ASGI app that has pools answer plain HTTP requests.

    `mounts` is a pool, or a `Mount`, or a mapping of paths to these. Bodies over `max_body` bytes are refused (413). A
    client has `body_timeout` seconds to send its body, and a second more for each 500 bytes (408). The pools are their
    owners', but where the server speaks the lifespan protocol they are started before the first request.
    ConfigurationError for what can't work.
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
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._subscribers: tuple[Callable[[RequestFinished], object], ...] = ()
        self.active = 0

    @property
    def pools(self) -> dict[str, AnyPool]:
        """The pools by the path of their mount."""
        return {path or "/": mount.pool for path, mount in self._mounts.by_path.items()}

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI's: HTTP requests and the lifespan. WebSockets are refused."""
        if scope["type"] == "http":
            self.active += 1
            try:
                await _Service(self, scope, receive, send).run()
            finally:
                self.active -= 1
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1002, "reason": "only HTTP requests are served"})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                try:
                    for pool in self.pools.values():
                        await anyio.to_thread.run_sync(pool.start)
                except BlastdoorError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    def _tell(self, answered: RequestFinished) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(answered)
            except Exception:
                logger.exception("a subscriber failed at the end of a request")


class _Refused(Exception):
    """The request goes to no pool; this is its answer."""

    def __init__(self, status: int, detail: str) -> None:
        self.head, self.body = refusal(status, {"detail": detail})


class _Service:
    """One request, from its scope to the end of its answer."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._scope = scope
        self._receive = receive
        self._began = time.monotonic()
        self._method: str = scope["method"]
        self._mount = ""
        self._job_id = ""
        self._span: Span | None = None
        self._failure: Exception | None = None
        self._connection: Connection | None = (scope.get("extensions") or {}).get(EXTENSION)
        self._answer = ClientResponse(send, phrases=self._connection is not None)
        self._client: ClientConnection | None = None
        self._version: str = scope.get("http_version", "1.1")
        self._headers = [
            (name.decode("latin-1"), value.decode("latin-1").strip(" \t")) for name, value in scope["headers"]
        ]
        raw: bytes = scope.get("raw_path") or quote(scope["path"], safe=_PATH_CHARACTERS).encode()
        query: bytes = scope["query_string"]
        self._path = raw.decode("latin-1")
        self._target = f"{self._path}?{query.decode('latin-1')}" if query else self._path
        self._length = _body_length(scope)
        self._expects = self._length != 0 and ("expect", "100-continue") in [
            (name, value.lower()) for name, value in self._headers if name == "expect"
        ]

    async def run(self) -> None:
        """Serve it. BrokenOff where the server has to break off what it has begun to send."""
        try:
            try:
                mount, request, context = self._prepare()
            except _Refused as refused:
                with suppress(OSError):  # the client has gone
                    await self._give(refused.head, refused.body)
                return
            limits = self._gateway._body_timeout, self._gateway._max_body
            if self._connection is not None:
                with anyio.CancelScope() as scope:
                    client = self._client = ClientConnection(self._receive, scope.cancel, *limits)
                    self._connection.on_lost(client.lost)
                    await self._try(mount, request, context, client)
            else:
                async with anyio.create_task_group() as group:
                    leave = group.cancel_scope.cancel
                    attended = AttendedClient(self._receive, leave, *limits, hold=self._expects)
                    client = self._client = attended
                    group.start_soon(attended.listen)
                    await self._try(mount, request, context, client)
                    group.cancel_scope.cancel()
            if self._failure is not None and not client.gone:
                raise BrokenOff(f"{self._job_id or self._path[:200]}: {self._failure}") from self._failure
        finally:
            if self._connection is not None and self._answer.status is not None and not self._answer.whole:
                self._connection.break_off()
            self._finish()

    # -- the request ---------------------------------------------------------------------------------

    def _prepare(self) -> tuple[Mount, Request, JobContext]:
        """What goes to which pool. _Refused for what goes to none, before anybody waits for a worker or a body."""
        found = self._gateway._mounts.find(self._path)
        if found is None:
            raise _Refused(404, "nothing is mounted here")
        prefix, mount = found
        self._mount = prefix or "/"
        try:
            headers, context = mount.admit(self._headers)  # first: Connection has no say in what tells who acts
            headers = end_to_end(headers)
        except Unauthorized as error:
            raise _Refused(401, str(error)) from error
        most = self._gateway._max_body
        if self._length and most is not None and self._length > most:
            raise _Refused(413, f"the body is over {most} bytes")
        self._span = span_of(self._method, self._path, self._headers, self._mount, context)
        if self._span is not None:
            headers = self._span.pass_on(headers)
        scope, target = self._scope, self._target
        scheme = "https" if scope.get("scheme") == "https" else "http"
        server, client = scope.get("server"), scope.get("client")
        try:
            if mount.route is not None:
                rest = target[len(prefix) :]
                target = mount.route.rewrite(rest if rest.startswith("/") else f"/{rest}")
            request = Request(
                self._method,
                target,
                headers,
                scheme=scheme,
                server=_address(server, ("localhost", _PORTS[scheme])),
                client=_address(client, ("127.0.0.1", 0)),
            )
        except (TargetEscapes, InvalidRequest) as error:
            raise _Refused(400, str(error)) from error
        return mount, request, context

    # -- the job -------------------------------------------------------------------------------------

    async def _try(self, mount: Mount, request: Request, context: JobContext, client: ClientConnection) -> None:
        try:
            with self._span.active() if self._span is not None else nullcontext():
                await self._serve(mount, request, context, client)
        except (BlastdoorError, BodyTooLarge, BodyTooSlow, ClientGone, OSError) as error:
            self._failure = error

    async def _serve(self, mount: Mount, request: Request, context: JobContext, client: ClientConnection) -> None:
        """Have a job answer. Raises what ends the answer after its head."""
        try:
            job = await self._open(mount, request, context, client)
        except BodyTooSlow:
            await self._give(*refusal(408, {"detail": "the body came too slowly"}, [("connection", "close")]))
        except BodyTooLarge:
            await self._give(*refusal(413, {"detail": f"the body is over {self._gateway._max_body} bytes"}))
        except ClientGone:
            return
        except InvalidRequest as error:
            await self._give(*refusal(431, {"detail": str(error)}))
        except (JobFailed, LeaseTimeout, WorkersUnavailable) as error:
            if isinstance(error, JobFailed):
                self._job_id = error.fault.job_id
            await self._give(*problem(error, debug=mount.pool.debug))
        except (PoolClosed, StartError):
            details = {"detail": "the service is not there at the moment", "fault": "unavailable"}
            await self._give(*refusal(503, details, [("retry-after", "1")]))
        except JobClosed:
            details = {"detail": "the job was ended before its answer", "fault": "closed"}
            await self._give(*refusal(503, details, [("x-should-retry", "false")]))
        else:
            self._job_id = job.job_id
            async with job:
                await self._pass_on(mount, job)

    async def _open(self, mount: Mount, request: Request, context: JobContext, client: ClientConnection) -> AnyAsyncJob:
        """Have a worker take the request. A small body is there before one is leased: it can't be held by it."""
        length = self._length
        if length is None and self._connection is not None:
            length = self._connection.whole_body()
        small = await client.whole() if length is not None and 0 < length <= INLINE else None
        while True:
            pool = mount.pool
            if self._length != 0:
                request = replace(request, body=client.body() if small is None else small)
            try:
                return await pool.aopen(request, context=context, write_timeout=math.inf)
            except PoolClosed:
                if mount.pool is pool:
                    raise
                # The pool was replaced while this request waited for a worker; nothing of it was taken.

    async def _pass_on(self, mount: Mount, job: AnyAsyncJob) -> None:
        head, answer = job.head, self._answer
        headers = end_to_end(head.headers)
        if head.status > MOST:
            job.close()
            details = {"detail": f"the handler's status {head.status} is none of HTTP's", "fault": "protocol"}
            await self._give(*refusal(502, details))
            return
        if mount.route is not None:
            host = next((value for name, value in self._headers if name == "host"), "")
            prefix = self._mount.removesuffix("/")
            headers = mount.route.restore_locations(headers, self._scope.get("scheme", "http"), host, prefix)
        if head.status == 304:  # servers would wait for as many bytes as it tells of (RFC 9110, 8.6)
            headers = [(name, value) for name, value in headers if name.lower() != "content-length" or value == "0"]
        await self._start(ResponseHead(head.status, headers, head.phrase))
        while piece := await job.read():
            if job.finished:
                await answer.end(piece)
                return
            await answer.piece(piece)
        await answer.end()

    # -- the answer ----------------------------------------------------------------------------------

    async def _give(self, head: ResponseHead, body: bytes) -> None:
        """All of a response that is the gateway's own."""
        await self._start(head)
        await self._answer.end(b"" if self._method == "HEAD" else body)

    async def _start(self, head: ResponseHead) -> None:
        """The answer's head. A client that was not told to go on may or may not send its body: that ends here."""
        client = self._client
        if self._expects and self._version.startswith("1") and (client is None or not client.asked):
            head = msgspec.structs.replace(head, headers=[*head.headers, ("connection", "close")])
        await self._answer.start(head)
        if isinstance(client, AttendedClient):
            client.want()

    def _finish(self) -> None:
        answer = self._answer
        client = self._scope.get("client")
        if self._span is not None:
            self._span.end(answer.status, self._job_id)
        self._gateway._tell(
            RequestFinished(
                self._mount,
                self._method,
                self._target,
                client[0] if client else "",
                answer.status,
                answer.sent,
                answer.whole,
                time.monotonic() - self._began,
                self._job_id,
                next((value for name, value in self._headers if name == "x-request-id"), ""),
            )
        )


def _address(told: Any, default: tuple[str, int]) -> tuple[str, int]:
    """A host and a port as a server tells them: some give the port as text, or None on a unix socket."""
    try:
        host, port = told[0], int(told[1] or 0)
    except (TypeError, ValueError, IndexError):
        return default
    return (str(host), port) if 0 <= port <= 65535 else default


def _body_length(scope: Scope) -> int | None:
    """How long a request's body is: 0 for none, None where that is not known beforehand (RFC 9112, 6)."""
    length: int | None = 0
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            value = value.strip(b" \t")
            length = int(value) if value.isdigit() and len(value) < 19 else None
    if length == 0 and not scope.get("http_version", "1.1").startswith("1"):
        return None  # HTTP/2 and 3 have bodies without either header
    return length
