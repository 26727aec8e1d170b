"""WSGI apps that the tests run in workers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

from flask import Flask, Response, request, stream_with_context

from runner import AbortHandler

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], None]]


def simple(environ: Environ, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"simple ", b"", b"answer"]


def show(environ: Environ, start_response: StartResponse) -> list[bytes]:
    """The environ as JSON, with the body that was read."""
    body = environ["wsgi.input"].read()
    shown = {key: value for key, value in environ.items() if isinstance(value, (str, bool, int, tuple))}
    shown["body"] = body.decode("latin-1")
    shown["key"] = environ["blastdoor.context"].delegated_api_key_id
    data = json.dumps(shown).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]


def polite(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Keeps every rule that wsgiref.validate knows."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length) if length else b""
    environ["wsgi.errors"].write("polite\n")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"polite " + body]


validated = validator(polite)  # type: ignore[arg-type]


class Closing:
    """An iterable that tells on stderr that it was closed."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self.parts

    def close(self) -> None:
        print("the iterable was closed", file=sys.stderr)


def corners(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """The corners of PEP 3333, by path."""
    path = environ["PATH_INFO"]
    headers = [("X-App", "corners")]
    if path == "/write":
        write = start_response("200 OK", headers)
        write(b"written ")
        return [b"returned"]
    if path == "/lazy":
        return Closing(lazy(start_response))
    if path == "/close":
        start_response("200 OK", headers)
        return Closing(iter([b"a", b"", b"b"]))
    if path == "/close_after_error":
        start_response("200 OK", headers)
        return Closing(fail_after([b"a"]))
    if path == "/replace":
        start_response("200 OK", headers)
        try:
            raise KeyError("replaced")
        except KeyError:
            start_response("500 Replaced", [("X-App", "error")], sys.exc_info())
        return [b"error page"]
    if path == "/replace_late":
        write = start_response("200 OK", headers)
        write(b"sent")
        try:
            raise KeyError("too late to replace")
        except KeyError:
            start_response("500 Replaced", headers, sys.exc_info())
        return []
    if path == "/twice":
        start_response("200 OK", headers)
        start_response("201 Created", headers)
    if path == "/never":
        return [b"body"]
    if path == "/bad_status":
        start_response("fine", headers)
    if path == "/bad_header":
        start_response("200 OK", [("X", "a\r\nSet-Cookie: evil")])
    if path == "/text":
        start_response("200 OK", headers)
        return ["text"]  # type: ignore[list-item]
    if path == "/abort":
        start_response("200 OK", headers)
        raise AbortHandler
    if path == "/empty":
        start_response("204 No Content", headers)
        return []
    return []


def lazy(start_response: StartResponse) -> Iterator[bytes]:
    start_response("202 Accepted", [("X-App", "lazy")])
    yield b""
    yield b"lazy"


def fail_after(parts: list[bytes]) -> Iterator[bytes]:
    yield from parts
    raise ValueError("in the iterable")


flask_app = Flask(__name__)


@flask_app.route("/hello/<name>")
def hello(name: str) -> str:
    return f"hello {name}"


@flask_app.route("/form", methods=["POST"])
def form() -> dict[str, Any]:
    return {"form": request.form.to_dict(), "files": {k: len(f.read()) for k, f in request.files.items()}}


@flask_app.route("/chunked", methods=["POST"])
def chunked() -> dict[str, Any]:
    return {"size": len(request.get_data()), "url": request.url, "root": request.script_root}


@flask_app.route("/sse")
def sse() -> Response:
    def events() -> Iterator[str]:
        for number in range(int(request.args["count"])):
            yield f"data: {number}\n\n"

    return Response(stream_with_context(events()), mimetype="text/event-stream")


@flask_app.route("/fail")
def fail() -> str:
    raise ValueError("in flask")


def patient(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Waits for ever in its iterable; leaves traces of how it ended in the directory that its path names."""
    place = Path("/" + environ["PATH_INFO"].lstrip("/"))
    start_response("200 OK", [])

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            (place / "running").touch()
            try:
                time.sleep(3600)
            except BaseException as error:
                (place / "raised").write_text(type(error).__name__)
                raise
            yield b""

        def close(self) -> None:
            (place / "closed").touch()

    return Body()
