"""A handler that does honest work in a sandbox: numbers, files, a database, a TLS connection."""

from __future__ import annotations

import os
import sqlite3
import ssl
import tempfile
import threading
import urllib.request
import zoneinfo
from pathlib import Path

from runner import HandlerRequest, HandlerResponse


def app(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Call what the path names."""
    work = globals()["do_" + request.path[1:]]
    return str(work(**dict(pair.split("=", 1) for pair in request.query.split("&") if pair))).encode()


def do_numpy() -> float:
    import numpy

    return float((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum())


def do_sqlite() -> int:
    with sqlite3.connect(os.path.join(tempfile.gettempdir(), "work.db")) as database:
        database.execute("create table numbers (n integer)")
        database.executemany("insert into numbers values (?)", [(n,) for n in range(100)])
        total: int = database.execute("select sum(n) from numbers").fetchone()[0]
    database.close()
    return total


def do_files() -> int:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a", "b")
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x" * 1000)
        (path / "file").rename(path / "other")
        return (path / "other").stat().st_size


def do_threads() -> int:
    results: list[int] = []
    threads = [threading.Thread(target=results.append, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(results)


def do_zone() -> str:
    return str(zoneinfo.ZoneInfo("Europe/Berlin"))


def do_home() -> bool:
    return Path.home() == Path(tempfile.gettempdir()) == Path(os.environ["HOME"])


def do_environment() -> str:
    return ",".join(sorted(os.environ))


def do_tls(url: str, trust: str) -> str:
    context = ssl.create_default_context(cafile=trust)
    with urllib.request.urlopen(url, context=context, timeout=10) as answer:
        return str(answer.read().decode())


def do_write(path: str) -> int:
    return Path(path, "made").write_bytes(b"made")


def do_read(path: str) -> str:
    return Path(path).read_text()


def do_shell() -> str:
    import subprocess

    return subprocess.run(["/bin/sh", "-c", "echo $((6 * 7))"], capture_output=True, text=True, check=True).stdout


def do_crash() -> None:
    import ctypes

    ctypes.string_at(0)


def do_exit() -> None:
    os._exit(7)


def do_hang(here: str = "") -> None:
    print("hanging", flush=True)
    threading.Event().wait()
