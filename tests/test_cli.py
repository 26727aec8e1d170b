"""The blastdoor command, as a user types it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving import Process, Served

ROOT = Path(__file__).parents[1]


def blastdoor(*arguments: str, stdin: bytes = b"", cwd: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    command = Path(sys.executable).with_name("blastdoor")
    return subprocess.run([command, *arguments], input=stdin, capture_output=True, cwd=cwd, timeout=60, check=False)


def test_version_and_help() -> None:
    """W2: the distribution installs its command."""
    assert blastdoor("--version").stdout.startswith(b"blastdoor 0.")
    assert b"call" in blastdoor("--help").stdout


def test_check() -> None:
    """F8: a handler that can be loaded is said to be; for one that can't, the worker's traceback is shown."""
    assert b"ready for requests" in blastdoor("check", "tests.handlers:app").stdout
    failed = blastdoor("check", "tests.bad_handlers.raises:app")
    assert failed.returncode == 1
    assert b"RuntimeError: the import went wrong" in failed.stderr
    assert blastdoor("check", "no sense").returncode == 2


def test_check_says_the_one_line_that_helps(tmp_path: Path) -> None:
    """F8: what is not there in one line; a failing import with the app's frames and none of ours; debug shows all."""
    for handler, words in (
        ("nosuch:app", b"there is no module 'nosuch'"),
        ("tests.handlers:nosuch", b"has no 'nosuch'"),
        ("nosuch", b"there is no module 'nosuch'"),
        ("tests.processes", b"has no app and no application"),
        ("tests.factories:create_app('x', 2, 3, 4)", b"can't be called with these arguments"),
        ("tests.factories:bare_factory", b"shop:create_app()"),
    ):
        done = blastdoor("check", handler)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
        assert len(done.stderr.splitlines()) <= 2, done.stderr  # one of the log, one of the command
        assert b"Traceback" not in done.stderr
    done = blastdoor("check", "tests.bad_handlers.raises:app")
    assert b"bad_handlers/raises.py" in done.stderr
    assert b"/runner/" not in done.stderr
    assert b"importlib" not in done.stderr
    assert b"/runner/" in blastdoor("check", "--debug", "tests.bad_handlers.raises:app").stderr
    assert b"/runner/" in blastdoor("check", "--debug", "nosuch:app").stderr


@pytest.mark.parametrize("command", ["call", "serve"])
def test_factories(command: str) -> None:
    """G11, W2: as gunicorn and uvicorn take them, with literal arguments; a module alone gets its app."""
    for arguments, body in (
        (["tests.factories:create_app('one', mark=['!'])"], b"one!"),
        (["tests.factories:Makers.nested()"], b"nested"),
        (["tests.factories:bare_factory", "--factory"], b"bare"),
        (["tests.factories", "--factory"], b"created by default"),
        (["tests.factories"], b"the application"),
    ):
        if command == "call":
            done = blastdoor("call", *arguments[:1], "GET", "/", *arguments[1:])
            assert done.stdout == body, done.stderr
            continue
        with Process(*arguments, "--port=0", "--workers=1", "--admin=none") as served:
            assert requests.get(served.url, timeout=20).content == body
    refused = blastdoor("check", "tests.factories:create_app(open('x'))")
    assert (refused.returncode, b"literals" in refused.stderr) == (2, True)


def test_a_log_of_objects() -> None:
    """G10: with --log-format json a record is a line, whatever its text holds, with all that it carries."""
    with Process("tests.handlers:app", "--port=0", "--workers=1", "--log-format=json", "--admin=none") as served:
        requests.get(f"{served.url}/raise", headers={"X-Request-ID": "r-1"}, timeout=20)
        served.wait_for("blastdoor.access")
    records = [json.loads(line) for line in served.lines]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, records))
    (access,) = [record for record in records if record["logger"] == "blastdoor.access"]
    assert (access["status"], access["method"], access["target"], access["request_id"]) == (500, "GET", "/raise", "r-1")
    (raised,) = [record for record in records if "Traceback" in record["message"]]
    assert raised["job_id"] == access["job_id"]
    assert raised["worker"] > 0


def test_call(tmp_path: Path) -> None:
    """H1: one round trip: head on stderr, body on stdout, request bodies from the line, a file, or stdin."""
    done = blastdoor("call", "tests.handlers:app", "POST", "/mirror", "-d", "from the line", "-H", "X-A: 1")
    assert (done.returncode, done.stdout) == (0, b"from the line")
    assert done.stderr.startswith(b"HTTP/1.1 200 OK")
    file = tmp_path / "body"
    file.write_bytes(b"from a file")
    assert blastdoor("call", "tests.handlers:app", "POST", "/mirror", "-d", f"@{file}").stdout == b"from a file"
    done = blastdoor("call", "tests.handlers:app", "POST", "/mirror", "-d", "@-", stdin=b"from stdin")
    assert done.stdout == b"from stdin"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["GET", "/die"], 1, b"SIGSEGV"),
        (["GET", "/raise"], 1, b"boom from the handler"),
        (["GET", "/never_read", "--timeout", "0.1"], 1, b"took longer"),
        (["GET", "no-path"], 2, b"begin with '/'"),
        (["GET", "/", "-H", "none"], 2, b"no colon"),
        (["GET", "/", "-d", "@/nowhere"], 2, b"can't be read"),
    ],
)
def test_faults_are_explained(arguments: list[str], code: int, words: bytes) -> None:
    """F1, F3: what went wrong, in words, and in the exit code."""
    done = blastdoor("call", "tests.handlers:app", *arguments)
    assert done.returncode == code
    assert words in done.stderr


