"""Handlers whose jobs run side by side in one worker: `app` as a function, `async_app` as a coroutine."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from runner import JobCancelled

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
LOCAL = threading.local()


def parameter(request: Any, name: str, default: str = "") -> str:
    found: list[str] = parse_qs(request.query).get(name, [default])
    return found[0]


def lines(request: Any) -> list[bytes]:
    """What `stream` answers: numbered, and all different from another job's."""
    name, count = parameter(request, "name"), int(parameter(request, "count", "1"))
    return [f"{name} {number}\n".encode() for number in range(count)]


def crash() -> None:
    ctypes.string_at(0)


def app(request: Any, response: Any) -> bytes | None:
    return globals()[f"do_{request.path[1:]}"](request, response)  # type: ignore[no-any-return]


def do_hello(request: Any, response: Any) -> bytes:
    return b"hello"


def do_pid(request: Any, response: Any) -> bytes:
    return b"%d" % os.getpid()


def do_stream(request: Any, response: Any) -> None:
    pause = float(parameter(request, "pause", "0"))
    for line in lines(request):
        response.write(line)
        time.sleep(pause)


def do_echo(request: Any, response: Any) -> None:
    while data := request.body.read1():
        response.write(data)


def do_big(request: Any, response: Any) -> None:
    for _ in range(int(parameter(request, "pieces"))):
        response.write(b"x" * 65536)


def do_die(request: Any, response: Any) -> None:
    crash()


def do_wait(request: Any, response: Any) -> None:
    """Runs until its caller leaves, and says so in the file `told`."""
    try:
        response.write(b"begun")
        while True:
            time.sleep(0.001)
    except JobCancelled:
        if told := parameter(request, "told"):
            Path(told).touch()
        raise


def do_stubborn(request: Any, response: Any) -> None:
    """Does not end, whatever is raised in it."""
    while True:
        try:
            response.write(b"begun")
            while True:
                time.sleep(0.001)
        except BaseException:
            continue


def do_seen(request: Any, response: Any) -> bytes:
    """What it finds of the jobs before and beside it; then leaves its own."""
    found = VARIABLE.get(), getattr(LOCAL, "name", ""), threading.current_thread().name
    name = parameter(request, "name")
    VARIABLE.set(name)
    LOCAL.name = name
    time.sleep(float(parameter(request, "pause", "0")))
    kept = VARIABLE.get() == name == LOCAL.name
    return repr((*found, kept)).encode()


def do_print(request: Any, response: Any) -> bytes:
    """Prints its name in pieces, with others in between; the last line has no end."""
    name = parameter(request, "name")
    for number in range(5):
        for piece in (f"{name} ", "says ", f"{number}\n"):
            print(piece, end="")
            time.sleep(0.001)
    print(f"{name} ends", end="", file=sys.stderr)
    return name.encode()


def share(request: Any) -> mmap.mmap:
    """Takes `size` bytes of shared memory, which limits of the data segment do not count."""
    block = mmap.mmap(-1, int(parameter(request, "size")))
    for place in range(0, len(block), 4096):
        block[place] = 1
    if here := parameter(request, "here"):
        Path(here).touch()
    return block


def do_share(request: Any, response: Any) -> bytes:
    block = share(request)
    time.sleep(3600)
    return bytes(block[:1])


def do_burn(request: Any, response: Any) -> None:
    response.write(b"begun")
    while True:
        pass


def do_background_print(request: Any, response: Any) -> bytes:
    thread = threading.Thread(target=print, args=("from no job",))
    thread.start()
    thread.join()
    return b"printed"


