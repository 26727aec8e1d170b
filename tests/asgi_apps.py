"""The ASGI apps that the tests run in workers. `app` dispatches on the last segment of the path."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from runner import AbortHandler

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

loops: set[int] = set()


def parameter(scope: Scope, name: str, default: str = "") -> str:
    values: list[str] = parse_qs(scope["query_string"].decode()).get(name, [default])
    return values[0]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"  # this app knows no lifespan, and says so as the specification lets it
    await globals()["do_" + scope["path"].rpartition("/")[2]](scope, receive, send)


async def answer(send: Send, body: bytes, status: int = 200, headers: Any = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request", message
        body += message["body"]
        if not message["more_body"]:
            return body


async def do_hello(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"hello")


async def do_scope(scope: Scope, receive: Receive, send: Send) -> None:
    """The scope as JSON, and the body."""
    context = scope["extensions"]["blastdoor"]["context"]
    shown = {
        **{key: value.decode() if isinstance(value, bytes) else value for key, value in scope.items()},
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "extensions": {name: getattr(context, name) for name in context.__struct_fields__},
        "body": (await read_body(receive)).decode("latin-1"),
        "pid": os.getpid(),
    }
    await answer(send, json.dumps(shown).encode(), headers=[(b"Content-Type", b"application/json")])


async def do_count(scope: Scope, receive: Receive, send: Send) -> None:
    """How many bytes the body has, and in how many messages it came."""
    size = messages = 0
    more = True
    while more:
        message = await receive()
        size += len(message["body"])
        messages += 1
        more = message["more_body"]
    await answer(send, f"{size} {messages}".encode())


async def do_echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Each piece of the body goes back as it comes."""
    await send({"type": "http.response.start", "status": 200})
    more = True
    while more:
        message = await receive()
        more = message["more_body"]
        await send({"type": "http.response.body", "body": message["body"], "more_body": more})


async def do_loop(scope: Scope, receive: Receive, send: Send) -> None:
    """How many event loops this worker has seen."""
    loops.add(id(asyncio.get_running_loop()))
    await answer(send, f"{os.getpid()} {len(loops)}".encode())


async def do_stream(scope: Scope, receive: Receive, send: Send) -> None:
    """`count` pieces, `pause` seconds apart, each with the time of its writing."""
    await send({"type": "http.response.start", "status": 200})
    for number in range(int(parameter(scope, "count", "10"))):
        data = f"{number} {time.monotonic()}\n".encode()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(float(parameter(scope, "pause", "0.02")))
    await send({"type": "http.response.body"})


async def do_head_only(scope: Scope, receive: Receive, send: Send) -> None:
    """The head and no byte of the body, until the caller leaves."""
    await send({"type": "http.response.start", "status": 202})
    await send({"type": "http.response.body", "more_body": True})
    await receive()
    await receive()


async def do_endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Writes on and on, and notes how far it came and what stopped it."""
    written = 0
    await send({"type": "http.response.start", "status": 200})
    try:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            written += 10_000
            Path(parameter(scope, "written")).write_text(str(written))
    except BaseException as error:
        Path(parameter(scope, "stopped")).write_text(type(error).__name__)
        raise


async def do_big(scope: Scope, receive: Receive, send: Send) -> None:
    """One message of `size` bytes."""
    await answer(send, bytes(int(parameter(scope, "size"))))


async def do_listen(scope: Scope, receive: Receive, send: Send) -> None:
    """Waits for the disconnect, and then notes what it got and what became of a send."""
    Path(parameter(scope, "begun")).touch()
    await receive()
    message = await receive()
    try:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"late"})
    except OSError as error:
        Path(parameter(scope, "seen")).write_text(f"{message['type']} {isinstance(error, OSError)} {os.getpid()}")


async def do_sleep(scope: Scope, receive: Receive, send: Send) -> None:
    """Deaf to disconnects: only a cancellation of its task wakes it."""
    Path(parameter(scope, "begun")).touch()
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        Path(parameter(scope, "seen")).write_text("cancelled")
        raise


async def do_stubborn(scope: Scope, receive: Receive, send: Send) -> None:
    """Swallows its cancellation."""
    Path(parameter(scope, "begun")).write_text(str(os.getpid()))
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass


async def do_block(scope: Scope, receive: Receive, send: Send) -> None:
    """Blocks its event loop."""
    Path(parameter(scope, "begun")).write_text(str(os.getpid()))
    time.sleep(1000)


async def do_background(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, and works on until it is let go."""
    await answer(send, str(os.getpid()).encode())
    go = Path(parameter(scope, "go"))
    while not go.exists():
        await asyncio.sleep(0.005)
    print("the background work is done")
    if how := parameter(scope, "then"):
        if how == "raise":
            raise ValueError("boom in the background")
        os.kill(os.getpid(), getattr(signal, how))


