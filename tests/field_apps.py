"""Apps as they are found in the field, odd ones included."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.urls import path
from flask import Flask, after_this_request
from flask import Response as FlaskResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

StartResponse = Callable[..., Any]


class MyStr(str):
    """As Django's SafeString and its like."""

    __slots__ = ()

    def __str__(self) -> str:
        return "not what it is"


class MyBytes(bytes):
    __slots__ = ()


# -- WSGI ---------------------------------------------------------------------------------------------


def phrases(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    """The status line that the query names."""
    start_response(environ["HTTP_X_STATUS"], [("X-Sub", MyStr("a subclass")), (MyStr("X-Name"), "  padded \t")])
    return [b"body"]


flask_app = Flask(__name__)


@flask_app.route("/shouted")
def shouted() -> FlaskResponse:
    return FlaskResponse("loud", status="404 THIS IS NOT HERE")


@flask_app.route("/close/<how>/<deed>")
def close_late(how: str, deed: str) -> FlaskResponse:
    """A response, whole or streamed, at whose close something is done."""
    body: Any = "whole" if how == "whole" else iter(["str", "eam"])
    response = FlaskResponse(body)
    response.call_on_close(lambda: at_close(deed))
    return response


@flask_app.route("/closed/<int:times>")
def fast_close(times: int) -> str:
    @after_this_request
    def note(response: FlaskResponse) -> FlaskResponse:
        response.call_on_close(lambda: None)
        return response

    return "x" * times


def at_close(deed: str) -> None:
    if deed == "raises":
        raise RuntimeError("raised at close")
    if deed == "exits":
        raise SystemExit(3)
    if deed == "dies":
        os.kill(os.getpid(), 11)
    if deed.startswith("waits"):
        _, here, go = deed.split("+")
        open(here.replace("|", "/"), "w").close()
        while not os.path.exists(go.replace("|", "/")):
            time.sleep(0.005)


class BrokenClose:
    """An iterable that raises as it is gone through, and as it is closed."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("raised in the iteration")

    def close(self) -> None:
        print("it was closed")


def broken(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return BrokenClose()


def lengths(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    """What a WSGI app sees of a body."""
    length = environ.get("CONTENT_LENGTH")
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("X-Length", str(length)), ("X-Read", str(len(body)))])
    return []


if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="x")
    django.setup()


def upload(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{len(request.body)} bytes")


urlpatterns = [path("upload", upload)]
django_app = WSGIHandler()


# -- ASGI ---------------------------------------------------------------------------------------------


async def str_headers(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise RuntimeError("none")
    await send({"type": "http.response.start", "status": 200, "headers": [("x-text", "caf\u00e9"), (b"x-bytes", b"v")]})
    await send({"type": "http.response.body", "body": b"done"})


async def number_headers(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-number", 5)]})
    await send({"type": "http.response.body", "body": b"done"})


async def ask_first(request: Request) -> Response:
    """Ask whether the client is there, now and then, and read the body."""
    asked = [await request.is_disconnected() for _ in range(3)]
    size = 0
    async for piece in request.stream():
        size += len(piece)
        asked.append(await request.is_disconnected())
    return JSONResponse({"asked": any(asked), "size": size})


polite_asgi = Starlette(routes=[Route("/", ask_first, methods=["POST"])])


async def polite_native(request: Any, response: Any) -> bytes:
    """The same by asyncio's own means."""
    size = 0
    for _ in range(3):
        task = asyncio.ensure_future(request.body.__aiter__().__anext__())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async for piece in request.body:
        size += len(piece)
    return str(size).encode()


async def dated(scope: Any, receive: Any, send: Any) -> None:
    """Date and Server of its own."""
    if scope["type"] == "lifespan":
        raise RuntimeError("none")
    headers = [(b"Date", b"Thu, 01 Jan 1970 00:00:00 GMT"), (b"Server", b"its own")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(3):
        await send({"type": "http.response.body", "body": b"piece ", "more_body": True})
    await send({"type": "http.response.body"})


# -- preloaded numpy ----------------------------------------------------------------------------------


def draw(request: Any, response: Any) -> bytes:
    import random

    import numpy.random

    return repr((os.getpid(), float(numpy.random.random()), random.random())).encode()
