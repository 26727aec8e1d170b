"""Handlers that fork: what their children do must be nobody's answer."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import multiprocessing.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

children: list[int] = []


def fork_and(deed: str) -> bool:
    """Fork; True in a child that is to return."""
    if pid := os.fork():
        children.append(pid)
        return False
    print(f"child {deed}")
    if deed == "exits":
        sys.exit(7)
    if deed == "exits with words":
        sys.exit("the words of its end")
    if deed == "raises":
        raise RuntimeError("the child's error")
    if deed == "returns late":
        time.sleep(0.2)
    if deed == "shuts down":
        raise KeyboardInterrupt
    return True


def ends() -> str:
    """The exit codes of the children so far, waited for."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    children.clear()
    return repr(codes)


def answer(path: str) -> str:
    """What any of the apps says; `path` is what the child does, or a question."""
    deed = path.removeprefix("/").replace("-", " ")
    if deed == "ends":
        return ends()
    if deed == "pid":
        return str(os.getpid())
    if deed == "processes":
        return processes()
    fork_and(deed)
    return f"{os.getpid()}"


def processes() -> str:
    """What subprocess and multiprocessing do, as ever."""
    code = subprocess.run(["sh", "-c", "exit 3"], check=False, preexec_fn=lambda: None).returncode
    found = [code]
    for method in ("fork", "spawn", "forkserver"):
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=sys.exit, args=(4,))
        process.start()
        process.join()
        found.append(process.exitcode or 0)
    return repr(found)


def native(request: Any, response: Any) -> bytes:
    return answer(request.path).encode()


def native_writer(request: Any, response: Any) -> None:
    body = answer(request.path).encode()
    response.write_header(200)
    response.write(body)


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    start_response("200 OK", [])
    return [answer(environ["PATH_INFO"]).encode()]


def wsgi_stream(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield answer(environ["PATH_INFO"]).encode()
    yield b""


async def async_native(request: Any, response: Any) -> bytes:
    body = answer(request.path).encode()
    await asyncio.sleep(0)
    return body


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise RuntimeError("none")
    body = answer(scope["path"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def view(request: Request) -> Response:
    return PlainTextResponse(answer(request.url.path))


def view_in_a_thread(request: Request) -> Response:
    return PlainTextResponse(answer(request.url.path))


async def view_in_an_executor(request: Request) -> Response:
    return PlainTextResponse(await asyncio.to_thread(answer, request.url.path))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    print("shutdown in", os.getpid())


async def dispatch(request: Request, call_next: Any) -> Any:
    return await call_next(request)


def starlette(of: Callable[..., Any]) -> Starlette:
    app = Starlette(routes=[Route("/{path}", of)], lifespan=lifespan)
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    return app


asgi = starlette(view)
asgi_thread = starlette(view_in_a_thread)
asgi_executor = starlette(view_in_an_executor)


# -- a worker's ordinary end --------------------------------------------------------------------------


def say(words: str) -> None:
    print("at exit:", words, flush=True)


def register_ends(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    if environ["PATH_INFO"] == "/register":
        atexit.register(say, "first registered")
        atexit.register(say, "last registered")
        multiprocessing.util.Finalize(None, say, ("a finalizer of multiprocessing",), exitpriority=1)
        threading.Timer(0.1, say, ("a thread that is no daemon",)).start()
    if environ["PATH_INFO"] == "/hang":
        atexit.register(time.sleep, 60)
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]


@asynccontextmanager
async def registering(app: Starlette) -> AsyncIterator[None]:
    atexit.register(say, "registered in start-up")
    yield
    say("lifespan shutdown")


asgi_ends = Starlette(routes=[Route("/", lambda request: PlainTextResponse("x"))], lifespan=registering)


# -- orphans ------------------------------------------------------------------------------------------

kept: list[subprocess.Popen[bytes]] = []


def leave_orphans(request: Any, response: Any) -> bytes:
    """Orphans by a shell; an own child that is not waited for yet; how many zombies there are."""
    if request.path == "/orphan":
        subprocess.run("sleep 0.01 &", shell=True, check=True)
    elif request.path == "/system":
        os.system("sleep 0.01 &")
    elif request.path == "/keep":
        kept.append(subprocess.Popen(["sh", "-c", f"exit {len(kept) + 1}"]))
        os.waitid(os.P_PID, kept[-1].pid, os.WEXITED | os.WNOWAIT)
    elif request.path == "/kept":
        return repr([process.wait() for process in kept]).encode()
    return b"done"


async def leave_orphans_async(request: Any, response: Any) -> bytes:
    if request.path == "/keep":
        process = await asyncio.create_subprocess_exec("sh", "-c", "exit 5")
        return str(await process.wait()).encode()
    return leave_orphans(request, response)
