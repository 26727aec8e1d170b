"""transport.requests: the adapter, as callers of requests know their servers."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from requests.auth import HTTPDigestAuth
from requests.exceptions import (
    ChunkedEncodingError,
    ConnectTimeout,
    ContentDecodingError,
    InvalidHeader,
    InvalidURL,
    ReadTimeout,
)
from requests.exceptions import ConnectionError as RequestsConnectionError
from urllib3 import HTTPResponse
from urllib3.util import Timeout

from runner import HandlerRequest, Pool
from tests.clients import job_of, raw
from transport import MissingIdentity, TransportFactory, attribution, delegated_api_key_id
from transport.requests import Transport

URL = "http://app.local"
OPENAI = "https://api.openai.com"


@pytest.fixture
def session(pool: Pool) -> Iterator[requests.Session]:
    """A session whose requests to app.local go to the pool as they are, and to OpenAI through a factory."""
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        session.mount(OPENAI, TransportFactory(pool).transport_for("openai", source="agents"))
        yield session


def test_a_round_trip(session: requests.Session) -> None:
    """T1: what the caller sends arrives, and what the handler answers comes back."""
    response = session.post(URL + "/echo?a=b", json={"x": 1}, timeout=(1, 30))
    assert response.status_code == 200
    seen = response.json()
    assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/echo?a=b", '{"x": 1}')
    assert (seen["path"], seen["query"]) == ("/echo", "a=b")


def test_the_mount_and_the_caller_s_own_url(session: requests.Session) -> None:
    """T3, T7: the handler sees the mount, the caller its own URL; the served target is on the raw response."""
    with delegated_api_key_id("key-1"):
        response = session.get(OPENAI + "/v1/%2F/echo/?q=%20x&")
    served = "/api/v2/aibridge/openai/v1/%2F/echo/?q=%20x&"
    assert response.json()["target"] == served
    assert raw(response).served_target == served
    assert response.url == OPENAI + "/v1/%2F/echo/?q=%20x&"
    assert response.request.url == response.url


@pytest.mark.parametrize("path", ["/%2e%2e/x", "/a/%2e%2e%2f%2e%2e/x", "/%252e%252e%252fx"])
def test_a_path_that_climbs_out_is_an_invalid_url(session: requests.Session, path: str) -> None:
    """T3: the client's own error, and no worker sees the request."""
    with delegated_api_key_id("key-1"), pytest.raises(InvalidURL, match="mount"):
        session.get(OPENAI + path)


def test_no_identity_no_request(session: requests.Session, pool: Pool) -> None:
    """T4: an error at the boundary; no worker is leased. Without a factory nobody asks."""
    with pytest.raises(MissingIdentity, match="delegated_api_key_id"):
        session.get(OPENAI + "/echo")
    assert next(pool._job_numbers) == 1
    assert session.get(URL + "/echo").json()["context"]["delegated_api_key_id"] == ""


def test_trusted_context_is_no_header(session: requests.Session) -> None:
    """T5, T6: key id, source, provider and attribution travel beside the headers; none can be forged by one."""
    forged = {"X-Delegated-Api-Key-Id": "evil", "delegated_api_key_id": "evil", "source": "evil", "provider": "evil"}
    with delegated_api_key_id("key-1"), attribution(workspace="w-7"):
        seen = session.get(OPENAI + "/echo", headers=forged).json()
    context = seen["context"]
    assert context["delegated_api_key_id"] == "key-1"
    assert (context["provider"], context["source"]) == ("openai", "agents")
    assert context["attribution"] == {"workspace": "w-7"}
    assert context["job_id"]
    assert not any("key-1" in value or "w-7" in value for _, value in seen["headers"])


