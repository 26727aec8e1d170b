"""ASGI 3 apps (spec version 2.4), as a server behind the caller's URL would call them.

Lifespan runs once per worker, before it says that it is ready, and each request gets a copy of its state. The
head leaves with the first body message, as the specification asks. When the caller leaves, `receive` gives
`http.disconnect` and `send` raises OSError. A second head, or a message after the end, is the app's error.

What the host vouches for about a job is in `scope["extensions"]["blastdoor"]["context"]`.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

from ...errors import ErrorWithoutTraceback
from ...wire.messages import Header
from ..async_pipes import AsyncRequest, AsyncResponse, let_cancelled_go
from ..pipes import UploadStopped
from .adapter import AsyncAdapter

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_VERSIONS: Final = {"version": "3.0", "spec_version": "2.4"}
_LIFESPAN_VERSIONS: Final = {"version": "3.0", "spec_version": "2.0"}


class StartUpFailed(ErrorWithoutTraceback):
    """The app has refused to start: it sent lifespan.startup.failed."""


class ASGIAdapter(AsyncAdapter):
    """Calls an ASGI app. `root_path` is that of requests that lie under it."""

    kind = "asgi"
    asks_first = True

    def __init__(self, app: Application, root_path: str) -> None:
        self._app = app
        self._root_path = root_path.rstrip("/")
        self._state: dict[str, Any] = {}
        self._lifespan: _Lifespan | None = None

    async def start(self) -> None:
        """Run the app's start-up. StartUpFailed where it fails."""
        self._lifespan = _Lifespan(self._app, self._state)
        await self._lifespan.start_up()

    async def stop(self) -> None:
        """Run the app's shutdown."""
        if self._lifespan is not None:
            await self._lifespan.shut_down()

    async def __call__(self, request: AsyncRequest, response: AsyncResponse) -> None:
        cycle = _Cycle(request, response)
        scope = build_scope(request, self._root_path)
        scope["state"] = self._state.copy()
        await self._app(scope, cycle.receive, cycle.send)
        cycle.check_whole()


class _Cycle:
    """`receive` and `send` of one call."""

    __slots__ = ("_asked", "_headers", "_request", "_response", "_status")

    def __init__(self, request: AsyncRequest, response: AsyncResponse) -> None:
        self._request = request
        self._response = response
        self._asked = False
        self._status = 0
        self._headers: list[Header] = []

    async def receive(self) -> Message:
        request = self._request
        if not request.cancelled and not self._response.ended:
            if not request.ended:
                self._asked = True
                try:
                    piece = await request.read_piece()
                except UploadStopped:
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": piece, "more_body": not request.ended}
            if not self._asked:
                await let_cancelled_go()
                self._asked = True
                return {"type": "http.request", "body": b"", "more_body": False}
        await request.concluded()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            await self._send_body(message)
        elif kind == "http.response.start":
            if self._status:
                raise RuntimeError("the app sent http.response.start a second time")
            status = message["status"]
            if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 999:
                raise ValueError(f"the status must be an int between 200 and 999, not {status!r}")
            headers = [(_text(name), _text(value)) for name, value in message.get("headers", ())]
            self._status = status
            self._headers = headers
        elif kind != "http.response.trailers":  # trailers are ignored: no client of ours could show them
            raise RuntimeError(f"the app sent {kind!r}, which has no place in a response")

    async def _send_body(self, message: Message) -> None:
        response = self._response
        if not self._status:
            raise RuntimeError("the app sent http.response.body before http.response.start")
        body = message.get("body", b"")
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise TypeError(f"the body of http.response.body must be bytes, not {type(body).__name__}")
        if not message.get("more_body", False):
            await response.finish(self._status, self._headers, body)
        elif response.started:
            await response.write(body)
        elif body:
            await response.start_with(self._status, self._headers, body)
        else:
            await response.start(self._status, self._headers)

    def check_whole(self) -> None:
        if self._response.ended or self._request.cancelled:
            return
        if not self._status:
            raise RuntimeError("the app returned without having sent http.response.start")
        raise RuntimeError("the app returned before the end of its response: the last body has more_body=False")


_told_of_str = False


def _text(part: object) -> str:
    """A header's name or value as text. TypeError for what is neither bytes nor, as some apps have it, str."""
    if isinstance(part, (bytes, bytearray, memoryview)):
        return bytes(part).decode("latin-1")
    if not isinstance(part, str):
        raise TypeError(f"a header's name and value must be bytes, not {part!r}")
    global _told_of_str
    if not _told_of_str:
        _told_of_str = True
        print(f"blastdoor: the app gives headers as str, which ASGI has as bytes: {part[:80]!r}", file=sys.stderr)
    return part


class _Lifespan:
    """The app's start-up and shutdown: one call of it that lasts as long as the worker."""

    def __init__(self, app: Application, state: dict[str, Any]) -> None:
        self._app = app
        self._scope: Scope = {"type": "lifespan", "asgi": dict(_LIFESPAN_VERSIONS), "state": state}
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._started = asyncio.Event()
        self._stopped = asyncio.Event()
        self._failed: str | None = None
        self._taken = False
        self._supported = False
        self._task: asyncio.Task[None] | None = None

    async def start_up(self) -> None:
        self._task = asyncio.create_task(self._run())
        self._messages.put_nowait({"type": "lifespan.startup"})
        await self._started.wait()
        if self._failed is not None:
            raise StartUpFailed(f"the app's lifespan start-up failed: {self._failed or 'it gave no reason'}")

    async def shut_down(self) -> None:
        if self._supported:
            self._messages.put_nowait({"type": "lifespan.shutdown"})
            await self._stopped.wait()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception:  # noqa: BLE001 - see below
            # An app that knows no lifespan raises here, and the server goes on (ASGI, lifespan protocol). Where it had
            # taken the message, what it raised may be a mistake of its own: it is told.
            if self._taken and self._failed is None:
                print("blastdoor: the app raised in its lifespan, and goes on without:", file=sys.stderr)
                traceback.print_exc()
        finally:
            self._supported = False
            self._started.set()
            self._stopped.set()

    async def _receive(self) -> Message:
        message = await self._messages.get()
        self._taken = True
        return message

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            self._supported = True
            self._started.set()
        elif kind == "lifespan.startup.failed":
            self._failed = str(message.get("message", ""))
            self._started.set()
        elif kind == "lifespan.shutdown.complete":
            self._stopped.set()
        elif kind == "lifespan.shutdown.failed":
            print(f"blastdoor: the app's lifespan shutdown failed: {message.get('message', '')}", file=sys.stderr)
            self._stopped.set()
        else:
            raise RuntimeError(f"the app sent {kind!r}, which has no place in a lifespan")


def build_scope(request: AsyncRequest, root_path: str) -> dict[str, Any]:
    """The scope of an HTTP connection, without its state."""
    head = request.head
    raw_path, _, query = head.target.partition("?")
    if root_path and raw_path != root_path and not raw_path.startswith(root_path + "/"):
        root_path = ""
    return {
        "type": "http",
        "asgi": dict(_VERSIONS),
        "http_version": "1.1",
        "method": head.method.upper(),
        "scheme": head.scheme,
        "path": unquote(raw_path) if "%" in raw_path else raw_path,
        "raw_path": raw_path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": root_path,
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.headers],
        "client": head.client,
        "server": head.server,
        "extensions": {"blastdoor": {"context": head.context}},
    }
