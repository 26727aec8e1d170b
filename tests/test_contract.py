"""The contract: real frameworks answer through a pool as they do behind a real server.

Each case is sent twice to the same URL: by the stock client to gunicorn or uvicorn on loopback, and by the same
client with our transport to a pool that runs the same app, or over HTTP to the gateway in front of one. Both answers
must agree, but for the headers in HOP, which belong to the one connection or are the server's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

from runner import Pool
from tests.serving import Process
from tests.waiting import wait_until
from transport.httpx2 import Transport as Httpx2Transport
from transport.requests import Transport as RequestsTransport

HOP = {
    "connection",  # of the one connection (RFC 9110, 7.6.1)
    "keep-alive",
    "transfer-encoding",  # how that connection marks a body's end (RFC 9112, 7); a pipe has its own way
    "date",  # of the server, which a handler is not (RFC 9110, 6.6.1)
    "server",
}

HASHES = {"PYTHONHASHSEED": "0"}
"""Flask's Allow header comes out of a set, in the order of its hashes."""

GUNICORN = ["gunicorn", "--workers=1", "--threads=4", "--log-level=error", "--timeout=60"]
UVICORN = ["uvicorn", "--log-level=critical"]


@dataclass(frozen=True)
class App:
    """An app of the contract, and the server that it is held against."""

    spec: str
    server: tuple[str, ...]

    def __str__(self) -> str:
        return self.spec.rpartition(".")[2]


APPS = [
    App("tests.frameworks.flask_app:app", tuple(GUNICORN)),
    App("tests.frameworks.django_app:wsgi", tuple(GUNICORN)),
    App("tests.frameworks.django_app:asgi", tuple(UVICORN)),
    App("tests.frameworks.fastapi_app:app", tuple(UVICORN)),
]


Clients = tuple[Any, Any]
"""The stock client, and the same with our transport: two requests sessions, or two httpx2 clients."""


@pytest.fixture(scope="module", params=APPS, ids=str)
def app(request: pytest.FixtureRequest) -> App:
    found: App = request.param
    return found


@pytest.fixture(scope="module")
def url(app: App) -> Iterator[str]:
    """The base URL of the app behind its real server."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        fd = listener.fileno()
        bind = f"--bind=fd://{fd}" if app.server[0] == "gunicorn" else f"--fd={fd}"
        command = [sys.executable, "-m", *app.server, bind, app.spec]
        process = subprocess.Popen(command, pass_fds=[fd], env={**os.environ, **HASHES})
        try:
            base = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with requests.Session() as session:  # connections wait in the backlog until the server takes them
                assert session.get(f"{base}/hello", timeout=30).ok
            yield base
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            psutil.wait_procs(children, 30)


@pytest.fixture(scope="module", params=[1, 8], ids=["one job", "eight jobs"])
def concurrency(request: pytest.FixtureRequest) -> int:
    """How many jobs a worker runs at once."""
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def pool(app: App, url: str, concurrency: int) -> Iterator[Pool]:
    with Pool(app.spec, workers=1, concurrency=concurrency, env={**os.environ, **HASHES}) as pool:
        assert pool._supervisor is not None
        for worker in pool._supervisor._workers.values():
            for _ in range(concurrency - 1):
                worker.open_lane()  # now, and not in a test, after which no descriptor may be left
        yield pool


@pytest.fixture(scope="module")
def gateway(app: App, url: str, concurrency: int) -> Iterator[str]:
    """The base URL of the app behind the gateway."""
    options = "--workers=1", f"--concurrency={concurrency}", "--port=0", "--admin=none", "--no-access-log"
    with Process(app.spec, *options, env=HASHES) as served:
        yield served.url


class ToGateway(HTTPAdapter):
    """Sends what is meant for one server to another, which can't tell the difference."""

    def __init__(self, meant: str, gateway: str) -> None:
        super().__init__()
        self._meant, self._gateway = meant, gateway

    def send(self, request: requests.PreparedRequest, *args: Any, **settings: Any) -> requests.Response:
        url = request.url or ""
        sent = request.copy()
        sent.url = url.replace(self._meant, self._gateway, 1)
        sent.headers = CaseInsensitiveDict({"Host": urlsplit(url).netloc, **request.headers})
        response = super().send(sent, *args, **settings)
        response.url, response.request = url, request
        return response


@pytest.fixture(params=["requests", "httpx2", "gateway"])
def clients(request: pytest.FixtureRequest, url: str, pool: Pool, gateway: str) -> Iterator[Clients]:
    """The stock client, and the same with our transport."""
    with contextlib.ExitStack() as stack:
        if request.param == "requests":
            stock, ours = stack.enter_context(requests.Session()), stack.enter_context(requests.Session())
            ours.mount(url, RequestsTransport(pool))
            yield stock, ours
        elif request.param == "gateway":
            stock, ours = stack.enter_context(requests.Session()), stack.enter_context(requests.Session())
            ours.mount(url, ToGateway(url, gateway))
            yield stock, ours
        else:
            yield (
                stack.enter_context(httpx2.Client(trust_env=False, timeout=60)),
                stack.enter_context(httpx2.Client(transport=Httpx2Transport(pool), timeout=60)),
            )


def shown(response: Any) -> dict[str, Any]:
    """All of a response that both must agree on."""
    raw = getattr(response, "raw", None)
    dropped = HOP
    if response.status_code == 204:
        dropped = HOP | {
            "content-length"
        }  # uvicorn passes one on, which RFC 9110, 8.6 forbids; gunicorn and we drop it
    pairs = raw.headers.items() if raw is not None else response.headers.multi_items()
    return {
        "status": response.status_code,
        # Werkzeug has its own spelling, NOT FOUND, which gunicorn passes on; ours is the standard one for all (T11).
        "phrase": (response.reason if raw is not None else response.reason_phrase).upper(),
        "headers": sorted((name.lower(), value) for name, value in pairs if name.lower() not in dropped),
        "body": response.content,
    }


