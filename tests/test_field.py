"""Faults that were found in the field: odd apps, odd clients, odd bytes, as against a real server."""

from __future__ import annotations

import array
import ast
import io
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
import requests

from runner import (
    HandlerRaised,
    InvalidLength,
    Limits,
    Pool,
    Request,
    StartError,
)
from tests.field_apps import MyBytes, MyStr
from tests.serving import Served, receive_all
from tests.waiting import wait_until
from transport import httpx2 as httpx2_transport
from transport.requests import Transport

URL = "http://app.local"


@pytest.fixture
def session_to(start: Callable[..., Pool]) -> Iterator[Callable[..., requests.Session]]:
    """Makes sessions whose requests to app.local go to an app of `field_apps`."""
    sessions: list[requests.Session] = []

    def make(app: str, **settings: Any) -> requests.Session:
        session = requests.Session()
        sessions.append(session)
        session.mount(URL, Transport(start(f"tests.field_apps:{app}", workers=1, **settings)))
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def served() -> Iterator[Callable[..., Served]]:
    """Serves an app of `field_apps`."""
    running: list[Served] = []

    def serve(app: str, **settings: Any) -> Served:
        made = Served(f"tests.field_apps:{app}", workers=1, drain=0, **settings)
        running.append(made)
        return made.__enter__()

    yield serve
    for made in running:
        made.__exit__(None, None, None)


def exchange(served: Served, data: bytes) -> bytes:
    """All that comes back for these bytes, of which the last request's asks to close."""
    at = data.rindex(b" HTTP/1.") + len(b" HTTP/1.1\r\n")
    with served.connect() as client:
        client.sendall(data[:at] + b"Connection: close\r\n" + data[at:])
        return receive_all(client)


# -- heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["299 Our Reason", "200 OK", "404 NOT FOUND", "200 ", "200", "418 caf\u00e9"])
def test_the_app_s_own_reason(
    session_to: Callable[..., requests.Session], served: Callable[..., Served], status: str
) -> None:
    """T11, G2: a WSGI app's reason phrase reaches requests, httpx and the wire."""
    reason = status.partition(" ")[2]
    session = session_to("phrases")
    response = session.get(URL, headers={"X-Status": status.encode("latin-1")})
    assert response.reason == reason
    assert response.headers["X-Sub"] == "a subclass"
    assert response.headers["X-Name"] == "padded"
    pool = session.get_adapter(URL)._pool  # type: ignore[attr-defined]
    with httpx2.Client(transport=httpx2_transport.Transport(pool)) as client:
        found = client.get(URL, headers={b"X-Status": status.encode("latin-1")})
        assert found.extensions["reason_phrase"] == reason.encode("latin-1")
    request = b"GET / HTTP/1.1\r\nHost: x\r\nX-Status: %b\r\n\r\n" % status.encode("latin-1")
    line = exchange(served("phrases"), request).split(b"\r\n")[0]
    assert line == b"HTTP/1.1 %b %b" % (status[:3].encode(), reason.encode("latin-1"))


def test_flask_s_own_phrases(session_to: Callable[..., requests.Session]) -> None:
    """T11: as Flask spells them."""
    assert session_to("flask_app").get(URL + "/shouted").reason == "THIS IS NOT HERE"


@pytest.mark.parametrize("reason", ["two\r\nX-Evil: 1", "nul\0", "\u20ac"])
def test_a_reason_that_can_t_stand_in_a_message(start: Callable[..., Pool], reason: str) -> None:
    """T11, F6: is the app's error, before anything is sent."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response(f"200 {reason}", [])
        return [b""]

    with pytest.raises(HandlerRaised):
        start(app, workers=1).open(Request("GET", "/"))


def test_headers_that_are_subclasses(session_to: Callable[..., requests.Session]) -> None:
    """R: of str and bytes, through requests, are sent as what they are."""
    session = session_to("phrases")
    headers: Any = {"X-Status": MyStr("299 Kept"), "X-More": MyBytes(b"b"), MyStr("X-Third"): "v"}
    assert session.get(URL, headers=headers).reason == "Kept"


def test_what_is_no_plain_str_in_a_request() -> None:
    """R, H7: method, target and headers of a request are plain, and headers have no blanks around their values."""
    made = Request(MyStr("GET"), MyStr("/x"), [(MyStr("a"), MyStr("v")), ("b", " \t v\t ")])
    assert {type(made.method), type(made.target), *(type(part) for pair in made.headers for part in pair)} == {str}
    assert (made.method, made.target, made.headers) == ("GET", "/x", [("a", "v"), ("b", "v")])
    own = [("a", "v")]
    assert Request("GET", "/", own).headers is own


def test_str_headers_of_an_asgi_app(session_to: Callable[..., requests.Session], log: pytest.LogCaptureFixture) -> None:
    """H3: are sent as latin-1, with one line in the log; what is neither bytes nor str is the app's error."""
    session = session_to("str_headers")
    for _ in range(3):
        response = session.get(URL)
        assert (response.headers["x-text"], response.headers["x-bytes"]) == ("caf\u00e9", "v")
    session.close()
    wait_until(lambda: any("headers as str" in record.getMessage() for record in log.records))
    assert sum("headers as str" in record.getMessage() for record in log.records) == 1
    assert session_to("number_headers", kind="asgi").get(URL).status_code == 500


