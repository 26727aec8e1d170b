"""`blastdoor call` and `blastdoor check`: a handler tried from a terminal, as isolated as in an application."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from runner.errors import InvalidRequest
from runner.events import WorkerReady
from runner.model.limits import Limits
from runner.model.request import Body, Request
from runner.pool import Pool
from runner.wire.messages import Header, JobContext
from runner.wire.printable import one_line
from transport.errors import MissingIdentity
from transport.route import Route
from transport.serving.settings_parsing import parse_sandbox


def call_once(
    handler: str,
    method: str,
    target: str,
    data: str | None,
    headers: list[str],
    identity: tuple[Route, str] | None,
    settings: dict[str, Any],
) -> None:
    """One round trip; the body is written as it comes. Raises what the pool raises."""
    context = JobContext()
    if identity is not None:
        route, key = identity
        if not key:
            raise MissingIdentity("a provider's requests act for somebody: give the id of an API key with --key")
        context = JobContext("", route.provider, route.source, key)
        settings = {**settings, "root_path": settings["root_path"] or route.mount}
        target = route.rewrite(target)
    request = Request(method, target, [_header(text) for text in headers], _body(data))
    with _pool(handler, settings) as pool, pool.open(request, context=context) as job:
        print(f"HTTP/1.1 {job.head.status} {job.head.reason}", file=sys.stderr)
        for name, value in job.head.headers:
            print(f"{name}: {one_line(value)}", file=sys.stderr)  # the handler's words
        print(file=sys.stderr, flush=True)
        for piece in job:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def check_handler(handler: str, settings: dict[str, Any]) -> None:
    """Load it in a worker. StartError, with the app's frames, where that fails."""
    began: list[float] = []
    pool = _pool(handler, settings)
    pool.subscribe(lambda event: began.append(event.seconds) if isinstance(event, WorkerReady) else None)
    with pool:
        (worker,) = pool.workers()
        kind = {"asgi": "an ASGI app", "wsgi": "a WSGI app"}.get(pool.kind, "a native handler")
        print(
            f"{handler}: {kind}, loaded and ready for requests in {began[0]:.2f} s; "
            f"its worker takes {worker.rss / (1 << 20):.1f} MiB"
        )


def _pool(handler: str, settings: dict[str, Any]) -> Pool:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    sandbox = parse_sandbox(settings.get("sandbox", "none"))
    return Pool(
        handler,
        path=[os.getcwd()],
        kind=settings["kind"],
        factory=settings["factory"],
        debug=settings.get("debug", False),
        workers=1,
        root_path=settings.get("root_path", ""),
        limits=Limits(memory=settings.get("memory"), wall_seconds=settings.get("timeout")),
        sandbox=sandbox,
    )


def _header(text: str) -> Header:
    name, colon, value = text.partition(":")
    if not colon:
        raise InvalidRequest(f"header {text!r} has no colon: write it as 'name: value'")
    return name.strip(), value.strip()


def _body(data: str | None) -> Body:
    if data is None or not data.startswith("@"):
        return data
    try:
        return sys.stdin.buffer if data == "@-" else open(data[1:], "rb")
    except OSError as error:
        raise InvalidRequest(f"the body can't be read: {error}") from error
