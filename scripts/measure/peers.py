"""What blastdoor is held against: other ways to have 256 bytes answered, each in its natural set-up.

Each peer is a context manager that gives a function to call from any thread: it sends SMALL and checks the echo.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import loky
import multiprocess
import pebble
import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from runner import Pool, Request
from scripts.measure.figures import SMALL, URL, Floor, Nothing
from scripts.measure.handlers import identity, wsgi
from transport.httpx2 import Transport as Httpx2Transport
from transport.requests import Transport

Call = Callable[[], None]


def check(answer: bytes) -> None:
    assert answer == SMALL, answer[:100]


@contextmanager
def raw_pipes(workers: int) -> Iterator[Call]:
    with Floor() as floor:
        yield floor.ping


@contextmanager
def opened(workers: int) -> Iterator[Call]:
    with Pool("scripts.measure.handlers:handler", workers=workers, preload=True) as pool:

        def call() -> None:
            with pool.open(Request("POST", "/echo", body=SMALL)) as job:
                check(b"".join(job))

        yield call


class Sessions(threading.local):
    """A client for each thread, all of them closed at the end."""

    def __init__(self, make: Callable[[], Any], made: list[Any]) -> None:
        self.client = make()
        made.append(self.client)


@contextmanager
def posting(make: Callable[[], Any], url: str, body: str) -> Iterator[Call]:
    """Calls that post by a client of their thread's own."""
    made: list[Any] = []
    own = Sessions(make, made)

    def call() -> None:
        check(own.client.post(url, **{body: SMALL}).content)

    try:
        yield call
    finally:
        for client in made:
            client.close()


def session(prefix: str, adapter: BaseAdapter) -> Callable[[], requests.Session]:
    def make() -> requests.Session:
        made = requests.Session()
        made.mount(prefix, adapter)
        return made

    return make


@contextmanager
def through_requests(workers: int) -> Iterator[Call]:
    with (
        Pool("scripts.measure.handlers:handler", workers=workers, preload=True) as pool,
        posting(session(URL, Transport(pool)), f"{URL}/echo", "data") as call,
    ):
        yield call


@contextmanager
def through_httpx2(workers: int) -> Iterator[Call]:
    with (
        Pool("scripts.measure.handlers:handler", workers=workers, preload=True) as pool,
        posting(lambda: httpx2.Client(transport=Httpx2Transport(pool)), f"{URL}/echo", "content") as call,
    ):
        yield call


@contextmanager
def empty_adapter(workers: int) -> Iterator[Call]:
    with posting(session("http://nothing/", Nothing()), "http://nothing/echo", "data") as call:
        yield call


class InProcess(BaseAdapter):
    """Calls a WSGI app in this process, without isolation."""

    def send(self, request: requests.PreparedRequest, *args: object, **kwargs: object) -> requests.Response:
        response = requests.Response()

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            response.status_code = int(status.split()[0])
            response.headers.update(headers)

        body = request.body if isinstance(request.body, bytes) else b""
        environ = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "REQUEST_METHOD": "POST"}
        response._content = b"".join(wsgi(environ, start))
        response.request, response.url = request, request.url or ""
        return response

    def close(self) -> None:
        """Nothing to close."""


@contextmanager
def in_process(workers: int) -> Iterator[Call]:
    with posting(session("http://inside/", InProcess()), "http://inside/echo", "data") as call:
        yield call


class UnixConnection(HTTPConnection):
    """An HTTP connection over a unix socket."""

    path = ""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class UnixAdapter(HTTPAdapter):
    """Has requests go to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        connection = type("Connection", (UnixConnection,), {"path": path})
        self._own = HTTPConnectionPool("localhost", maxsize=64)
        self._own.ConnectionCls = connection

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        return self._own

    def close(self) -> None:
        self._own.close()


@contextmanager
def serving(command: list[str], ready: Callable[[], object]) -> Iterator[None]:
    """A server process, from its first answer on."""
    process = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                ready()
                break
            except Exception:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def gunicorn_sync(workers: int) -> Iterator[Call]:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = ["gunicorn", f"--workers={workers}", f"--bind=unix:{path}", "--log-level=error"]
        with (
            posting(session("http://unix/", UnixAdapter(path)), "http://unix/echo", "data") as call,
            serving([*command, "scripts.measure.handlers:wsgi"], call),
        ):
            yield call


@contextmanager
def gunicorn_threads(workers: int) -> Iterator[Call]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["gunicorn", f"--workers={workers}", "--threads=16", f"--bind=127.0.0.1:{port}", "--log-level=error"]
    with (
        posting(requests.Session, f"http://127.0.0.1:{port}/echo", "data") as call,
        serving([*command, "scripts.measure.handlers:wsgi"], call),
    ):
        yield call


@contextmanager
def uvicorn(workers: int) -> Iterator[Call]:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = ["uvicorn", f"--workers={workers}", f"--uds={path}", "--log-level=critical", "--no-access-log"]

        def make() -> httpx2.Client:
            return httpx2.Client(transport=httpx2.HTTPTransport(uds=path), trust_env=False, timeout=30)

        with (
            posting(make, "http://unix/echo", "content") as call,
            serving([*command, "scripts.measure.handlers:asgi"], call),
        ):
            yield call


@contextmanager
def executor(workers: int) -> Iterator[Call]:
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        yield lambda: check(pool.submit(identity, SMALL).result())


@contextmanager
def multiprocess_pool(workers: int) -> Iterator[Call]:
    with multiprocess.Pool(workers) as pool:
        yield lambda: check(pool.apply(identity, (SMALL,)))


@contextmanager
def pebble_pool(workers: int) -> Iterator[Call]:
    with pebble.ProcessPool(max_workers=workers) as pool:
        yield lambda: check(pool.schedule(identity, args=(SMALL,)).result())


@contextmanager
def loky_executor(workers: int) -> Iterator[Call]:
    pool = loky.ProcessPoolExecutor(max_workers=workers)
    try:
        yield lambda: check(pool.submit(identity, SMALL).result())
    finally:
        pool.shutdown(kill_workers=True)


PEERS: dict[str, Callable[[int], contextlib.AbstractContextManager[Call]]] = {
    "raw pipe ping-pong (the floor)": raw_pipes,
    "pool.open": opened,
    "requests, blastdoor": through_requests,
    "httpx2, blastdoor": through_httpx2,
    "requests, an adapter that does nothing": empty_adapter,
    "requests, WSGI app in the process": in_process,
    "requests, gunicorn sync, unix socket": gunicorn_sync,
    "requests, gunicorn threads, TCP": gunicorn_threads,
    "httpx2, uvicorn, unix socket": uvicorn,
    "ProcessPoolExecutor": executor,
    "multiprocess.Pool": multiprocess_pool,
    "pebble": pebble_pool,
    "loky": loky_executor,
}

UNISOLATED = {
    "raw pipe ping-pong (the floor)",
    "requests, an adapter that does nothing",
    "requests, WSGI app in the process",
}
"""What is no peer: a floor, or without a process of its own."""
