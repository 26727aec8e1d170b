"""What a hostile review has found: words of handlers and clients that reach logs, metrics and terminals, and bounds."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from runner import HandlerRaised, Pool, Request, Sandbox, StartError
from runner.platform import descriptors
from tests.serving import Served, receive_all, receive_until
from tests.waiting import wait_until
from transport import Route
from transport.cli.serve import _make_room
from transport.cli.top import render
from transport.requests import Transport
from transport.serving.server_log import LoopErrors
from transport.serving.status import Status, steady_time

ESCAPE = "\x1b]0;owned\x07"


def lines_of(log: pytest.LogCaptureFixture, name: str = "blastdoor") -> list[str]:
    """What a text log would hold: each record's message, line by line."""
    return [line for record in log.records if record.name == name for line in record.getMessage().split("\n")]


def nasty(request: Any, response: Any) -> None:
    name = 'Sec\x1b[2Jret"\nERROR forged'
    raise type(name, (Exception,), {})("first\nERROR forged line\x9b2J" + ESCAPE)


def test_what_a_handler_raises_is_cleaned(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """F1, W9: no control character, no line that looks like a record; clients are told no name of its choice."""
    pool = start(nasty, workers=1, kind="native")
    with pytest.raises(HandlerRaised) as caught:
        pool.open(Request("GET", "/"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", str(caught.value))
    with requests.Session() as session:
        session.mount("http://app/", Transport(pool))
        answer = session.get("http://app/")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "the handler raised an exception"
    assert "Sec" not in answer.text
    lines = lines_of(log)
    assert any("forged" in line for line in lines)
    for line in lines:
        assert "\x1b" not in line
        assert "\x9b" not in line
        assert "forged" not in line or line.startswith("    ")


def test_start_errors_are_cleaned(start: Callable[..., Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: a traceback from a start that fails is text, whatever the module says."""
    (tmp_path / "nasty_start.py").write_text(f"raise ValueError({ESCAPE!r} + 'x\\nERROR forged')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StartError) as caught:
        start("nasty_start:app", workers=1)
    assert "\x1b" not in str(caught.value)
    assert all(line.startswith("    ") for line in str(caught.value).split("\n") if "forged" in line)


def test_terminals(tmp_path: Path) -> None:
    """G10: `call` and `top` show what handlers have said, and none of it drives the terminal."""
    (tmp_path / "nasty_call.py").write_text(
        "def app(request, response):\n    response.headers['x-a'] = 'a\\x9b2J'\n    response.write_header(200)\n"
        "    raise type('N\\x1b[2J', (Exception,), {})('\\x1b[2J')"
    )
    command = [sys.executable, "-m", "transport.cli", "call", "nasty_call:app", "GET", "/"]
    env = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=env, check=False)
    assert b"x-a: a\\x9b2J" in done.stderr
    assert b"\x1b[2J" not in done.stderr
    fault = {"at": 0, "mount": "/", "outcome": "died\x1b[2J", "job_id": "1\n2", "detail": "a\x1b[2J\nb", "seconds": 0}
    fault["request"] = "GET /\x1b[2J"
    status: dict[str, Any] = {
        "now": 0, "uptime": 1, "ready": True, "draining": False, "reload_error": "", "active": 0,
        "latency": {"p50": 0, "p99": 0}, "history": [], "pools": {}, "faults": [fault],
    }  # fmt: skip
    from rich.console import Console

    console = Console(file=open(tmp_path / "out", "w"), width=200)  # noqa: SIM115
    console.print(render(status))
    console.file.close()
    shown = (tmp_path / "out").read_text()
    assert "\\x1b[2J" in shown
    assert "\x1b[2J" not in shown


def test_tracebacks_are_in_the_budget(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: a handler that raises and raises fills no disk, and what was dropped is said."""
    pool = start("tests.handlers:app", workers=1)
    log.clear()
    for _ in range(400):
        with pytest.raises(HandlerRaised):
            pool.open(Request("GET", "/raise_much"))
    assert sum(len(record.getMessage()) for record in log.records) < 2 << 20
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"
    pool.close()
    assert "over the budget were dropped" in log.text


def test_headers_with_underscores(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """H2, W9: one short line a request, the host's, so that the worker's share of the log is its own."""
    pool = start("tests.wsgi_apps:simple", workers=1)
    headers = [(f"x_{number}", "1") for number in range(5000)]
    with pool.open(Request("GET", "/", headers)) as job:
        b"".join(job)
    wait_until(lambda: "underscore" in log.text)
    assert not [line for line in lines_of(log, "blastdoor.worker") if "underscore" in line]
    lines = [line for line in lines_of(log) if "underscore" in line]
    assert len(lines) == 1
    assert "4997 more" in lines[0]
    assert len(lines[0]) < 300


@pytest.mark.parametrize(
    ("handler", "target", "length"),
    [
        ("tests.handlers:app", "/hello", "5"),
        ("tests.wsgi_apps:simple", "/", None),
        ("tests.async_handlers:app", "/hello", "5"),
    ],
)
def test_a_whole_body_has_a_length(start: Callable[..., Pool], handler: str, target: str, length: str | None) -> None:
    """H5: a list or bytes that are all of the body go with their Content-Length, but after HEAD; streams have none."""
    pool = start(handler, workers=1)
    with pool.open(Request("GET", target)) as job:
        body = b"".join(job)
        assert dict(job.head.headers)["content-length"] == (length or str(len(body)))
    with pool.open(Request("HEAD", target)) as job:
        assert "content-length" not in dict(job.head.headers)
    if handler == "tests.handlers:app":
        with pool.open(Request("GET", "/stream?count=2&pause=0")) as job:
            assert len(b"".join(job)) > 10
            assert "content-length" not in dict(job.head.headers)


def test_lengths_are_sent_once(start: Callable[..., Pool]) -> None:
    """H5: `5` and `05` are one length to us, and must not be two to whoever reads on."""
    pool = start("tests.handlers:app", workers=1)
    headers = b'[["content-length", "5"], ["Content-Length", "05"]]'
    with pool.open(Request("POST", "/headers?body=hello", body=headers)) as job:
        assert b"".join(job) == b"hello"
        assert [value for name, value in job.head.headers if name.lower() == "content-length"] == ["5"]


@pytest.mark.parametrize(
    "rest", ["/\\evil.com", "/\t/evil.com", "//evil.com", "/\\\\evil.com", "/ /evil.com", "/\t\\evil"]
)
def test_locations_stay_on_their_host(rest: str) -> None:
    """T8: what a browser takes for another host's URL is none."""
    route = Route("openai")
    ((_, value),) = route.restore_locations([("Location", route.mount + rest)], "http", "app")
    assert re.match(r"/[^/\\\s]", value)


# -- the server ------------------------------------------------------------------------------------------


def exchange(served: Served, request: bytes) -> bytes:
    with served.connect() as client:
        client.sendall(request)
        return receive_all(client)


def test_a_target_in_absolute_form() -> None:
    """G1: its host counts, and the Host header does not (RFC 9112, 3.2.2)."""
    with Served(drain=0, admin="none") as served:
        answer = exchange(served, b"GET http://right:81/echo HTTP/1.1\r\nHost: wrong\r\nConnection: close\r\n\r\n")
    assert b"right:81" in answer
    assert b"wrong" not in answer


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip", b"chunked, chunked", b"identity"])
def test_transfer_codings_that_are_not_known(coding: bytes) -> None:
    """G7: refused, and what follows is not taken for a request (RFC 9112, 6.1)."""
    request = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + coding + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    with Served(drain=0, admin="none") as served:
        answer = exchange(served, request)
    assert answer.startswith((b"HTTP/1.1 501 ", b"HTTP/1.1 400 "))
    assert answer.count(b"HTTP/1.1 ") == 1


def test_the_admin_address_is_bounded() -> None:
    """G7, G10: neither an endless head nor many connections cost the server."""
    with Served(drain=0) as served:
        host, port = served.admin.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as client:
            client.sendall(b"GET /-/healthz HTTP/1.1\r\nHost: localhost\r\n")
            try:
                for _ in range(200):
                    client.sendall(b"X-Fill: " + b"x" * 1000 + b"\r\n")
                answer = receive_until(client, b"\r\n\r\n")
            except ConnectionError:
                answer = b"HTTP/1.1 431 "
            assert answer.startswith(b"HTTP/1.1 431 ")
        clients = [socket.create_connection((host, int(port)), 20) for _ in range(60)]
        try:
            clients[-1].sendall(b"GET /-/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert receive_all(clients[-1]).startswith(b"HTTP/1.1 503 ")
        finally:
            for client in clients:
                client.close()
        wait_until(lambda: requests.get(f"{served.admin}/-/healthz", timeout=10).status_code == 200)


def test_statuses_make_no_labels() -> None:
    """G9: what a handler answers is counted by what HTTP knows, else by its class."""
    with Served(drain=0) as served, requests.Session() as session:
        session.trust_env = False
        for status in (200, 299, 298, 297, 404, 455, 456, 599, 598):
            session.get(f"{served.url}/status?status={status}", timeout=20)
        text = session.get(f"{served.admin}/-/metrics", timeout=20).text
    labels = set(re.findall(r'http_response_status_code="([^"]*)"', text))
    assert labels == {"200", "404", "2xx", "4xx", "5xx"}


def test_a_wall_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: the page's time goes on evenly."""
    before = steady_time()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert steady_time() >= before
    assert Status.__init__.__defaults__ == (steady_time, None)


def test_few_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """G7: as many connections as the hard limit has descriptors for, and a word about it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.WARNING):
        assert _make_room(hard) < hard // 2 or hard == resource.RLIM_INFINITY
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    descriptors.release("connections")
    assert "are too few" in caplog.text


# -- the sandbox -----------------------------------------------------------------------------------------


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    place = tmp_path / "srv"
    for name in ("tenant_a", "tenant_b"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text("")
        (place / name / "config.py").write_text(f"SECRET = '{name}'")
    (place / ".env").write_text("KEY=secret")
    (place / "tenant_a" / "web.py").write_text(
        "import os\n"
        "from tenant_a import config\n"
        "def app(request, response):\n"
        "    from importlib import import_module\n"
        "    what = request.query\n"
        "    try:\n"
        "        if what == 'own': return config.SECRET.encode()\n"
        "        if what == 'import': return import_module('tenant_b.config').SECRET.encode()\n"
        "        if what == 'list': return repr(os.listdir(os.path.dirname(os.path.dirname(__file__)))).encode()\n"
        "        return open(os.path.join(os.path.dirname(os.path.dirname(__file__)), what)).read().encode()\n"
        "    except (OSError, ImportError) as error:\n"
        "        return f'denied: {error}'.encode()\n"
    )
    for place_above in (tmp_path, place, *place.iterdir()):
        if place_above.is_dir():
            place_above.chmod(0o755)
    return place


@pytest.mark.parametrize("make", [Sandbox.default, Sandbox.strict], ids=["default", "strict"])
def test_a_package_s_neighbors(start: Callable[..., Pool], tenants: Path, make: Callable[..., Sandbox]) -> None:
    """S: a handler's package is its to read; what lies beside it is not, by name, by list or by import."""
    pool = start("tenant_a.web:app", workers=1, sandbox=make(path=[tenants]))

    def get(what: str) -> str:
        with pool.open(Request("GET", f"/?{what}")) as job:
            return b"".join(job).decode()

    assert get("own") == "tenant_a"
    for what in ("tenant_b/config.py", ".env", "list", "import"):
        assert get(what).startswith("denied: "), what
    assert "tenant_b" in get("import")  # by name: it is not granted, or, below a hidden /tmp, not even there


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's workers are of that user")
def test_a_package_in_a_directory_that_is_closed(
    start: Callable[..., Pool], tenants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S: root's own directory, the working one too, may be closed: the package in it is granted all the same."""
    monkeypatch.chdir(tenants)
    tenants.chmod(0o700)
    pool = start("tenant_a.web:app", workers=1, sandbox=Sandbox.default())
    with pool.open(Request("GET", "/?own")) as job:
        assert b"".join(job) == b"tenant_a"
    with pool.open(Request("GET", "/?.env")) as job:
        assert b"".join(job).startswith(b"denied")


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's workers are of that user")
@pytest.mark.parametrize("closed", ["tenant_a", "tenant_a/__init__.py"])
def test_code_that_is_closed(tenants: Path, closed: str) -> None:
    """S, F8: code that the workers' own users can't read is told of as the pool starts, with the way out."""
    (tenants / closed).chmod(0o700 if "." not in closed else 0o600)
    with (
        pytest.raises(StartError, match=f"{closed}' is closed, where the handler's module lies: open it"),
        Pool("tenant_a.web:app", workers=1, sandbox=Sandbox.default(path=[tenants])),
    ):
        pass


def test_a_neighbor_that_is_granted(start: Callable[..., Pool], tenants: Path) -> None:
    """S: what is named is found, beside the app or not."""
    sandbox = Sandbox.default(path=[tenants], readable=[tenants / "tenant_b"])
    pool = start("tenant_a.web:app", workers=1, sandbox=sandbox)
    with pool.open(Request("GET", "/?import")) as job:
        assert b"".join(job) == b"tenant_b"
    with pool.open(Request("GET", "/?.env")) as job:
        assert b"".join(job).startswith(b"denied")


def test_a_module_s_folder(start: Callable[..., Pool], tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """S: a single module's folder is granted whole, and the log says what else lies there."""
    tmp_path.chmod(0o755)
    (tmp_path / "lonely.py").write_text("def app(request, response): return b'here'")
    (tmp_path / ".env").write_text("KEY=secret")
    pool = start("lonely:app", workers=1, sandbox=Sandbox.default(path=[tmp_path]))
    with pool.open(Request("GET", "/")) as job:
        assert b"".join(job) == b"here"
    (note,) = [record for record in log.records if "in which its module lies" in record.getMessage()]
    assert note.levelno == logging.WARNING
    assert ".env" in note.getMessage()


def test_background_work_in_a_sandbox_ends(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """S, H3: what goes on after its response does not hold its worker for ever."""
    pool = start("tests.asgi_apps:endless_background", workers=2, sandbox=Sandbox.default(background_seconds=0.3))
    for _ in range(6):
        with pool.open(Request("GET", "/"), lease_timeout=20) as job:
            assert b"".join(job) == b"done"
    wait_until(lambda: "in its background work the job went on for 0.3 s" in log.text)


def test_out_of_descriptors(tmp_path: Path) -> None:
    """X, F7: a task's first call, when no descriptor is left to import what it needs, hears so in the pool's words."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, os\n"
        "from runner import Pool, Request, WorkersUnavailable\n"
        "async def main(pool):\n"
        "    held = []\n"
        "    try:\n"
        "        while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "    except OSError: pass\n"
        "    try:\n"
        "        await pool.aopen(Request('GET', '/hello'))\n"
        "    except WorkersUnavailable as error: print('told', 'descriptor' in str(error))\n"
        "    for fd in held: os.close(fd)\n"
        "    async with await pool.aopen(Request('GET', '/hello')) as job:\n"
        "        print(await job.read())\n"
        "with Pool('tests.handlers:app', workers=1) as pool: asyncio.run(main(pool))\n"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    limit = f"ulimit -n 64; exec {sys.executable} {program}"
    done = subprocess.run(["bash", "-c", limit], capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.stdout.split("\n")[:2] == ["told True", "b'hello'"], done.stderr


def test_errors_of_the_loop_are_told_at_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    """G7: a listener that is out of descriptors has one line a second, not thousands."""
    tell = LoopErrors()
    loop = asyncio.new_event_loop()
    try:
        with caplog.at_level(logging.ERROR):
            for _ in range(5000):
                tell(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    finally:
        loop.close()
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is None