def agree(clients: Clients, method: str, url: str, **settings: Any) -> Any:
    """Send it both ways; the answer, where both agree."""
    answers = []
    for client in clients:
        own = {name: make() if callable(make) else make for name, make in settings.items()}
        answers.append(client.request(method, url, **own))
    server, ours = answers
    assert shown(ours) == shown(server)
    return ours


def body_name(clients: Clients) -> str:
    return "data" if isinstance(clients[0], requests.Session) else "content"


@pytest.mark.parametrize("path", ["/hello", "/stream", "/sse", "/file", "/cookies", "/empty/204", "/empty/304"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_plain_requests(clients: Clients, app: App, url: str, method: str, path: str) -> None:
    """H4, H5, H7: status, phrase, headers with their repeats, and body."""
    agree(clients, method, url + path)


@pytest.mark.parametrize(
    "target",
    [
        "/echo/a/b?x=1&x=2&y=",
        "/echo/caf%C3%A9/%2F/x%20y?q=%C3%A9%26",
        "/echo/%E2%82%AC;a=b?plus=a+b",
        "/echo/dots/a.b/...?",
        "/echo/trailing/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
def test_what_the_app_sees(clients: Clients, url: str, method: str, target: str) -> None:
    """H7: method, path, query, headers, its own URL, and body."""
    headers = {"X-One": "1", "X-Two": "a, b"}
    body = {} if method == "GET" else {body_name(clients): "bödy".encode()}
    answer = agree(clients, method, url + target, headers=headers, **body).json()
    assert answer["method"] == method
    assert answer["body"] == ("" if method == "GET" else "bödy")


def test_forms_and_files(clients: Clients, url: str) -> None:
    """H6: form fields, and a file of 5 MB in a multipart body."""
    agree(clients, "POST", f"{url}/form", data={"a": "1", "b": "é"})
    content = bytes(range(256)) * 20_000
    answer = agree(clients, "POST", f"{url}/upload", files=lambda: {"file": ("f.bin", io.BytesIO(content))})
    assert answer.json() == {"name": "f.bin", "sha256": hashlib.sha256(content).hexdigest()}


def test_an_upload_of_100_mb(clients: Clients, url: str, tmp_path: Path) -> None:
    """H6, T12: from a file, whose length is known, through the framework's own reading."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        for number in range(100):
            file.write(bytes([number]) * 1_000_000)
    with contextlib.ExitStack() as stack:
        answer = agree(
            clients, "POST", f"{url}/raw", **{body_name(clients): lambda: stack.enter_context(path.open("rb"))}
        )
    assert answer.json()["size"] == 100_000_000


def test_an_upload_of_unknown_length(clients: Clients, app: App, url: str) -> None:
    """H6: from a generator. Django's WSGI side reads no body that has no Content-Length, whatever the server."""

    def body() -> Iterator[bytes]:
        for number in range(100):
            yield bytes([number]) * 100_000

    answer = agree(clients, "POST", f"{url}/raw", **{body_name(clients): body})
    assert answer.json()["size"] == (0 if app.spec.endswith(":wsgi") else 10_000_000)


def test_redirects_and_cookies(clients: Clients, url: str) -> None:
    """R, X: followed or not, and cookies that go back with the next request."""
    for client in clients:
        name = "allow_redirects" if isinstance(client, requests.Session) else "follow_redirects"
        response = client.request("GET", f"{url}/redirect", **{name: True})
        assert (response.status_code, str(response.url)) == (200, f"{url}/hello")
        response = client.request("GET", f"{url}/redirect", **{name: False})
        assert (response.status_code, response.headers["location"]) == (302, "/hello")
    agree(clients, "GET", f"{url}/cookies")
    assert agree(clients, "GET", f"{url}/cookies").json() == {"a": "1", "b": "2"}


def test_errors(clients: Clients, url: str) -> None:
    """H4: what the framework itself says of a missing page, a wrong method, and an exception in a view."""
    assert agree(clients, "GET", f"{url}/missing").status_code == 404
    assert agree(clients, "GET", f"{url}/error").status_code == 500


def test_parts_and_conditions(clients: Clients, url: str) -> None:
    """H4: requests for a range of a file."""
    agree(clients, "GET", f"{url}/file", headers={"Range": "bytes=10-19"})


def test_background_tasks(clients: Clients, url: str, tmp_path: Path) -> None:
    """H3, H2: what the app does after its response is done, in both."""
    for number, client in enumerate(clients):
        note = tmp_path / str(number)
        assert client.request("GET", f"{url}/background?note={note}").json() == {"started": True}
        wait_until(lambda note=note: note.exists() and note.read_text() == "done")  # type: ignore[misc]


def test_streams_come_piece_by_piece(app: App, pool: Pool, url: str) -> None:
    """T10: each line of a framework's stream is there before the next one is written."""
    with requests.Session() as session:
        session.mount(url, RequestsTransport(pool))
        with session.get(f"{url}/ticks", stream=True) as response:
            lags = [time.monotonic() - float(line) for line in response.iter_lines()]
    assert len(lags) == 5
    assert max(lags) < 0.05


@pytest.mark.parametrize("path", ["/lifespan", "/in-a-thread"])
def test_what_only_asgi_has(start: Callable[..., Pool], path: str) -> None:
    """H3: lifespan state, and views that run in threads."""
    pool = start("tests.frameworks.fastapi_app:app", workers=1)
    with httpx2.Client(transport=Httpx2Transport(pool), base_url="http://app.local") as client:
        assert client.get(path).json() in ({"started": "by the lifespan"}, {"hello": "from a thread"})
