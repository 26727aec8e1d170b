"""The plug-in for pytest, as a session of its own has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.serving import ROOT

SHOP = """
import os, signal, threading, time

state = []

def app(request, response):
    if request.path == "/crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request.path == "/crash_later":
        threading.Timer(0.05, os.abort).start()
    if request.path == "/raise":
        raise ValueError("boom")
    state.append(1)
    return f"{os.getpid()} {len(state)}".encode()
"""


class Session:
    """What a run of pytest has said: the outcomes by test, and all of its words."""

    def __init__(self, directory: Path, tests: str, *options: str) -> None:
        (directory / "shop.py").write_text(SHOP)
        (directory / "test_shop.py").write_text(tests)
        (directory / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = error\n")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-rA", "--tb=short", "--strict-markers", "-W", "error", *options]
        done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=120, check=False)
        self.status, self.text = done.returncode, done.stdout + done.stderr
        self.outcomes = {
            words[1].rpartition("::")[2]: words[0]
            for line in self.text.partition("short test summary info")[2].splitlines()
            if len(words := line.split()) > 1 and "::" in words[1]
        }


def test_an_app_in_a_session(tmp_path: Path) -> None:
    """G10, W11: pools last as long as the session, the same for the same arguments; nothing is left of them."""
    session = Session(
        tmp_path,
        """
import pytest

def test_one(blastdoor_client):
    client = blastdoor_client("shop:app")
    assert client.get("/").text.split()[1] == "1"
    assert client.post("/x", data=b"y").text.split()[1] == "2"

def test_two(blastdoor_client, blastdoor_pool):
    assert blastdoor_client("shop:app").get("/").text.split()[1] == "3"
    assert blastdoor_client("shop:app", fresh=True).get("/").text.split()[1] == "1"
    assert blastdoor_pool("shop:app") is blastdoor_pool("shop:app")
    assert blastdoor_pool("shop:app") is not blastdoor_pool("shop:app", workers=2)
    with blastdoor_pool("shop:app", workers=2) as pool:
        pass
    assert blastdoor_pool("shop:app", workers=2) is not pool
    for worker in blastdoor_pool("shop:app").workers():
        print("worker", worker.pid)

def test_an_error_is_an_answer(blastdoor_client):
    assert blastdoor_client("shop:app").get("/raise").status_code == 500

@pytest.fixture(scope="session")
def wide(blastdoor_client):
    return blastdoor_client("shop:app")

def test_of_a_wide_fixture(wide):
    assert wide.get("/").status_code == 200
""",
    )
    assert session.status == 0, session.text
    assert set(session.outcomes.values()) == {"PASSED"}
    pids = [int(line.split()[1]) for line in session.text.splitlines() if line.startswith("worker ")]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_deaths_fail_tests(tmp_path: Path) -> None:
    """G10, F1: with the worker's stack; not where that is expected; told also where the test fails by itself."""
    session = Session(
        tmp_path,
        """
import pytest

def test_crash(blastdoor_client):
    assert blastdoor_client("shop:app").get("/crash").status_code == 500

def test_next(blastdoor_client):
    assert blastdoor_client("shop:app").get("/").status_code == 200

@pytest.mark.blastdoor_deaths
def test_expected(blastdoor_client):
    assert blastdoor_client("shop:app").get("/crash").json()["signal"] == "SIGSEGV"

def test_both(blastdoor_client):
    assert blastdoor_client("shop:app").get("/crash").status_code == 200

def test_after_all(blastdoor_client):
    assert blastdoor_client("shop:app").get("/").status_code == 200
""",
    )
    assert session.outcomes == {
        "test_crash": "FAILED",
        "test_next": "PASSED",
        "test_expected": "PASSED",
        "test_both": "FAILED",
        "test_after_all": "PASSED",
    }, session.text
    failed = session.text.partition("test_crash")[2].partition("test_both")[0]
    for words in ("died at GET /crash", "SIGSEGV", 'shop.py", line 8 in app'):
        assert words in failed, session.text
    assert "assert 500 == 200" in session.text
    assert session.text.count('shop.py", line 8 in app') >= 2


@pytest.mark.parametrize("last", [True, False])
def test_a_death_between_tests(tmp_path: Path, last: bool) -> None:
    """G10: what dies after its answer is told with the next test, or after the last one."""
    session = Session(
        tmp_path,
        f"""
import time

def test_one(blastdoor_client):
    assert blastdoor_client("shop:app").get("/crash_later").status_code == 200

def teardown_function(function):
    time.sleep(1)

if not {last}:
    def test_two():
        pass
""",
    )
    assert session.status == 1, session.text
    assert ("after the last test" in session.text) is last
    assert ("before this test" in session.text) is not last
    assert "SIGABRT" in session.text
    assert session.outcomes.get("test_two") == (None if last else "FAILED")


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    """G10: neither pools nor clients are loaded with the plug-in."""
    session = Session(
        tmp_path,
        """
import sys

def test_nothing():
    assert "transport.pytest_plugin" in sys.modules
    assert not {"runner.pool", "requests", "transport.requests"} & set(sys.modules)
""",
    )
    assert session.status == 0, session.text


def test_it_is_found_by_itself(tmp_path: Path) -> None:
    """G10: an entry point names it."""
    command = [sys.executable, "-m", "pytest", "--fixtures", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "blastdoor_pool" in done.stdout