def test_the_caller_s_request_is_never_changed(session: requests.Session) -> None:
    """T7: neither by the rewriting nor by what the handler does."""
    prepared = session.prepare_request(
        requests.Request("POST", OPENAI + "/a//b/../headers", data=b'[["x", "y"]]', headers={"X-Own": "1"})
    )
    before = (prepared.method, prepared.url, dict(prepared.headers), prepared.body)
    with delegated_api_key_id("key-1"):
        response = session.send(prepared)
    assert (prepared.method, prepared.url, dict(prepared.headers), prepared.body) == before
    assert response.request is prepared
    assert response.headers["x"] == "y"


def test_what_a_server_behind_the_url_would_see(session: requests.Session) -> None:
    """H7: scheme, host and port, header order; nothing that the caller or a standard does not ask for."""
    session.headers.clear()
    with delegated_api_key_id("k"):
        seen = session.get(OPENAI + ":8443/echo", headers={"B": "1", "A": "2"}).json()
    assert seen["headers"] == [["Host", "api.openai.com:8443"], ["B", "1"], ["A", "2"]]
    assert (seen["scheme"], seen["server"]) == ("https", ["api.openai.com", 8443])
    seen = session.get("http://app.local:80/echo", headers={"Host": "other"}).json()
    assert seen["headers"] == [["Host", "other"]]
    assert (seen["scheme"], seen["server"]) == ("http", ["app.local", 80])
    session.mount("http://", session.get_adapter(URL))
    seen = session.get("http://user:pw@[::1]:9/echo", auth=lambda r: r).json()
    assert seen["headers"] == [["Host", "[::1]:9"]]
    assert seen["server"] == ["::1", 9]


def test_fragments_stay_with_the_caller(session: requests.Session) -> None:
    """T3: a fragment is no part of the target."""
    assert session.get(URL + "/echo?x=1#part").json()["target"] == "/echo?x=1"
    assert session.get(URL + "?x=1").text == "hello"


@pytest.mark.parametrize("status", [200, 201, 299, 404, 418, 500, 503, 599, 999])
def test_status_lines(session: requests.Session, status: int) -> None:
    """T11: code, standard phrase, HTTP/1.1; the reason is never None, and no status is interpreted."""
    response = session.get(URL + f"/status?status={status}")
    phrases = {200: "OK", 201: "Created", 404: "Not Found", 418: "I'm a Teapot", 503: "Service Unavailable"}
    assert response.status_code == status
    assert response.reason == phrases.get(status, "Internal Server Error" if status == 500 else "")
    assert (response.raw.version, response.raw.version_string) == (11, "HTTP/1.1")
    assert isinstance(response.raw, HTTPResponse)


@pytest.mark.parametrize("timeout", [None, 30, 30.0, (30, 30), (None, 30), (30, None), Timeout(30), Timeout(1, 30)])
def test_timeouts_of_every_form(session: requests.Session, timeout: Any) -> None:
    """R: None, number, pair or urllib3 Timeout."""
    assert session.get(URL + "/hello", timeout=timeout).text == "hello"


@pytest.mark.parametrize("timeout", ["soon", (1, 2, 3), (1,), -1, (0, 0), (1, "x"), True])
def test_other_timeouts_are_refused(session: requests.Session, timeout: Any) -> None:
    """R: ValueError for what is no timeout, before a worker is leased."""
    with pytest.raises(ValueError):
        session.get(URL + "/hello", timeout=timeout)


def test_verify_cert_and_proxies_are_ignored(session: requests.Session) -> None:
    """R: nothing leaves the machine, so there is nothing to verify."""
    response = session.get(
        URL + "/hello", verify="/nowhere", cert="/nowhere", proxies={"http": "http://nowhere.invalid:1"}
    )
    assert response.text == "hello"


def test_the_response_is_there_at_the_head(session: requests.Session, tmp_path: Path) -> None:
    """R: send returns at the head, here while the handler waits for a sign that the caller has seen it."""
    go = tmp_path / "go"
    with session.get(f"{URL}/head_then_wait?go={go}", stream=True) as response:
        assert response.status_code == 202
        go.touch()
        assert response.content == b"done"


