"""The blastdoor command, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blastdoor(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = Path(sys.executable).with_name("blastdoor")
    return subprocess.run([command, *arguments], input=stdin, capture_output=True, cwd=ROOT, timeout=60, check=False)


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
    assert blastdoor("check", "nonsense").returncode == 2


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
        (["GET", "/never_read", "--timeout", "0.1"], 1, b"no progress"),
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