def do_helper_reads(request: Any, response: Any) -> None:
    """A thread of its own reads the body, and waits for its end, while the head goes out; the file `here` says so."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(request.body.read()))
    reader.start()
    time.sleep(0.05)  # it waits in the pipe by now
    response.write_header(200)
    Path(parameter(request, "here")).touch()
    response.write(b"x" * 20_000)
    reader.join()
    response.write(found[0])


def do_helper_writes(request: Any, response: Any) -> None:
    """A thread of its own streams; this one waits for it, and says in the file `told` that it was cancelled."""
    failed: list[BaseException] = []

    def stream() -> None:
        try:
            while True:
                response.write(b"x" * 20_000)
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=stream)
    writer.start()
    try:
        while writer.is_alive():
            time.sleep(0.001)
    except JobCancelled:
        Path(parameter(request, "told")).touch()
        raise


LEAKED: list[int] = []


def do_leak(request: Any, response: Any) -> bytes:
    """Opens all descriptors that it may."""
    try:
        while True:
            LEAKED.append(os.dup(0))
    except OSError:
        return b"leaked"


def do_inherited(request: Any, response: Any) -> bytes:
    """The descriptors that a program which it starts has."""
    listing = Path(parameter(request, "here"))
    os.system(f"ls /proc/self/fd > {listing}")  # which closes nothing: what is inherited is there
    return listing.read_bytes()


def do_shut_line(request: Any, response: Any) -> bytes:
    line = socket.socket(fileno=os.dup(5))
    line.shutdown(socket.SHUT_RDWR)
    line.close()
    return b"shut"


def do_rename(request: Any, response: Any) -> None:
    """Gives its thread another name, and burns."""
    name = ctypes.create_string_buffer(b"other")
    time.sleep(0.1)
    ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
    do_burn(request, response)


def do_print_much(request: Any, response: Any) -> bytes:
    """Threads in this job's context print whole lines, and parts of some."""
    context = contextvars.copy_context()

    def say(number: int) -> None:
        for turn in range(200):
            print(f"<{number}.{turn}>")

    threads = [threading.Thread(target=context.copy().run, args=(say, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return b"printed"


async def async_app(request: Any, response: Any) -> bytes | None:
    return await globals()[f"async_{request.path[1:]}"](request, response)  # type: ignore[no-any-return]


async def async_hello(request: Any, response: Any) -> bytes:
    return b"hello"


async def async_pid(request: Any, response: Any) -> bytes:
    return b"%d" % os.getpid()


async def async_stream(request: Any, response: Any) -> None:
    pause = float(parameter(request, "pause", "0"))
    for line in lines(request):
        await response.write(line)
        await asyncio.sleep(pause)


async def async_echo(request: Any, response: Any) -> None:
    async for piece in request.body:
        await response.write(piece)


async def async_big(request: Any, response: Any) -> None:
    for _ in range(int(parameter(request, "pieces"))):
        await response.write(b"x" * 65536)


async def async_die(request: Any, response: Any) -> None:
    crash()


async def async_wait(request: Any, response: Any) -> None:
    try:
        await response.write(b"begun")
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        if told := parameter(request, "told"):
            Path(told).touch()
        raise


async def async_stubborn(request: Any, response: Any) -> None:
    await response.write(b"begun")
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


async def async_seen(request: Any, response: Any) -> bytes:
    found = VARIABLE.get(), "", "loop"
    name = parameter(request, "name")
    VARIABLE.set(name)
    await asyncio.sleep(float(parameter(request, "pause", "0")))
    return repr((*found, VARIABLE.get() == name)).encode()


async def async_print(request: Any, response: Any) -> bytes:
    name = parameter(request, "name")
    for number in range(5):
        for piece in (f"{name} ", "says ", f"{number}\n"):
            print(piece, end="")
            await asyncio.sleep(0.001)
    print(f"{name} ends", end="", file=sys.stderr)
    return name.encode()


async def async_share(request: Any, response: Any) -> bytes:
    block = share(request)
    await asyncio.sleep(3600)
    return bytes(block[:1])


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [repr(environ["wsgi.multithread"]).encode()]


async def async_hold(request: Any, response: Any) -> bytes:
    """Holds up the loop, and all other jobs on it, once it has said so."""
    await response.write(b"begun")
    time.sleep(float(parameter(request, "seconds")))
    return b"held"


async def async_break(request: Any, response: Any) -> bytes:
    """Has our own code fail when it waits for the next request."""
    from runner.worker.async_pipes import AsyncPipes

    async def fail(pipes: AsyncPipes) -> Any:
        raise MemoryError

    AsyncPipes.next_request = fail  # type: ignore[assignment, method-assign]
    return b"broken"


async def async_inherited(request: Any, response: Any) -> bytes:
    return do_inherited(request, response)
