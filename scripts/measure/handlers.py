"""Handlers that the measurements run."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

from runner import HandlerRequest, HandlerResponse


def echo(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """The body, as it came."""
    return request.body.read()


def stream(request: HandlerRequest, response: HandlerResponse) -> None:
    """20 events, 50 ms apart, each with the time of its writing."""
    for _ in range(20):
        response.write(f"data: {time.monotonic()}\n\n".encode())
        time.sleep(0.05)


def down(request: HandlerRequest, response: HandlerResponse) -> None:
    """As many MiB as the query says."""
    piece = bytes(1 << 20)
    for _ in range(int(request.query)):
        response.write(piece)


def up(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Reads all, and says how much it was."""
    size = 0
    while piece := request.body.read1(1 << 20):
        size += len(piece)
    return str(size).encode()


def die(request: HandlerRequest, response: HandlerResponse) -> None:
    """Says when it dies, and does."""
    with open(request.body.read(), "w") as file:
        file.write(str(time.monotonic()))
    os.kill(os.getpid(), 9)


def hang(request: HandlerRequest, response: HandlerResponse) -> None:
    """Gives the pids of its worker and of what it has started, and never ends."""
    pids = [os.getpid()]
    if request.body.read() == b"double":
        read, write = os.pipe()
        if not os.fork():
            os.setsid()
            if pid := os.fork():
                os.write(write, str(pid).encode())
                os._exit(0)
            time.sleep(3600)
        os.wait()
        pids.append(int(os.read(read, 20)))
    response.write(" ".join(map(str, pids)).encode())
    while True:
        pass


def tokens(request: HandlerRequest, response: HandlerResponse) -> None:
    """As many tokens of 64 bytes as the query says, each its own write."""
    for _ in range(int(request.query)):
        response.write(b"t" * 64)


def identity(data: bytes) -> bytes:
    """What process pools are asked to do."""
    return data


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """A WSGI app that echoes a small body."""
    body: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app: echoes a small body, or streams as many tokens as the query says, 50 ms apart, or half a second."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/echo":
        await send({"type": "http.response.body", "body": (await receive())["body"]})
        return
    pause = 0.05 if scope["path"] == "/stream" else 0.5
    await asyncio.sleep(random.random())  # no two streams in step
    for _ in range(int(scope["query_string"])):
        data = f"data: {time.monotonic()}\n\n".encode()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(pause)
    await send({"type": "http.response.body", "body": b""})


def two(request: HandlerRequest, response: HandlerResponse) -> None:
    """A byte, and a while later another."""
    response.write(b"a")
    time.sleep(0.005)
    response.write(b"b")


HANDLERS = {
    "echo": echo,
    "stream": stream,
    "down": down,
    "up": up,
    "die": die,
    "hang": hang,
    "tokens": tokens,
    "two": two,
}


def handler(request: HandlerRequest, response: HandlerResponse) -> bytes | None:
    """Dispatches on the path."""
    return HANDLERS[request.path[1:]](request, response)
