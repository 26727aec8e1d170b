"""Async native handlers that the tests run in workers. `app` dispatches on the last segment of the path."""

from __future__ import annotations

import array
import asyncio
import functools
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


async def do_orphan_reader(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    """Fails while a task of its own reads the body."""
    kept.append(asyncio.ensure_future(request.body.read()))
    await asyncio.sleep(0.005)
    raise ValueError("the body is being read")


async def do_orphan_writer(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    """Ends, well or not, while a task of its own writes 8 MiB."""
    kept.append(asyncio.ensure_future(response.write(bytes(8 << 20))))
    await asyncio.sleep(0.005)
    if request.query == "raise":
        raise ValueError("the body is being written")


async def do_shielded(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    """Goes on writing when its caller has left."""
    await asyncio.shield(response.write(bytes(16 << 20)))


async def do_shapes(request: AsyncHandlerRequest, response: AsyncHandlerResponse) -> None:
    """Gives what is a buffer, but no bytes, and what is not contiguous."""
    try:
        await response.write(memoryview(b"abcdef")[::2])
    except TypeError:
        await response.write(array.array("i", [1, 2]))  # type: ignore[arg-type]
    await response.write(memoryview(b"abcd").cast("H"))


kept: list[Any] = []


async def optional(request: AsyncHandlerRequest, response: AsyncHandlerResponse, more: Any = None) -> bytes:
    return b"optional"


def in_a_loop_of_its_own(function: Any) -> Any:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return asyncio.run(function(*arguments))

    return run


@in_a_loop_of_its_own
async def synchronous(request: Any, response: Any) -> bytes:
    await asyncio.sleep(0)
    return b"synchronous"