def test_call_for_a_provider() -> None:
    """G11, T3, T4: with --provider the path is rewritten, and it acts for the key; without one it is refused."""
    done = blastdoor(
        "call", "tests.handlers:app", "GET", "/v1/echo", "--provider=openai", "--key=key-1", "--source=cli"
    )
    seen = json.loads(done.stdout)
    assert seen["target"] == "/api/v2/aibridge/openai/v1/echo"
    web = blastdoor("call", "tests.frameworks.flask_app:app", "GET", "/hello", "--provider=openai", "--key=key-1")
    assert web.stderr.startswith(b"HTTP/1.1 200"), web.stderr  # a web app lies under the mount
    assert seen["context"]["delegated_api_key_id"] == "key-1"
    assert (seen["context"]["provider"], seen["context"]["source"]) == ("openai", "cli")
    refused = blastdoor("call", "tests.handlers:app", "GET", "/v1/echo", "--provider=openai")
    assert (refused.returncode, b"--key" in refused.stderr) == (2, True)
    assert blastdoor("call", "tests.handlers:app", "GET", "/", "--key=key-1").returncode == 2
    assert blastdoor("call", "tests.handlers:app", "GET", "/", "--provider=a/b", "--key=k").returncode == 2


def test_call_in_a_sandbox_and_with_limits() -> None:
    """G11, S, F4: the pool's limits and its sandbox, from the command line."""
    done = blastdoor("call", "tests.handlers:app", "GET", "/hello", "--sandbox=default")
    assert done.stdout == b"hello", done.stderr
    done = blastdoor("call", "tests.handlers:app", "GET", "/heap?size=1000000000", "--memory=100MiB")
    assert (done.returncode, b"memory" in done.stderr) == (1, True)


def test_the_body_comes_as_it_is_written(tmp_path: Path) -> None:
    """G11, T10: a piece is on the terminal before the next one is written."""
    go = tmp_path / "go"
    target = f"/head_then_wait?go={go}"
    command = [str(Path(sys.executable).with_name("blastdoor")), "call", "tests.handlers:app", "GET", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == b"HTTP/1.1 202 Accepted\n"
        go.touch()
        assert process.stdout.read() == b"done"


def test_top() -> None:
    """G11, G9: a server's workers, requests and faults as a table; what can't be asked is told."""
    with Served(drain=0) as served:
        requests.get(f"{served.url}/raise", timeout=20)
        shown = blastdoor("top", served.admin, "--once").stdout.decode()
        pids = [str(worker.pid) for worker in served.pool.workers()]
        assert all(pid in shown for pid in pids)
        assert "ready" in shown
        assert "raised" in shown
    gone = blastdoor("top", served.admin, "--once")
    assert (gone.returncode, b"can't be asked" in gone.stderr) == (1, True)


def test_live_top() -> None:
    """G11: live it goes on by itself, until it is interrupted, which is no error."""
    with Served(drain=0) as served:
        asked = threading.Semaphore(0)
        tell = served.service.status.tell

        def count() -> dict[str, Any]:
            asked.release()
            return tell()

        served.service.status.tell = count  # type: ignore[method-assign]
        command = [str(Path(sys.executable).with_name("blastdoor")), "top", served.admin]
        terminal, screen = pty.openpty()
        with open(terminal, "rb"), subprocess.Popen(command, stdout=screen, cwd=ROOT) as process:
            os.close(screen)
            assert all(asked.acquire(timeout=20) for _ in range(3))
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0


def test_serve_refuses_early() -> None:
    """G11: what makes no sense is told in a line, with exit code 2; a handler that does not load, with 1."""
    for arguments, words in (
        (["serve", "tests.handlers:app", "--workers=x"], b"2:16"),
        (["serve", "tests.handlers:app", "--admin=x"], b"HOST:PORT"),
        (["serve", "--config=/nowhere"], b"/nowhere"),
        (["serve", "tests.handlers:app", "--sandbox=some"], b"strict"),
        (["serve", "tests.handlers:app", "--env=NOT_SET_ANYWHERE"], b"NOT_SET_ANYWHERE"),
        (["serve"], b"nothing to serve"),
    ):
        done = blastdoor(*arguments)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert b"Traceback" not in done.stderr
    done = blastdoor("serve", "tests.bad_handlers.raises:app", "--port=0", "--admin=none")
    assert (done.returncode, b"the import went wrong" in done.stderr) == (1, True)


def test_completion() -> None:
    """G11: the shell's completion is made by the command itself."""
    env = {**os.environ, "_BLASTDOOR_COMPLETE": "complete_bash", "COMP_WORDS": "blastdoor ser", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("blastdoor")
    done = subprocess.run([command], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["serve"]
    env |= {"COMP_WORDS": "blastdoor serve --sandbox st", "COMP_CWORD": "3"}
    done = subprocess.run([command], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["strict"]
