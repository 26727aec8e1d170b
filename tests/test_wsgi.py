"""runner.worker.handlers.wsgi: PEP 3333, and a real framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from runner import Pool
from transport import TransportFactory, delegated_api_key_id
from transport.requests import Transport

URL = "http://app.local"

Connect = Callable[..., requests.Session]


@pytest.fixture
def connect(start: Callable[..., Pool]) -> Iterator[Connect]:
    """Sessions whose requests go to a WSGI app of `tests.wsgi_apps`."""
    sessions = []

    def to(app: str, **settings: Any) -> requests.Session:
        session = requests.Session()
        session.mount(URL, Transport(start(f"tests.wsgi_apps:{app}", **settings)))
        sessions.append(session)
        return session

    yield to
    for session in sessions:
        session.close()


def test_a_simple_app(connect: Connect) -> None:
    """H2, H4: found to be WSGI by its arguments; the list's pieces come in order."""
    response = connect("simple").get(URL + "/")
    assert response.text == "simple answer"
    assert response.headers == {"Content-Type": "text/plain", "content-length": "13"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
def test_wsgiref_validate_has_no_complaint(connect: Connect, log: pytest.LogCaptureFixture, method: str) -> None:
    """H2: wsgiref.validate checks both sides, the bridge's and the app's. Its arguments are (*args): kind is given."""
    session = connect("validated", kind="wsgi")
    response = session.request(method, f"{URL}/a%20b/c?d=e", data=b"body" if method in ("POST", "PUT") else None)
    assert (response.status_code, response.reason) == (200, "OK")
    expected = {"HEAD": "", "POST": "polite body", "PUT": "polite body"}.get(method, "polite ")
    assert response.text == expected
    assert [r for r in log.records if r.levelname == "ERROR"] == []


def test_the_environ(connect: Connect) -> None:
    """H2, H7: what a server behind the caller's URL would pass."""
    session = connect("show")
    session.headers.clear()
    shown = session.post(
        "http://app.local:8080/caf%C3%A9/%2F/x?q=%20y",
        data=b"body",
        headers={"Content-Type": "text/plain", "X-One": "1", "Cookie": "a=b"},
    ).json()
    assert shown["REQUEST_METHOD"] == "POST"
    assert shown["SCRIPT_NAME"] == ""
    assert shown["PATH_INFO"] == "/café///x".encode().decode("latin-1")
    assert shown["QUERY_STRING"] == "q=%20y"
    assert shown["RAW_URI"] == "/caf%C3%A9/%2F/x?q=%20y"
    assert (shown["SERVER_NAME"], shown["SERVER_PORT"], shown["SERVER_PROTOCOL"]) == ("app.local", "8080", "HTTP/1.1")
    assert (shown["wsgi.url_scheme"], shown["REMOTE_ADDR"]) == ("http", "127.0.0.1")
    assert (shown["HTTP_HOST"], shown["HTTP_X_ONE"], shown["HTTP_COOKIE"]) == ("app.local:8080", "1", "a=b")
    assert (shown["CONTENT_TYPE"], shown["CONTENT_LENGTH"], shown["body"]) == ("text/plain", "4", "body")
    assert (shown["wsgi.multithread"], shown["wsgi.multiprocess"], shown["wsgi.run_once"]) == (False, True, False)
    assert shown["wsgi.version"] == [1, 0]
    assert {key for key in shown if key.startswith("HTTP_")} == {"HTTP_HOST", "HTTP_X_ONE", "HTTP_COOKIE"}


def test_repeated_headers_are_joined(start: Callable[..., Pool]) -> None:
    """H2: duplicate headers are joined as CGI has it, cookies with a semicolon."""
    from runner import Request

    headers = [("X-A", "1"), ("x-a", "2"), ("Cookie", "a=1"), ("Cookie", "b=2")]
    with start("tests.wsgi_apps:show").open(Request("GET", "/", headers=headers)) as job:
        shown = b"".join(job)
    assert b'"HTTP_X_A": "1,2"' in shown
    assert b'"HTTP_COOKIE": "a=1; b=2"' in shown


def test_a_header_with_an_underscore_is_no_other_header(connect: Connect, log: pytest.LogCaptureFixture) -> None:
    """T6, H2: X_Key can't pass for X-Key, and no header sets what the host vouches for."""
    session = connect("show", workers=1)
    shown = session.get(URL, headers={"X_Key": "forged", "blastdoor.context": "forged", "X-Key": "real"}).json()
    assert shown["HTTP_X_KEY"] == "real"
    assert shown["key"] == ""
    session.get(URL)


def test_trusted_context_in_the_environ(start: Callable[..., Pool]) -> None:
    """T6: a WSGI app reads what the host vouches for, and lies under its mount as root_path says."""
    pool = start("tests.wsgi_apps:show", root_path="/api/v2/aibridge/openai")
    with requests.Session() as session:
        session.mount(URL, TransportFactory(pool).transport_for("openai"))
        with delegated_api_key_id("key-9"):
            shown = session.get(URL + "/v1/models").json()
    assert shown["key"] == "key-9"
    assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == ("/api/v2/aibridge/openai", "/v1/models")


def test_script_name_only_where_it_fits(connect: Connect) -> None:
    """H2: SCRIPT_NAME is settable; a path beside it is left whole."""
    session = connect("show", root_path="/app/")
    for path, expected in {"/app/x": ("/app", "/x"), "/app": ("/app", ""), "/apple": ("", "/apple")}.items():
        shown = session.get(URL + path).json()
        assert (shown["SCRIPT_NAME"], shown["PATH_INFO"]) == expected


@pytest.mark.parametrize(
    ("path", "status", "app", "text"),
    [
        ("/write", 200, "corners", "written returned"),
        ("/lazy", 202, "lazy", "lazy"),
        ("/close", 200, "corners", "ab"),
        ("/replace", 500, "error", "error page"),
        ("/empty", 204, "corners", ""),
    ],
)
def test_the_corners_of_pep_3333(connect: Connect, path: str, status: int, app: str, text: str) -> None:
    """H2: write(), a lazy start_response, empty pieces, exc_info before the head."""
    response = connect("corners").get(URL + path)
    assert (response.status_code, response.headers["X-App"], response.text) == (status, app, text)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/twice", "AssertionError"),
        ("/never", "AssertionError"),
        ("/bad_status", "ValueError"),
        ("/bad_header", "ValueError"),
        ("/text", "TypeError"),
    ],
)
def test_what_pep_3333_forbids(connect: Connect, log: pytest.LogCaptureFixture, path: str, fault: str) -> None:
    """H2, F1: an app that breaks the rules is told in the log, its caller gets a 500."""
    response = connect("corners").get(URL + path)
    assert response.status_code == 500
    assert response.json()["detail"] == "the handler raised an exception"
    assert f"    {fault}: " in log.text


