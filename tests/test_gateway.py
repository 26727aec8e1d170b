"""transport.gateway: plain HTTP in, jobs behind; over real sockets, with clients that behave and others."""

from __future__ import annotations

import http.client
import json
import queue
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import requests

from runner import ConfigurationError, Pool
from runner.events import JobEnded, JobStarted
from tests.processes import kill
from tests.serving import Served, ServedByUvicorn, receive_all, receive_until
from tests.waiting import wait_until
from transport import Route
from transport.front import connection, pool_exchange, server
from transport.gateway import Gateway, Mount, TrustedHeaders

Serve = Callable[..., Served]

SECRET = "a secret of the front's"


BY_BOTH = pytest.mark.parametrize("serve", ["front", "gateway"], indirect=True)
"""For what holds at the front of `blastdoor serve` and at the ASGI gateway alike."""

BY_ALL = pytest.mark.parametrize("serve", ["front", "gateway", "tasks"], indirect=True)
"""And at the front with pools that know no callbacks, such as a cluster's."""


@pytest.fixture
def serve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serves apps, and stops after the test."""
    running: list[Served | ServedByUvicorn] = []
    how = getattr(request, "param", "front")
    kind: Any = ServedByUvicorn if how == "gateway" else Served
    if how == "tasks":
        monkeypatch.setattr(pool_exchange, "Pool", type("NoPool", (), {}))

    def begin(*arguments: Any, **settings: Any) -> Served:
        served: Served = kind(*arguments, **{"drain": 0, "admin": "none", **settings})
        running.append(served.__enter__())
        return served

    yield begin
    for served in running:
        served.__exit__(None, None, None)


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def ended(pool: Pool) -> queue.Queue[JobEnded]:
    """The ends of a pool's jobs from now on."""
    ends: queue.Queue[JobEnded] = queue.Queue()
    pool.subscribe(lambda event: ends.put(event) if isinstance(event, JobEnded) else None)
    return ends


def started(pool: Pool) -> queue.Queue[JobStarted]:
    starts: queue.Queue[JobStarted] = queue.Queue()
    pool.subscribe(lambda event: starts.put(event) if isinstance(event, JobStarted) else None)
    return starts


