"""WSGI apps (PEP 3333), as a server behind the caller's URL would call them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, BinaryIO, Final, cast
from urllib.parse import unquote_to_bytes

from ...wire.headers import check_phrase, content_length, plain_headers
from ...wire.messages import MOST_PHRASE, PHRASES, Header
from ...wire.response_frames import with_length
from ..pipes import IncomingRequest, OutgoingResponse
from .adapter import Adapter
from .body import body_and_size

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]
Application = Callable[[dict[str, Any], Callable[..., Callable[[bytes], None]]], Iterable[bytes]]


_SPOOLED_IN_MEMORY: Final = 1 << 20
_PIECE: Final = 64 * 1024


class WSGIAdapter(Adapter):
    """Calls a WSGI app, from several threads at once where it is told so.

    `root_path` is the SCRIPT_NAME of requests that lie under it.
    """

    kind = "wsgi"

    def __init__(self, app: Application, root_path: str, spool: int | None = None, *, threads: bool = False) -> None:
        self._app = app
        self._root_path = root_path.rstrip("/")
        self._spool = spool
        self._threads = threads

    def __call__(self, request: IncomingRequest, response: OutgoingResponse) -> None:
        started = _StartedResponse(response)
        environ = build_environ(request, self._root_path, threads=self._threads)
        if self._spool is not None and request.head.has_body and "CONTENT_LENGTH" not in environ:
            spooled = _spooled(environ["wsgi.input"], self._spool)
            if spooled is None:
                response.finish(413, [("content-type", "text/plain")], [b"the body is over what is spooled of one\n"])
                return
            environ["wsgi.input"], size = spooled
            environ["CONTENT_LENGTH"] = str(size)
        chunks = self._app(environ, started.start_response)
        if type(chunks) is list or type(chunks) is tuple:
            # All of it is there: one write, and such a thing has no close().
            started.finish(chunks, sized=request.head.method != "HEAD")
            return
        close: Callable[[], object] | None = getattr(chunks, "close", None)
        try:
            for chunk in chunks:
                if chunk:
                    started.write(chunk)
            if close is not None:
                started.end_early(bodyless=request.head.method == "HEAD")
        except BaseException:
            if close is not None:
                close()
            raise
        # The client has all of it. What `close` does, or raises, is background work of the job's.
        if close is not None:
            try:
                close()
            except BaseException:
                if not response.ended:
                    started.finish((), busy=True)
                raise
        if response.ended:
            response.settle()
        else:
            started.finish(())


class _StartedResponse:
    """`start_response` and `write` of one call: the head goes out with the first bytes of the body."""

    __slots__ = ("_headers", "_response", "_sent", "_status")

    def __init__(self, response: OutgoingResponse) -> None:
        self._response = response
        self._status = 0
        self._headers: list[Header] = []
        self._sent = 0

    def start_response(
        self, status: str, headers: list[Header], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        if exc_info is not None:
            try:
                if self._response.started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # PEP 3333: no circular reference
        elif self._status:
            raise AssertionError("start_response was called a second time without exc_info (PEP 3333)")
        code, _, reason = status.partition(" ")
        if not (len(code) == 3 and code.isascii() and code.isdigit()):
            raise ValueError(f"the status must begin with three digits, as in '200 OK', not {status!r}")
        # PEP 3333: errors in headers are found here, while the app can still answer otherwise.
        headers = plain_headers(list(headers))
        content_length(headers)
        self._status = int(code)
        self._headers = headers
        if reason != PHRASES.get(self._status):
            reason = str.__str__(reason).strip(" \t")
            check_phrase(reason)
            self._response.reason = reason[:MOST_PHRASE]
        else:
            self._response.reason = None
        return self.write

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"a WSGI app must give bytes, not {type(data).__name__} (PEP 3333)")
        self._sent += len(data)
        if self._response.started:
            self._response.write(data)
        elif data:
            self._check_started()
            self._response.start_with(self._status, self._headers, data)

    def end_early(self, *, bodyless: bool) -> None:
        """All has been given, and the app is not done: send the end, where the length does not tell it."""
        if not self._response.started:
            self._check_started()
            self._response.start(self._status, self._headers)
        whole = content_length(self._headers)
        if not bodyless and self._status not in (204, 304) and (whole is None or self._sent < whole):
            self.finish((), busy=True)

    def finish(self, chunks: Iterable[bytes], *, sized: bool = False, busy: bool = False) -> None:
        rest = list(chunks)
        for chunk in rest:
            if not isinstance(chunk, bytes):
                raise TypeError(f"a WSGI app must give bytes, not {type(chunk).__name__} (PEP 3333)")
        self._check_started()
        headers = self._headers
        if sized and not self._response.started:
            headers = with_length(self._status, headers, sum(map(len, rest)))
        self._response.finish(self._status, headers, rest, busy=busy)

    def _check_started(self) -> None:
        if not self._status:
            raise AssertionError("the app gave its body without having called start_response (PEP 3333)")


def build_environ(request: IncomingRequest, root_path: str, *, threads: bool = False) -> dict[str, Any]:
    """The environ of PEP 3333; `blastdoor.context` holds what the host vouches for."""
    head = request.head
    raw_path, _, query = head.target.partition("?")
    path = unquote_to_bytes(raw_path).decode("latin-1")
    script_name = ""
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        script_name, path = root_path, path[len(root_path) :]
    body, size = body_and_size(request)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": head.method,
        "SCRIPT_NAME": script_name,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "REQUEST_URI": head.target,
        "RAW_URI": head.target,
        "SERVER_NAME": head.server[0],
        "SERVER_PORT": str(head.server[1]),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": head.client[0],
        "REMOTE_PORT": str(head.client[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": head.scheme,
        "wsgi.input": body,
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": threads,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "blastdoor.context": head.context,
    }
    for name, value in head.headers:
        if "_" in name:
            continue  # X_Key would pass for X-Key in the environ: dropped, as gunicorn and nginx do; the host says so
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        if key in environ:
            separator = "; " if key == "HTTP_COOKIE" else ","
            environ[key] = cast("str", environ[key]) + separator + value
        else:
            environ[key] = value
    if size is not None:
        # All of it is there: apps that read no body without a length (Django) have one.
        environ.setdefault("CONTENT_LENGTH", str(size))
    return environ


def _spooled(body: BinaryIO, most: int) -> tuple[BinaryIO, int] | None:
    """All of a body as a file, beyond a mebibyte on disk, and its size in bytes; None where it is over the most."""
    import tempfile

    file = tempfile.SpooledTemporaryFile(max_size=_SPOOLED_IN_MEMORY)  # noqa: SIM115 - the environ's, and gone with it
    size = 0
    while data := body.read(_PIECE):
        size += len(data)
        if size > most:
            file.close()
            return None
        file.write(data)
    file.seek(0)
    return cast("BinaryIO", file), size
