"""The contract's app in FastAPI and Starlette, with sse-starlette."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import BackgroundTasks, FastAPI, Request, UploadFile
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from sse_starlette import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    yield {"started": "by the lifespan"}


app = FastAPI(lifespan=lifespan)


class PlainMiddleware:
    """Middleware as ASGI has it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-middleware", b"1"))
            await send(message)

        await self.app(scope, receive, send_with_header if scope["type"] == "http" else send)


async def dispatch(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["x-dispatched"] = "1"
    return response


app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
app.add_middleware(PlainMiddleware)


@app.get("/hello")
@app.head("/hello")
async def hello() -> dict[str, str]:
    return {"hello": "world"}


@app.get("/in-a-thread")
def in_a_thread() -> dict[str, str]:
    return {"hello": "from a thread"}


@app.get("/lifespan")
async def show_lifespan(request: Request) -> dict[str, str]:
    return {"started": request.state.started}


@app.api_route("/echo/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
async def echo(rest: str, request: Request) -> dict[str, Any]:
    own = {name: value for name, value in request.headers.items() if name.startswith("x-") or name == "host"}
    return {
        "method": request.method,
        "path": request.url.path,
        "query": {key: request.query_params.getlist(key) for key in request.query_params},
        "headers": own,
        "url": str(request.url),
        "body": (await request.body()).decode(),
    }


@app.post("/form")
async def form(request: Request) -> dict[str, Any]:
    return dict(await request.form())


@app.post("/upload")
async def upload(file: UploadFile) -> dict[str, Any]:
    digest = hashlib.sha256()
    while piece := await file.read(1 << 20):
        digest.update(piece)
    return {"name": file.filename, "sha256": digest.hexdigest()}


@app.post("/raw")
async def raw(request: Request) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    async for piece in request.stream():
        digest.update(piece)
        size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}


@app.get("/stream")
async def stream() -> Response:
    async def pieces() -> AsyncIterator[str]:
        for number in range(100):
            yield f"piece {number}\n"

    return StreamingResponse(pieces(), media_type="text/plain")


@app.get("/sse")
async def sse() -> Response:
    async def events() -> AsyncIterator[dict[str, Any]]:
        for number in range(5):
            yield {"event": "tick", "data": number}

    return EventSourceResponse(events())


@app.get("/ticks")
async def ticks() -> Response:
    """Five lines, 50 ms apart, each with the time of its writing."""

    async def lines() -> AsyncIterator[str]:
        for _ in range(5):
            yield f"{time.monotonic()}\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(lines(), media_type="text/plain")


@app.get("/redirect")
async def go() -> Response:
    return RedirectResponse("/hello", status_code=302)


@app.get("/cookies")
async def cookies(request: Request) -> Response:
    response = JSONResponse(request.cookies)
    response.set_cookie("a", "1")
    response.set_cookie("b", "2", httponly=True)
    return response


@app.get("/empty/{status}")
async def empty(status: int) -> Response:
    return Response(status_code=status)


@app.get("/file")
async def file() -> Response:
    return Response(b"0123456789" * 1000, media_type="application/octet-stream")


@app.get("/error")
async def error() -> Response:
    raise ValueError("boom in the app")


@app.get("/background")
async def background(note: Annotated[str, "a path"], tasks: BackgroundTasks) -> dict[str, bool]:
    tasks.add_task(Path(note).write_text, "done")
    return {"started": True}