def request_of(target: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


# -- G1: the way there and back -----------------------------------------------------------------------


@BY_BOTH
def test_a_request_and_its_answer(serve: Serve, session: requests.Session) -> None:
    """G1: method, target byte for byte, headers, body; status, headers, body; and who asks."""
    served = serve()
    response = session.post(f"{served.url}/a%2Fb/echo?x=%20&y", data=b"body", headers={"X-One": "1"})
    seen = response.json()
    assert (response.status_code, seen["method"], seen["target"]) == (200, "POST", "/a%2Fb/echo?x=%20&y")
    assert (seen["body"], dict(seen["headers"])["x-one"]) == ("body", "1")
    assert (seen["scheme"], seen["server"]) == ("http", list(served.address))
    assert seen["client"][0] == "127.0.0.1"
    assert seen["client"][1] != 0


@BY_BOTH
def test_tokens_come_one_by_one(serve: Serve, tmp_path: Path) -> None:
    """G1, T10: what the handler writes is there at once: it waits for the client to have seen it."""
    served = serve()
    (tmp_path / "0").touch()
    with httpx2.stream("GET", f"{served.url}/compressed?coding=gzip&go={tmp_path}") as response:
        pieces, decoder = response.iter_raw(), zlib.decompressobj(wbits=31)
        for number in range(3):
            (tmp_path / str(number)).touch()
            text = b""
            while not text:
                text = decoder.decompress(next(pieces))
            assert text == b"event %d\n" % number


def test_nothing_waits_for_acknowledgements(serve: Serve) -> None:
    """G1: connections have TCP_NODELAY: an answer is not held back by Nagle's algorithm."""
    served = serve()
    with served.connect() as client:
        client.sendall(request_of("/hello"))
        receive_until(client, b"hello")
        (ours,) = served.connections
        assert ours._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@BY_ALL
def test_both_directions_at_once(serve: Serve) -> None:
    """G1, H6: each piece of a body of unknown length comes back before the next one is sent."""
    with serve().connect() as client:
        client.sendall(request_of("/mirror", "Transfer-Encoding: chunked", method="POST"))
        assert b"200 OK" in receive_until(client, b"\r\n\r\n")
        for number in range(20):
            piece = b"piece %d" % number
            client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            receive_until(client, piece + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert receive_until(client, b"0\r\n\r\n")


@BY_ALL
@pytest.mark.parametrize("size", [0, 1, 32 << 10, (32 << 10) + 1, 20_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies(serve: Serve, session: requests.Session, size: int, chunked: bool) -> None:
    """G1, H6, T12: bodies of any size, of known and unknown length, there and back."""
    served = serve()
    body = random.Random(size).randbytes(size)
    data = iter([body[at : at + 70_000] for at in range(0, size, 70_000)]) if chunked else body
    response = session.post(f"{served.url}/echo_body", data=data)
    assert response.content == body


def test_an_answer_before_the_body_was_read(serve: Serve) -> None:
    """G1, H6: the answer is there though most of the body is not taken, and the connection goes on."""
    served = serve()
    client = http.client.HTTPConnection(*served.address, timeout=20)
    client.request("POST", "/answer_early", body=b"x" * 3_000_000)
    response = client.getresponse()
    assert (response.status, response.read()) == (413, b"too large")
    client.request("GET", "/hello")
    assert client.getresponse().read() == b"hello"
    client.close()


@BY_BOTH
def test_expect_continue(serve: Serve) -> None:
    """G1: a client that waits for 100 Continue is told to go on once its body is wanted (RFC 9110, 10.1.1)."""
    with serve().connect() as client:
        client.sendall(request_of("/echo_body", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        assert receive_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 100 Continue")
        client.sendall(b"body")
        assert receive_until(client, b"body")


@BY_BOTH
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "DELETE", "PATCH", "PROPFIND"])
def test_methods(serve: Serve, session: requests.Session, method: str) -> None:
    """G1, H5: any method goes through; an answer to HEAD has no body."""
    response = session.request(method, f"{serve().url}/echo")
    assert response.status_code == 200
    assert response.content == b"" if method == "HEAD" else response.json()["method"] == method


@BY_ALL
def test_a_status_that_is_none(serve: Serve, session: requests.Session) -> None:
    """G3: a status beyond HTTP's is a 502."""
    response = session.get(f"{serve().url}/status?status=799")
    assert (response.status_code, response.json()["fault"]) == (502, "protocol")


# -- G2: clients that leave ---------------------------------------------------------------------------


@BY_ALL
@pytest.mark.parametrize("target", ["/endless", "/never_read", "/stream?count=100000&pause=0.01"])
@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_client_that_leaves(serve: Serve, target: str, reset: bool) -> None:
    """G2, C1: its job is ended, before the head and after it, whichever way it goes."""
    served = serve(workers=1)
    starts, ends = started(served.pool), ended(served.pool)
    with served.connect() as client:
        client.sendall(request_of(target))
        starts.get(timeout=20)
        if target != "/never_read":
            receive_until(client, b"\r\n\r\n")
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ends.get(timeout=20).outcome == "left"
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


@BY_ALL
def test_a_client_that_leaves_in_the_queue(serve: Serve) -> None:
    """G2: one that has gone before it had a worker gets none."""
    served = serve(workers=1)
    starts, ends = started(served.pool), ended(served.pool)
    with served.connect() as first:
        first.sendall(request_of("/never_read"))
        starts.get(timeout=20)
        with served.connect() as second:
            second.sendall(request_of("/hello"))
            wait_until(lambda: served.pool.stats().waiting == 1)
        wait_until(lambda: served.pool.stats().waiting == 0)
    assert ends.get(timeout=20).outcome == "left"
    assert starts.empty()


@BY_BOTH
def test_a_client_that_leaves_while_it_uploads(serve: Serve) -> None:
    """G2, I2: in the midst of a body that nobody reads, too; the answer that nobody will read ends."""
    served = serve(workers=1)
    starts, ends = started(served.pool), ended(served.pool)
    with served.connect() as client:
        client.sendall(request_of("/endless", "Content-Length: 100000000", method="POST"))
        starts.get(timeout=20)
        receive_until(client, b"\r\n\r\n")
        client.sendall(b"x" * 100_000)
    assert ends.get(timeout=20).outcome == "left"


@BY_ALL
def test_clients_that_leave_at_any_moment(serve: Serve) -> None:
    """G2, I5: at random instants: no job goes on, no request is left, all workers are there."""
    served = serve(workers=2)
    seed = 20261122
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(300):
        with served.connect() as client:
            target = chance.choice(["/hello", "/endless", "/mirror", "/stream?count=50&pause=0", "/big?size=3000000"])
            headers = ["Content-Length: 200000"] if target == "/mirror" else []
            client.sendall(request_of(target, *headers, method="POST" if headers else "GET"))
            if headers:
                client.sendall(b"x" * chance.randrange(200_000))
            time.sleep(chance.random() * 0.004)
    wait_until(lambda: served.gateway.active == 0)
    wait_until(lambda: served.pool.stats().busy == 0 and served.pool.stats().idle == 2)
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


# -- G3: faults ---------------------------------------------------------------------------------------


@BY_ALL
@pytest.mark.parametrize(
    ("target", "status", "fault"),
    [("/raise", 500, "raised"), ("/die", 500, "died"), ("/protocol", 502, "protocol")],
)
def test_faults_before_the_head(serve: Serve, session: requests.Session, target: str, status: int, fault: str) -> None:
    """G3, F1, F3, F6: problem+json, which tells no stranger what the handler has said."""
    response = session.post(serve().url + target, data=b"nonsense" * 100)
    assert (response.status_code, response.json()["fault"]) == (status, fault)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-should-retry"] == "false"
    assert "boom" not in response.text


@BY_BOTH
def test_a_time_limit(serve: Serve, session: requests.Session) -> None:
    """G3, F5: over the time of a job: 504."""
    response = session.get(serve(timeout=0.2).url + "/never_read")
    assert (response.status_code, response.json()["fault"]) == (504, "timeout")


@pytest.mark.parametrize("target", ["/raise_late", "/die?late=1", "/abort_late"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_faults_after_the_head(serve: Serve, target: str, version: str) -> None:
    """G3, F1, F2, F3: the body is cut off, and never looks whole: to HTTP/1.0 by a reset."""
    with serve().connect() as client:
        client.sendall(f"GET {target} HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        received = receive_until(client, b"first piece")
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert (b"transfer-encoding: chunked" in received) == (version == "1.1")
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                receive_all(client)
        else:
            assert not (received + receive_all(client)).endswith(b"0\r\n\r\n")


@BY_ALL
def test_full(serve: Serve, session: requests.Session, tmp_path: Path) -> None:
    """G3, F7: the queue is full, or the wait over: 503 with Retry-After, at once and after the time."""
    served = serve(workers=1, queue=1, queue_timeout=0.5)
    answers: list[requests.Response] = []
    here, go = tmp_path / "here", tmp_path / "go"

    def wait() -> None:
        answers.append(requests.get(f"{served.url}/wait_for?here={here}&go={go}", timeout=30))

    def queue_up() -> None:
        answers.append(requests.get(f"{served.url}/hello", timeout=30))

    busy, queued = threading.Thread(target=wait), threading.Thread(target=queue_up)
    busy.start()
    wait_until(here.exists)
    queued.start()
    wait_until(lambda: served.pool.stats().waiting == 1)
    response = session.get(f"{served.url}/hello")
    assert (response.status_code, response.json()["fault"]) == (503, "overload")
    assert int(response.headers["retry-after"]) >= 1
    queued.join()
    assert answers[0].status_code == 503
    go.touch()
    busy.join()
    assert answers[1].text == "went"


@BY_BOTH
def test_debug(serve: Serve, session: requests.Session) -> None:
    """G3: in debug mode the client is told the traceback."""
    assert "boom from the handler" in session.get(serve(debug=True).url + "/raise").json()["traceback"]


# -- G4: headers --------------------------------------------------------------------------------------


@BY_BOTH
def test_headers_of_the_connection_are_not_passed_on(serve: Serve) -> None:
    """G4: hop-by-hop headers, and those that Connection names, end here; all others go through, repeats and order."""
    with serve().connect() as client:
        client.sendall(
            request_of(
                "/echo",
                "Connection: close, X-Private, Host",
                "X-Private: 1",
                "Keep-Alive: 5",
                "TE: trailers",
                "Proxy-Connection: close",
                "Upgrade: h2c",
                "X-Two: a",
                "X-Two: b",
                "X-Request-Id: r-1",
                "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                "X-Forwarded-For: 10.1.1.1",
                "Forwarded: for=10.1.1.1",
            )
        )
        received = receive_all(client)
    seen = json.loads(received[received.index(b"{") : received.rindex(b"}") + 1])
    assert seen["headers"] == [
        ["host", "x"],
        ["x-two", "a"],
        ["x-two", "b"],
        ["x-request-id", "r-1"],
        ["traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
        ["x-forwarded-for", "10.1.1.1"],
        ["forwarded", "for=10.1.1.1"],
    ]


def test_the_proxy_in_front(serve: Serve, session: requests.Session) -> None:
    """G4: a trusted proxy tells scheme and client; what anybody else says of them is only passed on."""
    told = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    seen = session.get(f"{serve().url}/echo", headers=told).json()
    assert (seen["scheme"], seen["client"][0]) == ("https", "203.0.113.7")
    seen = session.get(f"{serve(trusted_proxies=[]).url}/echo", headers=told).json()
    assert (seen["scheme"], seen["client"][0]) == ("http", "127.0.0.1")
    assert dict(seen["headers"])["x-forwarded-for"] == "203.0.113.7"


@BY_BOTH
def test_headers_of_the_handler_s_connection(serve: Serve, session: requests.Session) -> None:
    """G4: a handler has no say over the client's connection."""
    served = serve("tests.gateway_apps:connection_headers")
    response = session.get(served.url)
    assert response.headers["x-kept"] == "1"
    assert {"x-named", "keep-alive", "upgrade"}.isdisjoint(name.lower() for name in response.headers)
    assert response.headers.get("connection") is None


# -- G5: for whom it acts -----------------------------------------------------------------------------

MOUNT: dict[str, Any] = {
    "app": "tests.handlers:app",
    "provider": "openai",
    "source": "front",
    "key_id": "key-1",
    "attribution": {"workspace": "w-1"},
}


@BY_BOTH
def test_what_the_configuration_vouches_for(serve: Serve, session: requests.Session) -> None:
    """G5, T3, T6: the path goes to the provider's mount; provider, source, key and attribution are the settings'."""
    served = serve({"/ai": MOUNT})
    forged = {"x-delegated-api-key-id": "key-2", "x-blastdoor-secret": SECRET}
    seen = session.get(f"{served.url}/ai//v1/./echo?x=%2F", headers=forged).json()
    assert seen["target"] == "/api/v2/aibridge/openai/v1/echo?x=%2F"
    assert seen["context"]["delegated_api_key_id"] == "key-1"
    assert (seen["context"]["provider"], seen["context"]["source"]) == ("openai", "front")
    assert seen["context"]["attribution"] == {"workspace": "w-1"}
    assert session.get(f"{served.url}/ai/%2e%2e/x").status_code == 400


@BY_BOTH
def test_locations_come_back(serve: Serve, session: requests.Session) -> None:
    """G5, T8: a Location inside the provider's mount is mapped to the client's own space."""
    served = serve({"/ai": MOUNT})
    response = session.get(f"{served.url}/ai/location?to=/api/v2/aibridge/openai/hello", allow_redirects=False)
    assert response.headers["location"] == "/ai/hello"
    assert session.get(f"{served.url}/ai/location?to=/api/v2/aibridge/openai/hello").text == "hello"


@BY_BOTH
def test_an_authenticated_front(serve: Serve, session: requests.Session, tmp_path: Path) -> None:
    """G5, T6: with the secret, headers tell for whom a request acts; without it nothing; none is passed on."""
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    trusted = {
        "secret_file": str(tmp_path / "secret"),
        "key_id": "X-Key",
        "source": "X-Source",
        "attribution": {"workspace": "X-Workspace"},
    }
    served = serve({"/": {**MOUNT, "trusted_headers": trusted}})
    told = {"X-Key": "key-9", "X-Source": "web", "X-Workspace": "w-9"}
    seen = session.get(f"{served.url}/echo", headers={**told, "X-Blastdoor-Secret": SECRET}).json()
    assert seen["context"]["delegated_api_key_id"] == "key-9"
    assert (seen["context"]["source"], seen["context"]["attribution"]) == ("web", {"workspace": "w-9"})
    assert {"x-key", "x-blastdoor-secret", "x-source", "x-workspace"}.isdisjoint(dict(seen["headers"]))
    seen = session.get(f"{served.url}/echo", headers=told).json()
    assert seen["context"]["delegated_api_key_id"] == "key-1"
    assert "x-key" not in dict(seen["headers"])
    for wrong in ("a secret of the front'", SECRET + "x", "x", ""):
        response = session.get(f"{served.url}/echo", headers={**told, "X-Blastdoor-Secret": wrong})
        assert response.status_code == 401


@BY_BOTH
def test_a_header_that_comes_twice_tells_nothing(serve: Serve, tmp_path: Path) -> None:
    """G5: the client's own line beside the front's is refused, not chosen from."""
    (tmp_path / "secret").write_text(SECRET)
    trusted = {"secret_file": str(tmp_path / "secret"), "key_id": "X-Key"}
    served = serve({"/": {**MOUNT, "trusted_headers": trusted}})
    with served.connect() as client:
        client.sendall(
            request_of("/echo", f"X-Blastdoor-Secret: {SECRET}", "X-Key: a", "X-Key: b", "Connection: close")
        )
        assert b" 401 " in receive_all(client)


@BY_BOTH
def test_nobody_to_act_for(serve: Serve, session: requests.Session, tmp_path: Path) -> None:
    """G5, T4: a provider's request that acts for nobody reaches no worker."""
    (tmp_path / "secret").write_text(SECRET)
    mount = {**MOUNT, "key_id": "", "trusted_headers": {"secret_file": str(tmp_path / "secret")}}
    served = serve({"/": mount})
    starts = started(served.pool)
    assert session.get(f"{served.url}/echo").status_code == 401
    assert starts.empty()


def test_mounts_that_make_no_sense(pool: Pool) -> None:
    """G5, G6: what can't work is refused when it is made."""
    with pytest.raises(ConfigurationError, match="act for nobody"):
        Mount(pool, route=Route("openai"))
    with pytest.raises(ConfigurationError, match="16 ASCII characters"):
        TrustedHeaders(secret="short")
    with pytest.raises(ConfigurationError, match="token"):
        TrustedHeaders(secret=SECRET, key_id="a b")
    for path in ("openai", "/openai/", "/a//b", "/a/../b", "/a b", "/a%20b"):
        with pytest.raises(ConfigurationError, match="a mount is"):
            Gateway({path: pool})
    with pytest.raises(ConfigurationError, match="two mounts"):
        Gateway({"/": pool, "": pool})
    with pytest.raises(ConfigurationError, match="empty"):
        Gateway({})
    with pytest.raises(ConfigurationError, match="body_timeout"):
        Gateway(pool, body_timeout=-1)
    assert SECRET not in repr(TrustedHeaders(secret=SECRET))


# -- G6: mounts ---------------------------------------------------------------------------------------


@BY_BOTH
def test_several_mounts(serve: Serve, session: requests.Session) -> None:
    """G6: each has its own pool and limits; the longest path wins, by whole segments; else there is nothing."""
    served = serve(
        {
            "/a": {"app": "tests.handlers:app", "workers": 1},
            "/a/b": {"app": "tests.handlers:app", "workers": 1, "timeout": 0.2},
            "/flask": {"app": "tests.frameworks.flask_app:app", "workers": 1},
        }
    )
    pids = {path: session.get(f"{served.url}{path}/pid").text for path in ("/a", "/a/b")}
    assert len(set(pids.values())) == 2
    assert session.get(f"{served.url}/a/b/never_read").status_code == 504
    assert session.get(f"{served.url}/a/bc/hello").text == "hello"
    assert session.get(f"{served.url}/ab/hello").status_code == 404
    assert session.get(f"{served.url}/").status_code == 404
    seen = session.get(f"{served.url}/flask/echo/x%2Fy").json()
    assert seen["url"].startswith(f"{served.url}/flask/echo/x")


def test_a_mount_s_stuck_jobs_leave_the_others_alone(serve: Serve, session: requests.Session) -> None:
    """G6, T12: all workers of one mount are busy; another answers."""
    served = serve({"/a": "tests.handlers:app", "/b": "tests.handlers:app"}, workers=1)
    with served.connect() as client:
        client.sendall(request_of("/a/never_read"))
        wait_until(lambda: served.gateway.pools["/a"].stats().busy == 1)
        assert session.get(f"{served.url}/b/hello", timeout=20).text == "hello"


# -- G7: clients that do not behave -------------------------------------------------------------------


def test_a_slow_head(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: a head that takes too long is answered with a 408, byte by byte or not at all, also on a used connection."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    served = serve()
    with served.connect() as slow, served.connect() as silent, served.connect() as used:
        used.sendall(request_of("/hello"))
        receive_until(used, b"hello")
        used.sendall(b"GET / HT")
        for byte in b"GET /":
            slow.sendall(bytes([byte]))
        assert receive_all(slow).startswith(b"HTTP/1.1 408 ")
        assert receive_all(used).startswith(b"HTTP/1.1 408 ")
        assert receive_all(silent) == b""


@pytest.mark.parametrize("head", ["endless header", "many headers", "long target"])
def test_an_endless_head(serve: Serve, head: str) -> None:
    """G7: a head over 64 KiB is answered with a 431, whatever is long about it; nothing of it is kept."""
    served = serve()
    with served.connect() as client:
        start, more = {
            "endless header": (b"GET / HTTP/1.1\r\nX: ", b"x" * 1000),
            "many headers": (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 100),
            "long target": (b"GET /", b"x" * 1000),
        }[head]
        client.sendall(start)
        received = b""
        try:
            for _ in range(1000):
                client.sendall(more)
        except ConnectionError:
            pass
        try:
            received = receive_all(client)
        except ConnectionError:
            pass
        assert received == b"" or received.startswith(b"HTTP/1.1 431 ")
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


def test_a_head_that_is_too_long_at_once(serve: Serve, session: requests.Session) -> None:
    """G7: 200 KB of headers in one write: 431."""
    served = serve()
    for headers in ({f"X-{number}": "x" * 10_000 for number in range(20)}, {"X-Long": "x" * 66_000}):
        assert session.get(served.url, headers=headers).status_code == 431
    assert session.get(f"{served.url}/?{'x' * 70_000}").status_code == 431
    assert session.get(f"{served.url}/hello?{'x' * 60_000}").text == "hello"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(serve: Serve, session: requests.Session, chunked: bool) -> None:
    """G7: over the limit: 413, which the client can read though it is still sending."""
    served = serve(max_body="1MiB")
    body = b"x" * 3_000_000
    response = session.post(f"{served.url}/count", data=iter([body]) if chunked else body)
    assert response.status_code == 413
    assert session.post(f"{served.url}/count", data=body[: 1 << 20]).text == str(1 << 20)


@pytest.mark.parametrize("length", [1000, 1_000_000], ids=["small", "large"])
def test_a_slow_body(serve: Serve, length: int) -> None:
    """G7: a body that drips is answered with a 408; a small one has had no worker meanwhile."""
    served = serve(workers=1, body_timeout=0.3)
    starts = started(served.pool)
    with served.connect() as client:
        client.sendall(request_of("/echo_body", f"Content-Length: {length}", method="POST"))
        for _ in range(5):
            client.sendall(b"x")
        assert receive_until(client, b"\r\n").startswith(b"HTTP/1.1 408 ")
    assert starts.empty() == (length == 1000)
    wait_until(lambda: served.pool.stats().idle == 1)


def test_a_body_that_takes_long_but_comes(serve: Serve) -> None:
    """G7: patience grows with what comes, and a handler that reads late is not the client's fault."""
    served = serve(workers=1, body_timeout=0.5)
    with served.connect() as client:
        client.sendall(request_of("/slow_count", "Content-Length: 400000", "Connection: close", method="POST"))
        for _ in range(4):
            client.sendall(b"x" * 100_000)
            time.sleep(0.2)  # longer in all than the patience that it began with
        assert b"400000" in receive_all(client)


def test_a_client_that_does_not_read(serve: Serve) -> None:
    """G7, I13: one that takes nothing of its answer is dropped, and its job ended, with little memory meanwhile."""
    served = serve(workers=1, send_timeout=0.5)
    ends = ended(served.pool)
    with served.connect() as client:
        client.sendall(request_of("/big?size=250000000"))
        assert ends.get(timeout=20).outcome == "left"
        assert not receive_all(client).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("late", [False, True], ids=["before the head", "after the head"])
def test_a_half_closed_client(serve: Serve, late: bool) -> None:
    """G7: a client that has shut down its sending half gets its answer, whole, a slow one and a stream as well."""
    served = serve()
    for target, words in (("/hello", b"hello"), ("/slow_count", b"0"), ("/stream?count=5&pause=0.02", b"data: 4 ")):
        client = http.client.HTTPConnection(*served.address, timeout=20)
        client.request("GET", target)
        if late:
            response = client.getresponse()
            assert client.sock is not None
            client.sock.shutdown(socket.SHUT_WR)
        else:
            client.sock.shutdown(socket.SHUT_WR)
            response = client.getresponse()
        assert words in response.read()
        client.close()


def test_a_half_closed_client_that_leaves(serve: Serve) -> None:
    """G7, G2: one that shuts down and then goes is found by what the kernel answers to the stream."""
    served = serve(workers=1)
    ends = ended(served.pool)
    client = served.connect()
    client.sendall(request_of("/stream?count=100000&pause=0.01"))
    client.shutdown(socket.SHUT_WR)
    receive_until(client, b"data: 1 ")
    client.close()
    assert ends.get(timeout=20).outcome == "left"


@pytest.mark.parametrize("shut", [False, True])
def test_a_client_that_leaves_a_silent_stream(serve: Serve, tmp_path: Path, shut: bool) -> None:
    """G7, G2: after the head, while the handler writes nothing: its going is heard all the same."""
    served = serve(workers=1)
    ends = ended(served.pool)
    with served.connect() as client:
        client.sendall(request_of(f"/head_then_wait?go={tmp_path / 'go'}"))
        receive_until(client, b"\r\n\r\n")
        if shut:
            client.shutdown(socket.SHUT_WR)
    assert ends.get(timeout=20).outcome == "left"


def test_half_a_request(serve: Serve) -> None:
    """G7: a client that closes its half in the midst of its body has gone."""
    served = serve(workers=1)
    starts, ends = started(served.pool), ended(served.pool)
    with served.connect() as client:
        client.sendall(request_of("/never_read", "Content-Length: 100000", method="POST") + b"half")
        starts.get(timeout=20)
        client.shutdown(socket.SHUT_WR)
        assert ends.get(timeout=20).outcome == "left"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x/hello HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\x80\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /#x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request(serve: Serve, sent: bytes) -> None:
    """G7: it is answered or cut off, and the next client served."""
    served = serve(workers=1, body_timeout=0.5)
    with served.connect() as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        received = receive_all(client)
        assert received == b"" or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2", b"HTTP/1.1 1"))
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


def test_nonsense(serve: Serve) -> None:
    """G7, I14: 1,500 mutated requests, none of which does any harm."""
    served = serve(workers=2, body_timeout=0.2, timeout=5)
    seed = 20261123
    print(f"seed {seed}")
    chance = random.Random(seed)
    seeds = [
        request_of("/hello", "X: y"),
        request_of("/mirror", "Content-Length: 5", method="POST") + b"12345",
        request_of("/mirror", "Transfer-Encoding: chunked", method="POST") + b"5\r\n12345\r\n0\r\n\r\n",
        request_of("/hello") * 3,
        request_of("/echo", "Expect: 100-continue", "Content-Length: 3", method="PUT") + b"abc",
    ]
    for _ in range(1500):
        sent = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(sent))
            match chance.randrange(4):
                case 0:
                    sent[at] = chance.randrange(256)
                case 1:
                    del sent[at : at + chance.randrange(8)]
                case 2:
                    sent[at:at] = chance.randbytes(chance.randrange(1, 8))
                case 3:
                    del sent[at:]
            if not sent:
                break
        with served.connect() as client:
            try:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
    wait_until(lambda: served.gateway.active == 0)
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


def test_the_server_as_a_whole(serve: Serve) -> None:
    """G6: `OPTIONS *` goes to the app at "/"; where there is none, or a provider's, it has an empty answer."""
    asked = b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    mounts: list[tuple[Any, bytes]] = [
        ("tests.frameworks.flask_app:app", b" 404 "),  # by Flask
        ({"/a": "tests.handlers:app"}, b" 204 "),
        ({"/": MOUNT}, b" 204 "),
    ]
    for mount, status in mounts:
        served = serve(mount, workers=1)
        with served.connect() as client:
            client.sendall(asked)
            received = receive_all(client)
        assert status in received.partition(b"\r\n")[0]


def test_too_many_connections(serve: Serve) -> None:
    """G7: beyond the limit a request is answered with a 503."""
    served = serve(connections=5)
    silent = [served.connect() for _ in range(8)]
    wait_until(lambda: len(served.connections) >= 8)
    try:
        assert requests.get(f"{served.url}/hello", timeout=20).status_code == 503
    finally:
        for client in silent:
            client.close()
    wait_until(lambda: not served.connections)
    assert requests.get(f"{served.url}/hello", timeout=20).status_code == 200


def test_pipelined_requests(serve: Serve) -> None:
    """G7: several requests in one write are answered in their order."""
    with serve().connect() as client:
        client.sendall(request_of("/hello") * 20 + request_of("/pid", "Connection: close"))
        received = receive_all(client)
    assert received.count(b"HTTP/1.1 200 OK") == 21
    assert received.count(b"hello") == 20


# -- what a hostile review has found ------------------------------------------------------------------


def test_trailers_are_no_headers(serve: Serve, tmp_path: Path) -> None:
    """G5, G7: what comes after a chunked body is not seen by a handler, and tells nothing of who acts."""
    (tmp_path / "secret").write_text(SECRET)
    trusted = {"secret_file": str(tmp_path / "secret"), "key_id": "X-Key", "source": "X-Source"}
    served = serve({"/": {**MOUNT, "trusted_headers": trusted}})
    headers = [f"X-Blastdoor-Secret: {SECRET}", "X-Key: key-9", "Transfer-Encoding: chunked", "Connection: close"]
    with served.connect() as client:
        client.sendall(request_of("/echo", *headers, method="POST") + b"0\r\nX-Source: forged\r\nX-Evil: 1\r\n\r\n")
        received = receive_all(client)
    seen = json.loads(received[received.index(b"{") : received.rindex(b"}") + 1])
    assert seen["context"]["source"] == "front"
    assert "x-evil" not in dict(seen["headers"])


@pytest.mark.parametrize("what", ["trailers", "one trailer", "chunk extensions"])
def test_endless_things_after_a_head(serve: Serve, what: str) -> None:
    """G7: trailers and chunks' extensions are bounded as heads are."""
    start, more = {
        "trailers": (b"0\r\n", b"a: b\r\n" * 1000),
        "one trailer": (b"0\r\nx: ", b"x" * 10_000),
        "chunk extensions": (b"5;x=", b"x" * 10_000),
    }[what]
    with serve().connect() as client:
        client.sendall(request_of("/echo", "Transfer-Encoding: chunked", method="POST") + start)
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                client.sendall(more)


def test_endless_pipelining(serve: Serve) -> None:
    """G7: requests behind a slow one are not taken without bound."""
    served = serve(workers=1)
    with served.connect() as client:
        client.sendall(request_of("/stream?count=50&pause=0.01"))
        receive_until(client, b"data: 1 ")
        client.settimeout(0.3)
        with pytest.raises((ConnectionError, TimeoutError)):
            for _ in range(100_000):
                client.sendall(request_of("/hello") * 100)
        for connected in served.connections:
            assert connected.waiting <= connection.PIPELINED
    wait_until(lambda: served.gateway.active == 0)


@pytest.mark.parametrize("then", [b"", request_of("/hello"), request_of("/hello") + b"\x16\x03 nonsense\r\n\r\n"])
def test_nothing_is_written_into_another_answer(serve: Serve, tmp_path: Path, then: bytes) -> None:
    """G7: neither a probe of a half-closed client nor an error is taken for a part of the answer under way.

    What is no request is told after all that were.
    """
    served = serve("tests.gateway_apps:by_and_by")
    with served.connect() as client:
        if b"nonsense" in then:
            client.sendall(request_of(f"/slow?{tmp_path}"))
            received = receive_until(client, b"0" * 10)
            client.sendall(then)
        else:
            client.sendall(request_of(f"/slow?{tmp_path}") + then)
            received = receive_until(client, b"0" * 10)
        client.shutdown(socket.SHUT_WR)
        for number in range(1, 5):
            (tmp_path / str(number)).touch()
        try:
            received += receive_all(client)
        except ConnectionError:
            assert b"nonsense" in then
        body = received.partition(b"\r\n\r\n")[2]
    assert body.startswith(b"".join(b"%d" % number * 10 for number in range(5)))
    if b"nonsense" in then:
        _, hello, refused = [part for part in body.split(b"HTTP/1.1 ") if not part.startswith(b"100 ")]  # a probe
        assert hello.endswith(b"hello\r\n0\r\n\r\n")
        assert refused.startswith(b"400 ")
    else:
        assert body.endswith(b"hello\r\n0\r\n\r\n") == bool(then)


def test_a_truncated_answer_to_a_half_closed_client(serve: Serve, tmp_path: Path) -> None:
    """G3, G7: the zero that it was probed with is not taken for the end by a client that is lenient."""
    served = serve(workers=1)
    client = http.client.HTTPConnection(*served.address, timeout=20)
    client.request("GET", f"/head_then_wait?go={tmp_path / 'go'}")
    response = client.getresponse()
    assert client.sock is not None
    client.sock.shutdown(socket.SHUT_WR)
    (connected,) = served.connections
    wait_until(lambda: connected.watched)
    kill(served.pool.workers()[0].pid)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    client.close()


def test_a_client_that_was_not_told_to_go_on(serve: Serve) -> None:
    """G7: its body, which may or may not come, is never taken for a request: the connection ends."""
    served = serve(max_body=1000)
    with served.connect() as client:
        client.sendall(request_of("/echo", "Content-Length: 2000", "Expect: 100-continue", method="POST"))
        head = receive_until(client, b"\r\n\r\n")
        assert b" 413 " in head
        assert b"connection: close" in head
        assert b"HTTP" not in receive_all(client)
    with served.connect() as client:
        client.sendall(b"POST /echo HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi")
        assert receive_all(client).startswith(b"HTTP/1.1 200 ")  # HTTP/1.0 knows no 100


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_client_that_leaves_while_reading_is_paused(
    serve: Serve, pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2: with more of its body, or of its requests, than is taken, its going is heard all the same."""
    monkeypatch.setattr(connection, "PROBE_SECONDS", 0.1)
    served = serve(workers=2)
    starts, ends = started(served.pool), ended(served.pool)
    with served.connect() as client:
        if pipelined:
            client.sendall(request_of("/never_read") * 2)
        else:
            client.sendall(request_of("/never_read", "Content-Length: 50000000", method="POST"))
            client.setblocking(False)
            sent = 0
            try:
                while True:
                    sent += client.send(b"x" * 100_000)
            except BlockingIOError:
                assert sent > 100_000
        starts.get(timeout=20)
    assert ends.get(timeout=20).outcome == "left"
    wait_until(lambda: served.gateway.active == 0)


def test_a_slow_client_of_a_connection_that_closes(serve: Serve) -> None:
    """G7: what is left to be sent after the last piece does not keep a connection for ever."""
    served = serve(workers=1, send_timeout=0.3)
    with served.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request_of("/big?size=7000000", "Connection: close"))
        receive_until(client, b"\r\n\r\n")
        wait_until(lambda: not served.connections)


def test_connections_that_go_on_after_an_early_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: the rest of a body is taken for a while; then the connection is idle, or gone; no other request suffers."""
    monkeypatch.setattr(connection, "LINGER", 0.3)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    served = serve()
    early = request_of("/answer_early", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n"
    with served.connect() as ends, served.connect() as stays:
        for client in (ends, stays):
            client.sendall(early)
            receive_until(client, b"0\r\n\r\n")
        ends.sendall(b"0\r\n\r\n")
        assert receive_all(ends) == b""
        assert receive_all(stays) == b""
    with served.connect() as client:
        client.sendall(request_of("/hello") + request_of("/echo_body", "Content-Length: 4", method="POST") + b"ha")
        receive_until(client, b"hello")
        time.sleep(0.6)  # longer than what is left of the first request could be waited for: there is none
        client.sendall(b"lf")
        assert b"half" in receive_until(client, b"half")


def test_many_requests_and_a_half(serve: Serve) -> None:
    """G7: only what is not complete counts as a head that may be too long."""
    with serve().connect() as client:
        one = request_of("/hello", f"X-Long: {'x' * 1000}")
        client.sendall(one * 80 + one[:40])
        received = b""
        while received.count(b"hello") < 80:
            received += client.recv(1 << 16)
        client.sendall(one[40:])
        receive_until(client, b"hello")


@BY_BOTH
def test_connection_has_no_say_in_who_acts(serve: Serve, session: requests.Session, tmp_path: Path) -> None:
    """G5: naming a trusted header in Connection does not make a request act for the mount's own key."""
    (tmp_path / "secret").write_text(SECRET)
    trusted = {"secret_file": str(tmp_path / "secret"), "key_id": "X-Key"}
    served = serve({"/": {**MOUNT, "trusted_headers": trusted}})
    headers = {"X-Blastdoor-Secret": SECRET, "X-Key": "key-9", "Connection": "x-key, x-blastdoor-secret"}
    seen = session.get(f"{served.url}/echo", headers=headers).json()
    assert seen["context"]["delegated_api_key_id"] == "key-9"


def test_one_connection_at_a_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: the limit is the number of connections that are served; far more are not even taken."""
    monkeypatch.setattr(server, "SURPLUS", 2)
    served = serve(connections=1)
    with served.connect() as client:
        client.sendall(request_of("/hello"))
        assert b" 200 " in receive_until(client, b"hello")
        others = [served.connect() for _ in range(3)]
        assert any(other.recv(1) == b"" for other in reversed(others))
        for other in others:
            other.close()


@BY_ALL
def test_not_modified(serve: Serve, session: requests.Session) -> None:
    """G1, H5: a 304 that tells of a length is sent whole, and the connection goes on."""
    served = serve("tests.gateway_apps:not_modified")
    answers: queue.Queue[Any] = queue.Queue()
    served.gateway.subscribe(answers.put)
    for _ in range(2):
        assert session.get(served.url).status_code == 304
        assert answers.get(timeout=20).whole