def test_blanks_around_header_values(served: Callable[..., Served]) -> None:
    """G2: RFC 9110, 5.5: SP and HTAB are no part of a value; a Content-Length with them is understood."""
    data = b"POST / HTTP/1.1\r\nHost: x \t\r\nX-Status:   299 In Between  \t\r\nContent-Length: 5 \t\r\n\r\nhello"
    answer = exchange(served("phrases"), data + data.replace(b"299", b"298"))
    assert re.findall(rb"HTTP/1.1 (29\d [^\r]*)\r", answer) == [b"299 In Between", b"298 In Between"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_date_and_a_server_of_the_app_s_own(served: Callable[..., Served], version: str, method: str) -> None:
    """G2: they are the only ones; HTTP/1.0 gets a body of unknown length without chunks, ended by the connection."""
    data = f"{method} / HTTP/{version}\r\nHost: x\r\n\r\n".encode()
    head, _, body = exchange(served("dated"), data).partition(b"\r\n\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    assert [line for line in lines if line.startswith(b"date")] == [b"date: thu, 01 jan 1970 00:00:00 gmt"]
    assert [line for line in lines if line.startswith(b"server")] == [b"server: its own"]
    chunked = any(line.startswith(b"transfer-encoding") for line in lines)
    assert chunked == (version == "1.1" and method == "GET")
    if method == "HEAD":
        assert body == b""
    else:
        assert body.endswith(b"0\r\n\r\n") == chunked
        assert chunked or body == b"piece " * 3


@pytest.mark.parametrize("method", [b"FOO", b"X-Own.Method", b"get"])
def test_a_method_that_the_server_does_not_know(served: Callable[..., Served], method: bytes) -> None:
    """G2: is answered with a 501 that says so; what is no method at all with a 400."""
    app = served("dated")
    answer = exchange(app, method + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"the method is none that this server knows" in answer
    assert exchange(app, b"\x16\x03\x01\x02\x00\x01\x00 / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# -- bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 200_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_asking_whether_the_client_is_there(
    session_to: Callable[..., requests.Session], size: int, chunked: bool
) -> None:
    """H3: a cancelled `receive` takes no message: Starlette's `is_disconnected` costs nothing of the body."""
    data: Any = b"x" * size
    if chunked:
        data = io_of(size)
    answer = session_to("polite_asgi").post(URL, data=data)
    assert answer.json() == {"asked": False, "size": size}


def test_a_cancelled_read_of_an_async_handler(start: Callable[..., Pool]) -> None:
    """H3: takes nothing."""
    pool = start("tests.field_apps:polite_native", workers=1)
    with pool.open(Request("POST", "/", body=b"x" * 200_000)) as job:
        assert b"".join(job) == b"200000"


def test_a_body_that_is_there_has_a_length(
    session_to: Callable[..., requests.Session], served: Callable[..., Served]
) -> None:
    """H2, H6: for WSGI apps, though it came in chunks; one without a body has none."""
    app = served("lengths")
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"
    assert b"x-length: 8\r\nx-read: 8\r\n" in exchange(app, data).lower()
    assert b"x-length: none\r\nx-read: 0\r\n" in exchange(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").lower()
    session = session_to("lengths")
    assert session.post(URL, data=b"four").headers["X-Length"] == "4"
    assert session.post(URL, data=iter([b"fo", b"ur"])).headers["X-Read"] == "4"


def test_django_reads_what_is_spooled(
    session_to: Callable[..., requests.Session], served: Callable[..., Served]
) -> None:
    """H2, H6: with `spool_uploads` each body of unknown length has one; over it is a 413."""
    session = session_to("django_app", spool_uploads="3MiB")
    for size in (1, 40_000, 2_500_000):
        assert session.post(URL + "/upload", data=io_of(size)).text == f"{size} bytes"
        assert session.post(URL + "/upload", data=b"x" * size).text == f"{size} bytes"
    refused = session.post(URL + "/upload", data=io_of(5_000_000))
    assert refused.status_code == 413
    assert session.post(URL + "/upload", data=io_of(7)).text == "7 bytes"
    app = served("django_app", spool_uploads=1000)
    assert requests.post(app.url + "/upload", data=io_of(999)).text == "999 bytes"
    assert requests.post(app.url + "/upload", data=io_of(70_000)).status_code == 413


def io_of(size: int) -> Iterator[bytes]:
    """A body in pieces, whose length nobody knows."""
    file = io.BytesIO(b"x" * size)
    return iter(lambda: file.read(9000), b"")


# -- ends ---------------------------------------------------------------------------------------------


def body_of(response: requests.Response) -> str:
    return response.content.decode()


@pytest.mark.parametrize("how", ["whole", "stream"])
@pytest.mark.parametrize("deed", ["raises", "exits", "dies"])
def test_a_close_that_fails(
    session_to: Callable[..., requests.Session],
    served: Callable[..., Served],
    log: pytest.LogCaptureFixture,
    how: str,
    deed: str,
) -> None:
    """H2, F1: the response is whole; what WSGI's `close` raises after it is logged, as background work is."""
    session = session_to("flask_app")
    assert body_of(session.get(f"{URL}/close/{how}/{deed}")) == how
    told = {"raises": "raised at close", "exits": "SystemExit: 3", "dies": "SIGSEGV"}[deed]
    when = "during its background work" if deed == "dies" else "after its response"
    wait_until(lambda: any(told in r.getMessage() and when in r.getMessage() for r in log.records))
    assert body_of(session.get(f"{URL}/closed/3")) == "xxx"
    app = served("flask_app")
    assert body_of(requests.get(f"{app.url}/close/{how}/{deed}")) == how
    assert body_of(requests.get(f"{app.url}/closed/3")) == "xxx"


@pytest.mark.parametrize("how", ["whole", "stream"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_close_that_waits_for_its_client(
    session_to: Callable[..., requests.Session], served: Callable[..., Served], tmp_path: Path, how: str, method: str
) -> None:
    """H2: the client has its end first; the worker is busy until `close` returns, and takes the next job then."""
    app = served("flask_app")
    for number, base in enumerate((URL, app.url)):
        session = session_to("flask_app")
        here, go = tmp_path / f"here-{number}", tmp_path / f"go-{number}"
        deed = f"waits+{here}+{go}".replace("/", "|")
        response = session.request(method, f"{base}/close/{how}/{deed}")
        assert body_of(response) == ("" if method == "HEAD" else how)
        wait_until(here.exists)
        pool = app.pool if base == app.url else session.get_adapter(URL)._pool  # type: ignore[attr-defined]
        wait_until(lambda pool=pool: pool.stats().busy == 1)  # type: ignore[misc]
        go.touch()
        assert body_of(session.get(f"{base}/closed/2")) == "xx"
        assert pool.stats().deaths == 0


def test_limits_hold_for_a_close(session_to: Callable[..., requests.Session], tmp_path: Path) -> None:
    """H2, F5: one that goes on over the pool's time limit is ended with its worker."""
    session = session_to("flask_app", limits=Limits(wall_seconds=0.5))
    deed = f"waits+{tmp_path}/here+{tmp_path}/go".replace("/", "|")
    assert body_of(session.get(f"{URL}/close/whole/{deed}")) == "whole"
    assert body_of(session.get(f"{URL}/closed/2")) == "xx"
    pool = session.get_adapter(URL)._pool  # type: ignore[attr-defined]
    assert pool.stats().deaths == 1


def test_an_iteration_that_fails_is_closed(
    session_to: Callable[..., requests.Session], log: pytest.LogCaptureFixture
) -> None:
    """H2: its error is the response's, and `close` is called all the same (PEP 3333)."""
    session = session_to("broken")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        session.get(URL)
    wait_until(lambda: any("it was closed" in record.getMessage() for record in log.records))


@pytest.mark.parametrize("client", ["requests", "httpx2", "open", "aopen"])
@pytest.mark.parametrize("kind", ["bytes", "file", "pieces"])
@pytest.mark.parametrize("says", [2, 4, 90_000])
def test_a_body_that_is_not_as_long_as_announced(start: Callable[..., Pool], client: str, kind: str, says: int) -> None:
    """H5, H6: is the caller's error, and never a finished upload for the handler."""
    pool = start("tests.handlers:app", workers=1)
    headers = {"Content-Length": str(says)}

    def body() -> Any:
        return {"bytes": b"abc", "file": io.BytesIO(b"abc"), "pieces": iter([b"a", b"bc"])}[kind]

    if client == "requests":
        with requests.Session() as session:
            session.mount(URL, Transport(pool))
            prepared = session.prepare_request(requests.Request("POST", URL + "/mirror", data=body()))
            prepared.headers.pop("Transfer-Encoding", None)
            prepared.headers.update(headers)
            cut_off = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)  # before the head, or after
            with pytest.raises(cut_off, match="Content-Length"):
                session.send(prepared)
    elif client == "httpx2":
        with (
            httpx2.Client(transport=httpx2_transport.Transport(pool)) as session2,
            pytest.raises(httpx2.LocalProtocolError, match="Content-Length"),
        ):
            session2.post(URL + "/mirror", content=body(), headers=headers)
    elif client == "open":
        with pytest.raises(InvalidLength), pool.open(Request("POST", "/mirror", list(headers.items()), body())) as job:
            list(job)  # the head may have been there before the error
    else:

        async def source() -> AsyncIterator[bytes]:
            yield b"a"
            yield b"bc"

        async def main() -> None:
            content = source() if kind == "pieces" else body()
            request = Request("POST", "/mirror", list(headers.items()), content)
            with pytest.raises(InvalidLength):
                async with await pool.aopen(request) as job:
                    async for _ in job:
                        pass

        anyio.run(main)
    request = Request("POST", "/mirror", [("content-length", "3")], body())
    with pool.open(request) as job:
        assert b"".join(job) == b"abc"


@pytest.mark.parametrize("bad", ["two\r\nlines", "beyond latin-1 \u20ac", 5])
def test_bad_headers_are_told_while_the_app_runs(start: Callable[..., Pool], bad: Any) -> None:
    """H2: at start_response (PEP 3333), so that the app, or its middleware, can still answer."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        import sys

        try:
            start_response("200 OK", [("X-Bad", bad)])
        except Exception:
            start_response("500 Oops", [("Content-Type", "text/plain")], sys.exc_info())
            return [b"a page of its own"]
        return [b"no error"]

    with start(app, workers=1).open(Request("GET", "/")) as job:
        assert (job.head.status, job.head.reason, b"".join(job)) == (500, "Oops", b"a page of its own")


@pytest.mark.parametrize(
    ("line", "target"),
    [
        (b"GET http://b.example HTTP/1.1", b"/"),
        (b"GET http://b.example?q=1 HTTP/1.1", b"/?q=1"),
        (b"GET http://b.example/echo HTTP/1.1", b"/echo"),
    ],
)
def test_absolute_form(line: bytes, target: bytes) -> None:
    """G2: RFC 9112, 3.2.2: a server takes it, also where it has no path, which is then /."""
    with Served("tests.factories:echo_target", workers=1, drain=0) as served:
        answer = exchange(served, line + b"\r\nHost: b.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n" + target)


def test_a_url_without_a_host(pool: Pool) -> None:
    """X: the client's own error, and nothing is run."""
    with httpx2.Client(transport=httpx2_transport.Transport(pool)) as client:
        for url in ("/x", "app.local/x"):
            with pytest.raises(httpx2.UnsupportedProtocol, match="protocol"):
                client.get(url)
    assert not pool.stats().outcomes


def test_head_of_a_full_pool(start: Callable[..., Pool]) -> None:
    """R, F7: the answer to HEAD has no body, the pool's own 503 included; `raw` has urllib3's retries."""
    pool = start(workers=1, queue_timeout=0.1, overload="answer")
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        retries: Any = session.get(URL + "/hello").raw.retries
        assert retries.history == ()
        with pool.open(Request("GET", "/endless")):
            response = session.head(URL + "/hello")
        assert (response.status_code, response.content) == (503, b"")


def test_an_array_as_body(pool: Pool) -> None:
    """R, H6: is the bytes that it holds."""
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        body: Any = array.array("B", b"abc")
        assert session.post(URL + "/mirror", data=body).content == b"abc"


# -- clients ------------------------------------------------------------------------------------------


class Slow(BaseHTTPRequestHandler):
    """A real server, slow or breaking off."""

    def do_GET(self) -> None:
        if self.path == "/never":
            released.wait(20)
            return
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"five5")
        self.wfile.flush()
        if self.path == "/stall":
            released.wait(20)

    def log_message(self, format: str, *args: Any) -> None:
        pass


released = threading.Event()


def as_a_real_server_has_it(request: Any, response: Any) -> None:
    """The same, as a handler."""
    import threading

    if request.path == "/never":
        threading.Event().wait(20)
    response.headers["Content-Length"] = "10"
    response.write(b"five5")
    if request.path == "/stall":
        threading.Event().wait(20)


@pytest.fixture
def real() -> Iterator[str]:
    released.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        released.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/never", "/stall", "/broken"])
def test_errors_of_requests_as_with_a_real_server(start: Callable[..., Pool], real: str, path: str) -> None:
    """R: the same classes at each level, the same words to look for, and the same attributes."""
    found = []
    with requests.Session() as session:
        session.mount(URL, Transport(start(as_a_real_server_has_it, workers=1)))
        for base in (real, URL):
            with pytest.raises(requests.RequestException) as caught:
                session.get(base + path, timeout=0.3)
            error = caught.value
            url = error.request and error.request.url == base + path
            assert error.response is None
            known = ("Read timed out.", "(read timeout=0.3)", "Connection broken:")
            words = [words for words in known if words in str(error)]
            found.append((type(error), url, len(error.args), type(error.args[0]), words))
    theirs, ours = found
    if path == "/stall":  # in a body urllib3 does not say how long
        theirs[-1].append("(read timeout=0.3)")
    assert ours == theirs
    assert ours[-1]


def test_errors_of_a_pool_as_of_a_server_that_is_not_there(start: Callable[..., Pool]) -> None:
    """R: a closed pool refuses as a closed port does; a full one as a connect timeout."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = []
    with requests.Session() as session:
        pool = start(as_a_real_server_has_it, workers=1)
        session.mount(URL, Transport(pool))
        with pool.open(Request("GET", "/stall")):
            with pytest.raises(requests.ConnectTimeout, match=r"timed out.*connect timeout=0\.05") as late:
                session.get(URL, timeout=(0.05, 1))
            assert type(late.value.args[0]).__name__ == "MaxRetryError"
        pool.close(drain=0)
        for base in (f"http://127.0.0.1:{port}", URL):
            with pytest.raises(requests.ConnectionError, match="Failed to establish a new connection") as caught:
                session.get(base)
            error = caught.value
            found.append((type(error), type(error.args[0]), type(error.args[0].reason)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("prefix", "scheme"), [("app://", "http"), ("apps://", "https"), ("http+app://", "http")])
def test_any_scheme_that_was_mounted(start: Callable[..., Pool], prefix: str, scheme: str) -> None:
    """R, H7: the handler sees http, or https where it ends in s; its own locations are under the caller's scheme."""

    def app(request: Any, response: Any) -> bytes:
        if request.path == "/away":
            response.headers["Location"] = f"{request.scheme}://{request.headers['host']}/here"
            response.write_header(302)
            return b""
        return f"{request.scheme} {request.target}".encode()

    with requests.Session() as session:
        session.mount(f"{prefix}shop/", Transport(start(app, workers=1)))
        assert session.get(f"{prefix}shop/a b?c=\u00e9").text == f"{scheme} /a%20b?c=%C3%A9"
        away = session.get(f"{prefix}shop/away", allow_redirects=False)
        assert away.headers["Location"] == f"{prefix}shop/here"
        assert session.get(f"{prefix}shop/away").text == f"{scheme} /here"


# -- preloading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [["numpy"], ["numpy.random"]])
def test_numpy_preloaded(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, preload: list[str]) -> None:
    """W2, W6: its threads are kept from starting in the template; each worker draws numbers of its own."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    pool = start("tests.field_apps:draw", workers=2, preload=preload)
    drawn: dict[int, tuple[float, float]] = {}
    jobs = [pool.open(Request("GET", "/")) for _ in range(2)]
    for job in jobs:
        pid, *numbers = ast.literal_eval(b"".join(job).decode())
        drawn.setdefault(pid, tuple(numbers))
    assert len({first for first, _ in drawn.values()}) == len(drawn)
    assert len({second for _, second in drawn.values()}) == len(drawn)


def test_threads_of_a_preload(start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """W2, W6: where the user wants them, the refusal names the way out."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(StartError, match="OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1"):
        start("tests.field_apps:draw", workers=1, preload=["numpy"])