def test_exc_info_after_the_head(connect: Connect, log: pytest.LogCaptureFixture) -> None:
    """H2: too late for another head, the app's own error is raised and the body ends badly."""
    with connect("corners").get(URL + "/replace_late", stream=True) as response:
        assert response.status_code == 200
        with pytest.raises(ChunkedEncodingError, match="too late to replace"):
            response.content  # noqa: B018


@pytest.mark.parametrize("path", ["/close", "/lazy", "/close_after_error"])
def test_close_is_always_called(
    start: Callable[..., Pool], connect: Connect, log: pytest.LogCaptureFixture, path: str
) -> None:
    """H2: close() of the iterable is called, after an error in it too."""
    session = connect("corners", workers=1)
    try:
        session.get(URL + path)
    except ChunkedEncodingError as error:
        assert "in the iterable" in str(error)
    session.get_adapter(URL)._pool.close()  # type: ignore[attr-defined]
    assert "the iterable was closed" in log.text


def test_abort_in_an_app(connect: Connect) -> None:
    """F2: AbortHandler works in a WSGI app."""
    with (
        connect("corners").get(URL + "/abort", stream=True) as response,
        pytest.raises(ChunkedEncodingError, match="cut the response off"),
    ):
        response.content  # noqa: B018


def test_flask(connect: Connect, log: pytest.LogCaptureFixture) -> None:
    """H4: a Flask app runs unchanged: routes, forms, uploads, URLs, streaming, errors."""
    session = connect("flask_app")
    assert session.get(URL + "/hello/w%C3%B6rld").text == "hello wörld"
    assert session.get(URL + "/nowhere").status_code == 404
    answer = session.post(URL + "/form", data={"a": "1"}, files={"f": b"x" * 100_000}).json()
    assert answer == {"form": {"a": "1"}, "files": {"f": 100_000}}
    answer = session.post(URL + "/chunked", data=iter([b"x" * 70_000, b"y" * 70_000])).json()
    assert answer == {"size": 140_000, "url": URL + "/chunked", "root": ""}
    with session.get(URL + "/sse?count=3", stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [line for line in response.iter_lines() if line] == [b"data: 0", b"data: 1", b"data: 2"]
    assert session.get(URL + "/fail").status_code == 500
    head = session.head(URL + "/hello/you")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "9")
