"""`blastdoor serve`, inside the test's own process in a thread, or as a process: real sockets, real workers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import uvicorn

from runner import Pool
from tests.waiting import wait_until
from transport.front.connection import Connection
from transport.gateway import Gateway
from transport.gateway.router import Router
from transport.serving.loops import loop_factory
from transport.serving.server import Service
from transport.serving.settings import Settings

ROOT = Path(__file__).parents[1]


class Served:
    """A service and its addresses. A context manager, which stops it."""

    def __init__(self, mounts: str | dict[str, Any] = "tests.handlers:app", **settings: Any) -> None:
        if isinstance(mounts, str):
            mounts = {"/": mounts}
        tables = {path: {"app": mount} if isinstance(mount, str) else mount for path, mount in mounts.items()}
        given = {"workers": 2, "port": 0, "admin": "127.0.0.1:0", "mounts": tables, **settings}
        self.service = Service(msgspec.convert(given, Settings))
        self._started = threading.Event()
        self._failure: BaseException | None = None
        make_loop = loop_factory(settings.get("loop", "asyncio")) or asyncio.new_event_loop
        self._loop = make_loop()
        self._thread = threading.Thread(target=self._run, name="served")
        self.address: tuple[str, int] = self.service.socket.getsockname()
        scheme = "https" if settings.get("tls_cert") else "http"
        self.url = f"{scheme}://127.0.0.1:{self.address[1]}" if isinstance(self.address, tuple) else ""
        self.admin = ""
        if self.service.admin_socket is not None:
            self.admin = f"http://127.0.0.1:{self.service.admin_socket.getsockname()[1]}"

    @property
    def gateway(self) -> Router:
        """What routes its requests."""
        return self.service.gateway

    @property
    def pool(self) -> Pool:
        """The pool of the only mount."""
        (pool,) = self.service.gateway.pools.values()
        assert isinstance(pool, Pool)
        return pool

    @property
    def connections(self) -> list[Connection]:
        """The connections of this moment."""
        front = self.service.front
        assert front is not None
        return list(front.connections)

    def reload(self) -> bool:
        """As SIGHUP; whether it succeeded."""
        return asyncio.run_coroutine_threadsafe(self.service.reload(), self._loop).result(60)

    def stop(self) -> None:
        """As SIGTERM, without waiting."""
        self._loop.call_soon_threadsafe(self.service.stop)

    def connect(self, timeout: float = 20) -> socket.socket:
        """A connection of a client's."""
        return socket.create_connection(self.address, timeout)

    def call(self, step: Callable[[], object]) -> None:
        """Have something done in the event loop."""
        self._loop.call_soon_threadsafe(step)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            try:
                self.stop()
            except RuntimeError:
                pass  # it has ended meanwhile
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None and error is None:
            raise self._failure

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self.service.run(self._started.set))
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()


class ServedByUvicorn:
    """The ASGI gateway of the same settings, under uvicorn in a thread: what a `Served` is to its clients."""

    def __init__(self, mounts: str | dict[str, Any] = "tests.handlers:app", **given: Any) -> None:
        if isinstance(mounts, str):
            mounts = {"/": mounts}
        tables = {path: {"app": mount} if isinstance(mount, str) else mount for path, mount in mounts.items()}
        settings = msgspec.convert({"workers": 2, "mounts": tables, **given}, Settings)
        self.gateway = Gateway(
            {path: mount.mount(path, settings.defaults) for path, mount in settings.all_mounts.items()},
            max_body=settings.max_body_bytes,
            body_timeout=settings.body_timeout,
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        config = uvicorn.Config(
            self.gateway, log_config=None, access_log=False, lifespan="on", ws="none", loop="asyncio"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="uvicorn")

    @property
    def pool(self) -> Pool:
        """The pool of the only mount."""
        (pool,) = self.gateway.pools.values()
        assert isinstance(pool, Pool)
        return pool

    def connect(self, timeout: float = 20) -> socket.socket:
        """A connection of a client's."""
        return socket.create_connection(self.address, timeout)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self.gateway.pools.values():
            pool.close(drain=0)
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.close()


def receive_all(client: socket.socket) -> bytes:
    """All that comes, to the end."""
    received = b""
    while data := client.recv(1 << 16):
        received += data
    return received


def receive_until(client: socket.socket, end: bytes) -> bytes:
    """What comes, up to and with `end`."""
    received = b""
    while end not in received:
        data = client.recv(1 << 16)
        assert data, f"the connection ended after {received!r}"
        received += data
    return received


class Process:
    """`blastdoor serve` as a process of its own, by its command. A context manager, which stops it by SIGTERM."""

    def __init__(self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self._arguments = arguments
        self._cwd, self._env = cwd or ROOT, env
        self.lines: list[str] = []
        self.url = self.admin = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "transport.cli", "serve", *self._arguments]
        # Sources that change twice in a second must not be taken for the bytecode of the first.
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(self._env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=self._cwd, env=env)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.wait_for("status at" if "--admin=none" not in self._arguments else "serving")
        self.url = self._address("serving")
        self.admin = self._address("status at").removesuffix("/-/status")
        return self

    def wait_for(self, words: str) -> str:
        """The first line of the log with these words."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines if words in line]
            assert found or self.process.poll() is None or self._reader.is_alive(), "".join(self.lines)
            return bool(found)

        wait_until(there)
        return found[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        self._reader.join(60)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _address(self, words: str) -> str:
        lines = [line for line in self.lines if words in line]
        if not lines:
            return ""
        line: str = json.loads(lines[0])["message"] if lines[0].startswith("{") else lines[0]
        return line.split()[-1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