async def do_patient(scope: Scope, receive: Receive, send: Send) -> None:
    """Takes `rounds` of the loop to return after its last byte."""
    await answer(send, b"patient")
    for _ in range(int(parameter(scope, "rounds"))):
        await asyncio.sleep(0)


async def do_spawn(scope: Scope, receive: Receive, send: Send) -> None:
    """Leaves a task on the loop that notes its end."""

    async def later() -> None:
        await asyncio.sleep(0.01)
        Path(parameter(scope, "seen")).touch()

    kept.add(asyncio.get_running_loop().create_task(later()))
    await answer(send, b"")


kept: set[Any] = set()


async def do_raise(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("boom from the app")


async def do_raise_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    raise ValueError("boom after the head")


async def do_abort(scope: Scope, receive: Receive, send: Send) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(abort())


async def abort() -> None:
    raise AbortHandler


async def do_exit(scope: Scope, receive: Receive, send: Send) -> None:
    raise SystemExit(3)


async def do_exit_in_task(scope: Scope, receive: Receive, send: Send) -> None:
    """Some other task raises SystemExit, which goes through the whole event loop."""

    async def leave() -> None:
        raise SystemExit(3)

    task = asyncio.get_running_loop().create_task(leave())
    await asyncio.sleep(0.01)
    kept.add(task)
    await answer(send, b"still here")


async def do_die(scope: Scope, receive: Receive, send: Send) -> None:
    if parameter(scope, "late"):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
    os.kill(os.getpid(), signal.SIGSEGV)


async def do_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def do_half(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def do_trailers(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "trailers": True})
    await send({"type": "http.response.body", "body": b"body"})
    await send({"type": "http.response.trailers", "headers": [(b"x-after", b"1")]})


async def do_wrong(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends what the protocol does not allow: what that is, and what it says."""
    messages: dict[str, list[Message]] = {
        "body_first": [{"type": "http.response.body", "body": b""}],
        "two_heads": [{"type": "http.response.start", "status": 200}] * 2,
        "unknown": [{"type": "websocket.send", "text": ""}],
        "text": [{"type": "http.response.start", "status": 200}, {"type": "http.response.body", "body": "text"}],
        "status": [{"type": "http.response.start", "status": "200"}],
        "header": [
            {"type": "http.response.start", "status": 200, "headers": [(b"a b", b"c")]},
            {"type": "http.response.body"},
        ],
        "after_end": [
            {"type": "http.response.start", "status": 200},
            {"type": "http.response.body"},
            {"type": "http.response.body"},
        ],
    }
    for message in messages[parameter(scope, "what")]:
        await send(message)


async def do_two_listeners(scope: Scope, receive: Receive, send: Send) -> None:
    """Two tasks receive at once; between them they get the body and one disconnect."""

    async def listen() -> str:
        return str((await receive())["type"])

    tasks = [asyncio.create_task(listen()) for _ in range(2)]
    await asyncio.sleep(0)
    await answer(send, b"")
    heard = sorted(await asyncio.gather(*tasks))
    Path(parameter(scope, "seen")).write_text(" ".join(heard))


class WithLifespan:
    """An app with a lifespan of which the pool's environment tells what it does."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(scope, receive, send)
        else:
            state = scope["state"]
            state["own"] = state.get("own", 0) + 1
            state["shared"].append(1)
            shown = {"own": state["own"], "shared": len(state["shared"]), "events": self.events, "pid": os.getpid()}
            await answer(send, json.dumps(shown).encode())

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        how = os.environ.get("LIFESPAN", "")
        message = await receive()
        self.events.append(message["type"])
        if how == "fail":
            await send({"type": "lifespan.startup.failed", "message": "no database"})
            return
        if how == "raise":
            raise ValueError("boom in the lifespan")
        if how == "hang":
            await asyncio.sleep(1000)
        scope["state"]["shared"] = []
        await send({"type": "lifespan.startup.complete"})
        message = await receive()
        if how == "hang at the end":
            await asyncio.sleep(1000)
        if log := os.environ.get("LIFESPAN_LOG"):
            with open(log, "a") as file:
                file.write(f"{message['type']} {os.getpid()}\n")
        if how == "fail at the end":
            await send({"type": "lifespan.shutdown.failed", "message": "can't flush"})
        else:
            await send({"type": "lifespan.shutdown.complete"})


with_lifespan = WithLifespan()


async def poller(scope: Scope, receive: Receive, send: Send) -> None:
    """Its start-up leaves a task that counts on the loop, also between jobs."""
    if scope["type"] == "lifespan":
        await receive()
        state = scope["state"]["count"] = [0]

        async def poll() -> None:
            while True:
                state[0] += 1
                await asyncio.sleep(0.001)

        task = asyncio.create_task(poll())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        task.cancel()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await answer(send, str(scope["state"]["count"][0]).encode())


class Strict:
    """Checks the server: each key and type of the scope, and each message that it gives (ASGI 3.0, HTTP 2.4)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert type(scope) is dict
        if scope["type"] == "lifespan":
            await self.check_lifespan(scope, receive, send)
            return
        self.check_scope(scope)
        body = await self.check_requests(receive)
        waiter = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        assert not waiter.done(), "a server has nothing to say until the response is whole or the client is gone"
        await send({"type": "http.response.start", "status": 200, "headers": iter([[b"x-strict", b"1"]])})
        await send({"type": "http.response.body", "body": b"strict ", "more_body": True})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        assert (await waiter) == {"type": "http.disconnect"}
        assert (await receive()) == {"type": "http.disconnect"}

    async def check_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert set(scope) == {"type", "asgi", "state"}
        assert scope["asgi"]["version"] == "3.0"
        assert scope["asgi"]["spec_version"] in ("1.0", "2.0")
        assert scope["state"] == {}
        scope["state"]["strict"] = True
        assert await receive() == {"type": "lifespan.startup"}
        await send({"type": "lifespan.startup.complete"})
        assert await receive() == {"type": "lifespan.shutdown"}
        await send({"type": "lifespan.shutdown.complete"})
        print("the lifespan was as it should be")

    def check_scope(self, scope: Scope) -> None:
        types: dict[str, type] = {
            "type": str,
            "asgi": dict,
            "http_version": str,
            "method": str,
            "scheme": str,
            "path": str,
            "raw_path": bytes,
            "query_string": bytes,
            "root_path": str,
            "headers": list,
            "client": tuple,
            "server": tuple,
            "state": dict,
            "extensions": dict,
        }
        assert set(scope) == set(types)
        for key, kind in types.items():
            assert type(scope[key]) is kind, (key, scope[key])
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.4"}
        assert scope["http_version"] == "1.1"
        assert scope["method"].isupper()
        assert scope["scheme"] in ("http", "https")
        assert scope["path"].startswith("/")
        assert b"?" not in scope["raw_path"]
        for name, value in scope["headers"]:
            assert type(name) is type(value) is bytes
            assert name == name.lower()
        assert scope["state"] == {"strict": True}
        host, port = scope["server"]
        assert (type(host), type(port)) == (str, int)
        host, port = scope["client"]
        assert (type(host), type(port)) == (str, int)
        for value in scope["extensions"].values():
            assert type(value) is dict

    async def check_requests(self, receive: Receive) -> bytes:
        body, more = b"", True
        while more:
            message = await receive()
            assert set(message) == {"type", "body", "more_body"}
            assert message["type"] == "http.request"
            assert type(message["body"]) is bytes
            assert type(message["more_body"]) is bool
            body += message["body"]
            more = message["more_body"]
        return body


strict = Strict()


async def threads(scope: Scope, receive: Receive, send: Send) -> None:
    """Does its work in a thread of the loop's executor, which is there to be shut down."""
    if scope["type"] == "http":
        name = await asyncio.to_thread(lambda: threading.current_thread().name)
        await answer(send, name.encode())


async def do_short(scope: Scope, receive: Receive, send: Send) -> None:
    """Announces ten bytes, ends after five, and raises, or not."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b"12345"})
    if scope["query_string"]:
        raise ValueError("boom after the end")


async def do_block_at_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    """Blocks its loop right after its last byte, until it is let go."""
    await answer(send, b"all of it")
    while not Path(parameter(scope, "go")).exists():
        time.sleep(0.005)


async def do_greedy(scope: Scope, receive: Receive, send: Send) -> None:
    """After its response takes more than it may: of the processor, or of memory."""
    await answer(send, str(os.getpid()).encode())
    if parameter(scope, "what") == "cpu":
        while True:
            sum(range(100_000))
            await asyncio.sleep(0)
    kept_memory = []
    while True:
        kept_memory.append(subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * 60000000; time.sleep(99)"]))
        await asyncio.sleep(0.2)


async def endless_background(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, and goes on for good."""
    assert scope["type"] == "http"
    await answer(send, b"done")
    await asyncio.sleep(3600)