def test_bodies_close_at_their_end(session: requests.Session) -> None:
    """R: a body that was read to its end is closed, and reads as empty from then on."""
    with session.get(URL + "/hello", stream=True) as response:
        assert not response.raw.closed
        assert b"".join(response.iter_content(1)) == b"hello"
        assert response.raw.closed
        assert response.raw.read() == b""


def test_chunk_size_is_an_upper_bound(session: requests.Session) -> None:
    """R: stream() never gives more than it is asked for, and loses nothing."""
    with session.get(URL + "/big?size=300000", stream=True) as response:
        sizes = [len(chunk) for chunk in response.iter_content(1000)]
    assert max(sizes) <= 1000
    assert sum(sizes) == 300000
    with session.get(URL + "/hello", stream=True) as response:
        assert list(response.raw.stream(0)) == []
        assert response.raw.read(2) == b"he"
        assert response.raw.read(10) == b"llo"
        assert response.raw.read(1) == b""


def test_the_raw_response_reads_like_a_file(session: requests.Session) -> None:
    """R: json.load, shutil and io wrappers take raw as they take urllib3's."""
    with session.get(URL + "/echo", stream=True) as response:
        assert json.load(response.raw)["method"] == "GET"
    with session.get(URL + "/stream?count=3&pause=0", stream=True) as response:
        response.raw.auto_close = False
        lines = list(io.TextIOWrapper(io.BufferedReader(response.raw)))
    assert [line.split()[1] for line in lines if line != "\n"] == ["0", "1", "2"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_bodies_decode_as_they_come(session: requests.Session, tmp_path: Path, coding: str) -> None:
    """R: gzip and deflate decode piece by piece: each event is readable before the next is written."""
    (tmp_path / "0").touch()
    with session.get(f"{URL}/compressed?coding={coding}&go={tmp_path}", stream=True) as response:
        for number, line in enumerate(response.iter_lines(chunk_size=1024)):
            assert line == b"event %d" % number
            (tmp_path / str(number + 1)).touch()
    assert (tmp_path / "3").exists()


def test_a_compressed_body_that_is_none(start: Callable[..., Pool]) -> None:
    """R: a broken coding is the client's own decoding error."""

    def handler(request: Any, response: Any) -> bytes:
        response.headers["content-encoding"] = "gzip"
        return b"no gzip at all"

    with requests.Session() as session:
        session.mount(URL, Transport(start(handler)))
        with pytest.raises(ContentDecodingError):
            session.get(URL)


def test_gzip_in_one_piece(start: Callable[..., Pool]) -> None:
    """R: large compressed bodies come out whole under any chunk size."""
    data = bytes(range(256)) * 4000
    packed = {"gzip": gzip.compress(data), "deflate": zlib.compress(data)}

    def handler(request: HandlerRequest, response: Any) -> bytes:
        response.headers["content-encoding"] = request.query
        answer: bytes = packed[request.query]
        return answer

    with requests.Session() as session:
        session.mount(URL, Transport(start(handler)))
        for coding in packed:
            assert session.get(f"{URL}/?{coding}").content == data
            with session.get(f"{URL}/?{coding}", stream=True) as response:
                chunks = list(response.iter_content(999))
            assert b"".join(chunks) == data
            assert max(map(len, chunks)) <= 999


def test_cookies(session: requests.Session) -> None:
    """R: Set-Cookie twice reaches session.cookies, and the next request."""
    response = session.get(URL + "/cookies")
    assert session.cookies.get_dict() == {"a": "1", "b": "2"}
    assert response.cookies.get_dict() == {"a": "1", "b": "2"}
    assert response.raw.headers.getlist("set-cookie") == ["a=1; Path=/", "b=2; Path=/"]
    sent = dict(session.get(URL + "/echo").json()["headers"])
    assert sorted(sent["Cookie"].split("; ")) == ["a=1", "b=2"]


def test_repeated_request_headers_and_bytes(session: requests.Session) -> None:
    """H7: header values may be bytes; order is kept."""
    seen = session.get(URL + "/echo", headers={"X-Bytes": b"caf\xe9", "X-Name": "1"}).json()
    assert ["X-Bytes", "café"] in seen["headers"]
    assert ["X-Name", "1"] in seen["headers"]


def test_a_header_with_a_line_break(session: requests.Session) -> None:
    """T4: from the caller's side, refused with the client's own error before a worker sees it."""
    with pytest.raises(InvalidHeader):
        session.get(URL + "/echo", headers={"X": "a\r\nb: c"})
    prepared = session.prepare_request(requests.Request("GET", URL + "/echo"))
    prepared.headers["X"] = "a\nb: c"
    with pytest.raises(InvalidHeader):
        session.send(prepared)
    prepared.headers["X"] = "\u20ac"
    with pytest.raises(InvalidHeader):
        session.send(prepared)


def test_a_request_head_over_the_cap(session: requests.Session) -> None:
    """T4: told with the cap, and the pool goes on."""
    with pytest.raises(InvalidURL, match="cap of 262144"):
        session.get(URL + "/hello", headers={"X": "x" * 300_000})
    assert session.get(URL + "/hello", headers={"X": "x" * 200_000}).text == "hello"


def test_redirects_are_followed_without_doubling_the_prefix(session: requests.Session) -> None:
    """T8: the session follows redirects itself, from the caller's own URL space."""
    mount = "/api/v2/aibridge/openai"
    for to in (f"{mount}/v1/hello", f"{OPENAI}{mount}/v1/hello", "hello", "/v1/hello"):
        with delegated_api_key_id("key-1"):
            response = session.get(f"{OPENAI}/v1/location?to={quote(to)}")
            assert response.text == "hello"
            assert response.url == OPENAI + "/v1/hello"
            assert raw(response).served_target == f"{mount}/v1/hello"
            assert [r.status_code for r in response.history] == [302]
            alone = session.get(f"{OPENAI}/v1/location?to={quote(to)}", allow_redirects=False)
            assert (alone.status_code, alone.is_redirect) == (302, True)


def test_redirected_bodies_are_sent_again(session: requests.Session) -> None:
    """R: a 307 re-sends the body, since the adapter leaves the caller's file open."""
    with delegated_api_key_id("key-1"):
        response = session.post(f"{OPENAI}/location?to=/echo&status=307", data=io.BytesIO(b"again"))
    assert response.json()["body"] == "again"


def test_digest_auth(start: Callable[..., Pool]) -> None:
    """R: response.connection is set; digest auth re-sends through it."""

    def handler(request: Any, response: Any) -> bytes:
        if "authorization" not in request.headers:
            response.headers["www-authenticate"] = 'Digest realm="r", nonce="n", qop="auth", algorithm=MD5'
            response.write_header(401)
            return b""
        answer: str = request.headers["authorization"]
        return answer.encode() + b" " + bytes(request.body.read())

    with requests.Session() as session:
        session.mount(URL, Transport(start(handler)))
        response = session.post(URL + "/x", data=io.BytesIO(b"body"), auth=HTTPDigestAuth("user", "secret"))
        assert response.status_code == 200
        assert response.text.startswith('Digest username="user"')
        assert response.text.endswith(" body")
        assert response.connection is session.get_adapter(URL)


def test_sessions_pickle(session: requests.Session, pool: Pool) -> None:
    """R: in the same process a pickled session goes to the same pool."""
    copy = pickle.loads(pickle.dumps(session))
    assert copy.get(URL + "/hello").text == "hello"
    assert copy.get_adapter(URL)._pool is pool
    with delegated_api_key_id("key-1"):
        assert copy.get(OPENAI + "/echo").json()["target"] == "/api/v2/aibridge/openai/echo"


def test_responses_pickle(session: requests.Session) -> None:
    """R: a response pickles once its content is there, as any of requests does."""
    response = pickle.loads(pickle.dumps(session.get(URL + "/hello")))
    assert (response.status_code, response.text) == (200, "hello")


def test_closing_session_or_adapter_leaves_the_pool(session: requests.Session, pool: Pool) -> None:
    """C6: close() closes only a pool that they own, and they own none."""
    session.close()
    session.get_adapter(URL).close()
    assert session.get(URL + "/hello").text == "hello"


def test_32_threads_share_a_session(start: Callable[..., Pool]) -> None:
    """R: safe under many threads: every answer matches its request."""
    answers: dict[str, str] = {}
    with requests.Session() as session:
        session.mount(URL, Transport(start(workers=4)))

        def call(thread: int) -> None:
            for number in range(20):
                name = f"{thread}-{number}"
                answers[name] = session.post(f"{URL}/echo?name={name}", data=name).json()

        threads = [threading.Thread(target=call, args=(thread,)) for thread in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 640
    for name, seen in answers.items():
        assert (seen["target"], seen["body"]) == (f"/echo?name={name}", name)  # type: ignore[index]


def test_no_worker_in_time(start: Callable[..., Pool], tmp_path: Path) -> None:
    """F7: the client's own connect timeout."""
    pool = start(workers=1)
    here, go = tmp_path / "here", tmp_path / "go"
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        thread = threading.Thread(target=session.get, args=(f"{URL}/wait_for?here={here}&go={go}",))
        thread.start()
        while not here.exists():
            thread.join(0.001)
        with pytest.raises(ConnectTimeout, match="no worker became free"):
            session.get(URL + "/hello", timeout=(0.05, 10))
        go.touch()
        thread.join()
        assert session.get(URL + "/hello", timeout=10).text == "hello"


def test_read_timeouts(session: requests.Session) -> None:
    """F5: before the head ReadTimeout, in the body requests' ConnectionError, as with any server."""
    with pytest.raises(ReadTimeout, match="no progress"):
        session.get(URL + "/never_read", timeout=(10, 0.05))
    with (
        session.get(URL + "/stream?count=2&pause=30", stream=True, timeout=(10, 0.2)) as response,
        pytest.raises(RequestsConnectionError, match="no progress"),
    ):
        assert response.content
    assert session.get(URL + "/hello", timeout=10).text == "hello"


def test_a_closed_pool(start: Callable[..., Pool]) -> None:
    """W11: requests on a closed pool are told so, with the client's own error."""
    pool = start()
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        pool.close()
        with pytest.raises(RequestsConnectionError, match="the pool is closed"):
            session.get(URL + "/hello")


def test_left_half_way(session: requests.Session) -> None:
    """C1: a stream that is left early costs the caller nothing, and the pool goes on."""
    for _ in range(5):
        with session.get(URL + "/endless", stream=True) as response:
            assert next(response.iter_content(100)) == b"x" * 100
    assert session.get(URL + "/hello").text == "hello"


def test_closed_by_another_thread(session: requests.Session) -> None:
    """C2: a reader that is blocked is freed at once, and never sees a clean end."""
    response = session.get(URL + "/stream?count=2&pause=600", stream=True)
    lines = response.iter_lines()
    assert next(lines).startswith(b"data: 0")
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            list(response.iter_content(1024))
        except BaseException as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while job_of(response)._user is None:
        reader.join(0.001)
    response.close()
    reader.join(5)
    assert not reader.is_alive()
    assert isinstance(outcome[0], ChunkedEncodingError)


def test_a_dropped_response(session: requests.Session) -> None:
    """C1: a response that is garbage-collected ends its job, with a ResourceWarning."""
    response = session.get(URL + "/endless", stream=True)
    with pytest.warns(ResourceWarning, match="/endless"):
        del response
    assert session.get(URL + "/hello").text == "hello"


def test_a_method_that_is_none(session: requests.Session) -> None:
    """R: what the pool would refuse is the client's own error."""
    with pytest.raises(InvalidURL, match="not a token"):
        session.request("GE T", URL + "/hello")
