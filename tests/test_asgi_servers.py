"""The gateway under ASGI servers of other kinds than the one that `blastdoor serve` runs."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.serving import receive_until

ROOT = Path(__file__).parents[1]

SERVERS = {
    "uvicorn-h11": ["uvicorn", "--http=h11", "--log-level=critical", "--fd={fd}"],
    "uvicorn-httptools": ["uvicorn", "--http=httptools", "--log-level=critical", "--fd={fd}"],
    "hypercorn-asyncio": ["hypercorn", "--log-level=critical", "--bind=fd://{fd}"],
    "hypercorn-trio": ["hypercorn", "--worker-class=trio", "--log-level=critical", "--bind=fd://{fd}"],
}


@pytest.fixture(params=SERVERS)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        name, *options = (part.format(fd=fd) for part in SERVERS[request.param])
        command = [sys.executable, "-m", name, *options, "tests.served_gateway:gateway"]
        process = subprocess.Popen(command, pass_fds=[fd], cwd=ROOT)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait(30)


def test_what_goes_through(url: str) -> None:
    """G12: requests, bodies both ways, faults, a body that is cut off, a client that leaves."""
    with httpx2.Client(base_url=url, timeout=30) as client:
        assert client.get("/hello").text == "hello"
        body = bytes(range(256)) * 4000
        assert client.post("/echo_body", content=body).content == body
        assert client.post("/echo_body", content=iter([body, body])).content == body + body
        seen = client.get("/a%2Fb/echo?x=%20").json()
        assert seen["target"] == "/a%2Fb/echo?x=%20"
        assert client.head("/hello").content == b""
        response = client.get("/die")
        assert (response.status_code, response.json()["signal"]) == (500, "SIGSEGV")
        with pytest.raises(httpx2.RemoteProtocolError):
            client.get("/die?late=1")
        host, port = url.removeprefix("http://").split(":")
        for headers in (b"", b"Expect: 100-continue\r\n"):
            with socket.create_connection((host, int(port)), 20) as leaver:
                leaver.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
                receive_until(leaver, b"xxxx")
            assert client.get("/hello").text == "hello"  # by the one worker there is


@pytest.mark.parametrize("url", ["hypercorn-asyncio", "hypercorn-trio"], indirect=True)
def test_http_2(url: str) -> None:
    """G12: HTTP/2 without a Content-Length: the body is still the handler's."""
    pytest.importorskip("h2")
    with httpx2.Client(base_url=url, timeout=30, http1=False, http2=True) as client:
        assert client.get("/hello").text == "hello"
        assert client.post("/echo_body", content=iter([b"a", b"b"])).content == b"ab"
