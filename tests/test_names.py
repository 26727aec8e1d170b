"""Apps with modules of our packages' names: neither hides the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import AbortHandler, BodyIncomplete, HandlerAborted, Pool, Request
from tests.serving import ROOT
from tests.test_pool import get

APP = """
import runner
from runner import NAME
from transport.words import WORD

def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [f"{NAME} {WORD}".encode()]

async def native(request, response):
    return f"{NAME} {WORD}".encode()
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The directory of an app with a module `runner`, and a package `transport` without an `__init__.py`."""
    (tmp_path / "runner.py").write_text("NAME = 'its runner'\n")
    (tmp_path / "transport").mkdir()
    (tmp_path / "transport" / "words.py").write_text("WORD = 'and its transport'\n")
    (tmp_path / "shop.py").write_text(APP)
    tmp_path.chmod(0o755)  # a sandboxed worker is a user of its own
    return tmp_path


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize(
    ("handler", "sandbox", "preload"),
    [
        ("shop:wsgi", "none", False),
        ("shop:native", "none", True),
        ("shop:wsgi", "default", False),
        ("shop:native", "strict", False),
    ],
)
def test_the_command_serves_an_app_with_a_runner_of_its_own(
    shop: Path, package: bool, handler: str, sandbox: str, preload: bool
) -> None:
    """N3: be they modules, packages, or directories without an __init__.py; in zygote, workers and the command."""
    if package:
        (shop / "runner.py").unlink()
        (shop / "runner").mkdir()
        (shop / "runner" / "name.py").write_text("NAME = 'its runner'\n")
        (shop / "shop.py").write_text(APP.replace("from runner import", "from runner.name import"))
    if preload:
        script = (
            f"from runner import Pool, Request\nwith Pool({handler!r}, preload=True, path=['.'], workers=1) as pool:\n"
        )
        script += "    with pool.open(Request('GET', '/')) as job:\n        print(b''.join(job).decode())\n"
        command = [sys.executable, "-P", "-c", script]
    else:
        command = [sys.executable, "-m", "transport.cli", "call", handler, "GET", "/", f"--sandbox={sandbox}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=shop, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "its runner and its transport", done.stderr


def test_the_command_with_the_app_on_its_path(shop: Path) -> None:
    """N3: PYTHONPATH names the app's directory: the command's own process still has its own modules."""
    (shop / "transport" / "words.py").unlink()
    (shop / "transport").rmdir()
    (shop / "shop.py").write_text("from runner import NAME\ndef app(request, response):\n    return NAME.encode()\n")
    env = {**os.environ, "PYTHONPATH": f"{shop}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "transport.cli", "call", "shop:app", "GET", "/"]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "its runner", done.stderr


def test_a_program_with_a_runner_of_its_own_is_told(shop: Path) -> None:
    """N3: in somebody's own process his module hides ours; the error says so."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "import transport.requests"],
        cwd=shop,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"'runner' is hidden by {shop}/runner.py" in done.stderr.splitlines()[-1]


def test_handlers_have_our_one_class(start: Callable[..., Pool], tmp_path: Path) -> None:
    """N3: where the app has no such module, `from runner import AbortHandler` gives the class that the worker knows."""
    (tmp_path / "aborts.py").write_text(
        "from runner import AbortHandler\n"
        "def app(request, response):\n    response.write(b'begun')\n    raise AbortHandler\n"
    )
    pool = start("aborts:app", path=[tmp_path])
    with pytest.raises((HandlerAborted, BodyIncomplete)), pool.open(Request("GET", "/")) as job:
        list(job)
    assert AbortHandler.__module__ == "runner.errors"


def test_the_working_directory_is_looked_in(
    start: Callable[..., Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N3, W2: after all of `sys.path`, which does not name it under `python /elsewhere/script.py`."""
    (tmp_path / "only_in_cwd.py").write_text("def app(request, response):\n    return b'here'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert get(start("only_in_cwd:app"), "/") == b"here"
