"""Async native handlers that the tests run in workers. `app` dispatches on the last segment of the path."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from runner import AsyncHandlerRequest, AsyncHandlerResponse


async def app(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> bytes | None:
    handler: Any = globals()["do_" + request.path.rpartition("/")[2]]
    result: bytes | None = await handler(request, response)
    return result


class App:
    """An object that is called as a coroutine."""

    async def __call__(self, request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> bytes:
        return b"called"


called = App()


async def do_hello(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> bytes:
    return b"hello"


async def do_show(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> bytes:
    response.headers["x-multi"] = "1"
    response.headers.add("x-multi", "2")
    await response.write_header(203)
    response.headers["x-late"] = "1"
    await response.write_header(500)
    body = await request.body.read()
    seen = {
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "headers": request.headers.pairs(),
        "body": body.decode(),
        "key": request.context.delegated_api_key_id,
        "cancelled": request.cancelled,
        "loop": id(asyncio.get_running_loop()),
        "pid": os.getpid(),
    }
    await response.flush()
    return json.dumps(seen).encode()


async def do_echo(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    async for piece in request.body:
        await response.write(piece)


async def do_sleep(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    seen = Path(parse_qs(request.query)["seen"][0])
    await response.write(b"begun")
    try:
        await asyncio.sleep(1000)
    finally:
        seen.write_text(f"cancelled {request.cancelled}")


async def do_text(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> Any:
    return "text"


async def do_raise(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    await response.write(b"")
    raise ValueError("boom from a coroutine")
