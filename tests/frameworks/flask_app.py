"""The contract's app in Flask."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from flask import Flask, Response, jsonify, make_response, redirect, request, send_file, stream_with_context
from werkzeug.wrappers.response import Response as BaseResponse

app = Flask(__name__)


@app.after_request
def middleware(response: Response) -> Response:
    response.headers["X-Middleware"] = "1"
    return response


@app.get("/hello")
def hello() -> Response:
    return jsonify(hello="world")


@app.route("/echo/<path:rest>", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
def echo(rest: str) -> Response:
    own = {name: value for name, value in request.headers.items() if name.startswith("X-") or name == "Host"}
    return jsonify(
        method=request.method,
        path=request.path,
        query=request.args.to_dict(flat=False),
        headers=own,
        url=request.url,
        body=request.get_data(as_text=True),
    )


@app.post("/form")
def form() -> Response:
    return jsonify(request.form.to_dict())


@app.post("/upload")
def upload() -> Response:
    file = request.files["file"]
    return jsonify(name=file.filename, sha256=hashlib.sha256(file.read()).hexdigest())


@app.post("/raw")
def raw() -> Response:
    digest, size = hashlib.sha256(), 0
    while piece := request.stream.read(1 << 16):
        digest.update(piece)
        size += len(piece)
    return jsonify(size=size, sha256=digest.hexdigest())


@app.get("/stream")
def stream() -> Response:
    def pieces() -> Iterator[str]:
        for number in range(100):
            yield f"piece {number}\n"

    return Response(stream_with_context(pieces()), content_type="text/plain; charset=utf-8")


@app.get("/sse")
def sse() -> Response:
    events = (f"event: tick\ndata: {number}\n\n" for number in range(5))
    return Response(events, content_type="text/event-stream")


@app.get("/ticks")
def ticks() -> Response:
    """Five lines, 50 ms apart, each with the time of its writing."""

    def lines() -> Iterator[str]:
        for _ in range(5):
            yield f"{time.monotonic()}\n"
            time.sleep(0.05)

    return Response(lines(), content_type="text/plain")


@app.get("/redirect")
def go() -> BaseResponse:
    return redirect("/hello")


@app.get("/cookies")
def cookies() -> Response:
    response = make_response(jsonify(request.cookies.to_dict()))
    response.set_cookie("a", "1")
    response.set_cookie("b", "2", httponly=True)
    return response


@app.get("/empty/<int:status>")
def empty(status: int) -> Response:
    return Response(status=status)


@app.get("/file")
def file() -> Response:
    return send_file(io.BytesIO(b"0123456789" * 1000), mimetype="application/octet-stream", conditional=True)


@app.get("/error")
def error() -> Response:
    raise ValueError("boom in the app")


@app.get("/background")
def background() -> Response:
    response = jsonify(started=True)
    note = request.args["note"]
    response.call_on_close(lambda: Path(note).write_text("done"))
    return response
