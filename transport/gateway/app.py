"""The gateway's ASGI app: a request comes in, a job of a pool answers it, a client that leaves ends its job.

It streams both ways and passes on what belongs to the message, not to the connection. Faults are problem+json before
the head; after it the app raises, so that its server breaks the connection off and no client takes the part for the
whole. Every request ends in one `RequestFinished`, which logs and metrics subscribe to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import anyio
import msgspec

from runner.errors import BlastdoorError, JobFailed, PoolClosed
from runner.model.request import INLINE
from runner.wire.messages import ResponseHead
from transport.gateway.client_connection import ClientConnection, ClientGone, Receive
from transport.gateway.response import ClientResponse, Send
from transport.gateway.router import Asked, BodyTooLarge, BodyTooSlow, Call, Refused, Router

if TYPE_CHECKING:
    from runner.protocols import AnyAsyncJob
    from transport.gateway.traces import Span

Scope = Mapping[str, Any]

_PORTS: Final = {"http": 80, "https": 443}
_PATH_CHARACTERS: Final = "/!$&'()*+,;=:@~"


class BrokenOff(Exception):
    """Raised to the ASGI server so that it breaks the connection off: the answer has failed after its head."""


class Gateway(Router):
    """An ASGI app that has pools answer plain HTTP requests.

    `mounts` is a pool, or a `Mount`, or a mapping of paths to these. Bodies over `max_body` bytes are refused (413). A
    client has `body_timeout` seconds to send its body, and a second more for each 500 bytes (408). The pools are their
    owners', but where the server speaks the lifespan protocol they are started before the first request.
    ConfigurationError for what can't work.
    """

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


class _Service:
    """One request, from its scope to the end of its answer."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._receive = receive
        self._asked = asked = _asked(scope)
        self._mount = ""
        self._job_id = ""
        self._span: Span | None = None
        self._failure: Exception | None = None
        self._answer = ClientResponse(send)
        self._client: ClientConnection | None = None
        self._is_http_1 = scope.get("http_version", "1.1").startswith("1")
        self._expects = asked.length != 0 and ("expect", "100-continue") in [
            (name, value.lower()) for name, value in asked.headers if name == "expect"
        ]

    async def run(self) -> None:
        """Serve it. BrokenOff where the server has to break off what it has begun to send."""
        gateway, asked = self._gateway, self._asked
        try:
            try:
                call = gateway.route(asked)
            except Refused as refused:
                self._mount, self._span = refused.mount, refused.span
                with suppress(OSError):  # the client has gone
                    await self._give(*refused.answer)
                return
            self._mount, self._span = call.path, call.span
            async with anyio.create_task_group() as group:
                leave = group.cancel_scope.cancel
                client = ClientConnection(
                    self._receive, leave, gateway.body_timeout, gateway.max_body, hold=self._expects
                )
                self._client = client
                group.start_soon(client.listen)
                await self._try(call, client)
                group.cancel_scope.cancel()
            if self._failure is not None and not client.gone:
                raise BrokenOff(f"{self._job_id or asked.path[:200]}: {self._failure}") from self._failure
        finally:
            answer = self._answer
            gateway.tell(self._mount, asked, answer.status, answer.sent, self._job_id, self._span, whole=answer.whole)

    async def _try(self, call: Call, client: ClientConnection) -> None:
        try:
            with call.span.active() if call.span is not None else nullcontext():
                await self._serve(call, client)
        except (BlastdoorError, BodyTooLarge, BodyTooSlow, ClientGone, OSError) as error:
            self._failure = error

    async def _serve(self, call: Call, client: ClientConnection) -> None:
        """Have a job answer. Raises what ends the answer after its head."""
        try:
            job = await self._open(call, client)
        except (BlastdoorError, BodyTooSlow, BodyTooLarge) as error:
            answer = self._gateway.fault_answer(error, debug=call.mount.pool.debug)
            if answer is None:
                raise
            if isinstance(error, JobFailed):
                self._job_id = error.fault.job_id
            await self._give(*answer)
        except ClientGone:
            return
        else:
            self._job_id = job.job_id
            async with job:
                await self._pass_on(call, job)

    async def _open(self, call: Call, client: ClientConnection) -> AnyAsyncJob:
        """Have a worker take the request. A small body is there before one is leased: it can't be held by it."""
        length, request = self._asked.length, call.request
        small = await client.whole() if length is not None and 0 < length <= INLINE else None
        while True:
            pool = call.mount.pool
            if length != 0:
                request = replace(request, body=client.body() if small is None else small)
            try:
                return await pool.aopen(request, context=call.context, write_timeout=math.inf)
            except PoolClosed:
                if call.mount.pool is pool:
                    raise
                # The pool was replaced while this request waited for a worker; nothing of it was taken.

    async def _pass_on(self, call: Call, job: AnyAsyncJob) -> None:
        answer = self._answer
        try:
            head = call.passed_on(job.head)
        except Refused as refused:
            job.close()
            await self._give(*refused.answer)
            return
        await self._start(head)
        while piece := await job.read():
            if job.finished:
                await answer.end(piece)
                return
            await answer.piece(piece)
        await answer.end()

    async def _give(self, head: ResponseHead, body: bytes) -> None:
        """All of a response that is the gateway's own."""
        await self._start(head)
        await self._answer.end(b"" if self._asked.method == "HEAD" else body)

    async def _start(self, head: ResponseHead) -> None:
        """The answer's head. A client that was not told to go on may or may not send its body: that ends here."""
        client = self._client
        if self._expects and self._is_http_1 and (client is None or not client.asked):
            head = msgspec.structs.replace(head, headers=[*head.headers, ("connection", "close")])
        await self._answer.start(head)
        if client is not None:
            client.want()


def _asked(scope: Scope) -> Asked:
    """What a scope of ASGI's tells."""
    headers = [
        (name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")) for name, value in scope["headers"]
    ]
    raw: bytes = scope.get("raw_path") or quote(scope["path"], safe=_PATH_CHARACTERS).encode()
    query: bytes = scope["query_string"]
    path = raw.decode("latin-1")
    scheme = "https" if scope.get("scheme") == "https" else "http"
    server = _address(scope.get("server")) or ("localhost", _PORTS[scheme])
    return Asked(
        scope["method"],
        path,
        f"{path}?{query.decode('latin-1')}" if query else path,
        headers,
        scheme,
        server,
        _address(scope.get("client")),
        _body_length(scope),
    )


def _address(told: Any) -> tuple[str, int] | None:
    """A host and a port as a server tells them: some give the port as text, or None on a unix socket."""
    try:
        host, port = told[0], int(told[1] or 0)
    except (TypeError, ValueError, IndexError):
        return None
    return (str(host), port) if 0 <= port <= 65535 else None


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
