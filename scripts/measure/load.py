"""`scripts/load`: what servers cost and do under load, the same apps behind each, all of it in one run, in turns.

- Requests a second, p99 and processor time of a request by role (wrk), healthy and with one request in a hundred that
  segfaults. A healthy request counts as lost where it was sent and got no 200, but for those that were still under way
  at the end. The processor time is that of all processes of a server; "front" are those that do not run the app.
- A thousand idle keep-alive connections: memory for each.
- 200 and 1,000 slow streams (SSE, 20 tokens a second each): processor time for each token, and which came late; and
  what a segfault in the midst of them does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table

FLASK: Final = "scripts.measure.served_flask:app"
FASTAPI: Final = "scripts.measure.served_fastapi:app"
SCRIPT: Final = Path(__file__).with_name("load.lua")
NGINX: Final = """
daemon off; worker_processes 1; error_log /dev/null crit; pid {directory}/nginx.pid;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  upstream app {{ server unix:{directory}/app.sock fail_timeout=0; keepalive 16; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048; keepalive_requests 1000000;
    location / {{
      proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
    }}
  }}
}}
"""

WORKERS: Final = ("blastdoor: worker", "gunicorn: worker", "uWSGI worker")
"""How the titles of processes that run the app begin."""

Result = dict[str, float]


@dataclass
class Server:
    """A server: its commands, with {port} and {directory} to be filled in, and what has to be there for it."""

    commands: list[list[str]]
    needs: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        """Whether it can be started here."""
        return all(map(_program, self.needs))


def _program(name: str) -> str | None:
    """A program, of this environment or of the machine."""
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def ours(app: str, workers: str, *options: str) -> Server:
    quiet = ("--admin=none", "--no-access-log", "--log-level=error")
    return Server([python("transport.cli", "serve", "--port={port}", *quiet, f"--workers={workers}", *options, app)])


def flask_servers(workers: int) -> dict[str, Server]:
    many = f"--workers={workers}"
    gunicorn = ("gunicorn", "--log-level=critical", many)
    uwsgi = ["--http=127.0.0.1:{port}", "--http-keepalive", "--master", f"--processes={workers}"]
    uwsgi += ["--need-app", "--die-on-term", "--disable-logging", "--auto-procname", f"--module={FLASK}"]
    return {
        "blastdoor serve": ours(FLASK, str(workers)),
        "the same, preloaded": ours(FLASK, str(workers), "--preload=scripts.measure.served_flask"),
        "blastdoor serve, 2 fronts": ours(FLASK, str(workers), "--fronts=2"),
        "gunicorn, sync": Server([python(*gunicorn, "--bind=127.0.0.1:{port}", FLASK)]),
        "gunicorn, 8 threads": Server([python(*gunicorn, "--bind=127.0.0.1:{port}", "--threads=8", FLASK)]),
        "nginx, gunicorn sync": Server(
            [
                python(*gunicorn, "--bind=unix:{directory}/app.sock", FLASK),
                ["nginx", "-c", "{directory}/nginx.conf", "-p", "{directory}"],
            ],
            ("nginx",),
            {"nginx.conf": NGINX},
        ),
        "uWSGI, its router": Server([["uwsgi", *uwsgi]], ("uwsgi",)),
    }


def fastapi_servers(workers: int) -> dict[str, Server]:
    uvicorn = ("uvicorn", "--port={port}", "--log-level=critical", "--no-access-log")
    return {
        "blastdoor serve": ours(FASTAPI, str(workers)),
        "the same, preloaded": ours(FASTAPI, str(workers), "--preload=scripts.measure.served_fastapi"),
        "uvicorn": Server([python(*uvicorn, f"--workers={workers}", FASTAPI)]),
        "uvicorn, 1 process": Server([python(*uvicorn, FASTAPI)]),
    }


@contextlib.contextmanager
def running(server: Server) -> Iterator[tuple[int, list[psutil.Process]]]:
    """A server; gives its port and its processes once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # for nginx's workers
        for name, content in server.files.items():
            (Path(directory) / name).write_text(content.format(port=port, directory=directory))
        processes = []
        for command in server.commands:
            program, *rest = (part.format(port=port, directory=directory) for part in command)
            started = subprocess.Popen(
                [_program(program) or program, *rest], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            processes.append(started)
        try:
            deadline = time.monotonic() + 60
            while not _answers(port):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{server.commands[0]} does not answer")
                time.sleep(0.05)
            time.sleep(1)  # all of its workers
            yield port, [one for process in processes for one in _family(process.pid)]
        finally:
            children = [child for process in processes for child in _family(process.pid)[1:]]
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:  # uWSGI, after many segfaults
                    process.kill()
                    process.wait(10)
            for child in psutil.wait_procs(children, 5)[1]:
                child.kill()


def _family(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in client.recv(1000)
    return False


def seconds_by_role(processes: Sequence[psutil.Process]) -> dict[str, float]:
    """Processor time so far: of those that run the app, and of those in front."""
    used = {"front": 0.0, "workers": 0.0}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used["workers" if _runs_app(process, processes) else "front"] += times.user + times.system
    return used


def _runs_app(process: psutil.Process, processes: Sequence[psutil.Process]) -> bool:
    title = " ".join(process.cmdline())
    return len(processes) == 1 or title.startswith(WORKERS) or "spawn_main" in title  # a single one is all in one


def memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes of all of them: their own, and their parts of what they share (PSS)."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def load(port: int, seconds: float, connections: int, every: int) -> Result:
    """One run of wrk."""
    done = subprocess.run(
        [
            "wrk",
            "--threads=1",
            f"--connections={connections}",
            f"--duration={seconds:g}s",
            f"--script={SCRIPT}",
            f"http://127.0.0.1:{port}/",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BLAST_EVERY": str(every)},
    )
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    result["rate"] = result["ok"] / result["seconds"]
    healthy = result["sent"] - result["fatal"] - 1  # wrk asks for one before it begins, to look at it
    result["lost"] = max(healthy - result["ok"] - connections, 0)
    result["healthy"] = healthy
    return result


def measured_load(server: Server, seconds: float, connections: int, every: int) -> Result:
    """One run of wrk, with the processor time that each request took of its server."""
    with running(server) as (port, processes):
        load(port, 1, connections, 0)  # it is warm then
        before = seconds_by_role(processes)
        result = load(port, seconds, connections, every)
        after = seconds_by_role(processes)
    for role, used in after.items():
        result[role] = (used - before[role]) / max(result["ok"], 1) * 1e6
    result["whole"] = result["front"] + result["workers"]
    return result


async def idle_connections(port: int, number: int) -> list[asyncio.StreamWriter]:
    """So many keep-alive connections, each of which has had one answer."""
    writers = []
    for _ in range(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head:
            raise RuntimeError(f"a connection was not served: {head[:100]!r}")
        writers.append(writer)
    return writers


async def measured_idle(server: Server, number: int) -> Result:
    """What idle connections take of memory."""
    with running(server) as (port, processes):
        load(port, 1, 16, 0)
        before = memory(processes)
        writers = await idle_connections(port, number)
        after = memory(processes)
        for writer in writers:
            writer.close()
    return {"each": (after - before) / number}


class Stream(asyncio.Protocol):
    """A client of one stream: how many tokens came, how late the last of each piece was, and how it ended."""

    def __init__(self, tokens: int, late: list[float], over: asyncio.Future[None]) -> None:
        self.came = 0
        self.whole = False
        self._late = late
        self._over = over
        self._request = b"GET /stream?tokens=%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % tokens

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if some := data.count(b"data: "):
            self.came += some
            time_of_last = data[data.rindex(b"data: ") + 6 :].partition(b"\n")[0]
            with contextlib.suppress(ValueError):  # it was cut in two
                self._late.append(time.time() - float(time_of_last))
        self.whole = data.endswith(b"0\r\n\r\n")

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(None)


async def streams(port: int, number: int, tokens: int, late: list[float]) -> list[Stream]:
    """So many streams at once, each to its end."""
    loop = asyncio.get_running_loop()
    ends = [loop.create_future() for _ in range(number)]
    clients = []
    for end in ends:
        _, client = await loop.create_connection(partial(Stream, tokens, late, end), "127.0.0.1", port)
        clients.append(client)
    await asyncio.gather(*ends)
    return clients


async def measured_streams(server: Server, number: int, tokens: int) -> Result:
    """So many streams at once."""
    with running(server) as (port, processes):
        late: list[float] = []
        before = sum(seconds_by_role(processes).values())
        clients = asyncio.ensure_future(streams(port, number, tokens, late))
        await asyncio.sleep(tokens / 40)  # in the midst of it
        held = memory(processes)
        came = sum(client.came for client in await clients)
        used = sum(seconds_by_role(processes).values()) - before
    cuts = statistics.quantiles(late, n=100, method="inclusive")
    return {"token": used / max(came, 1) * 1e6, "came": came, "p50": cuts[49], "p99": cuts[98], "memory": held}


async def measured_crash(server: Server, number: int, tokens: int) -> Result:
    """A worker's segfault in the midst of so many streams: how each ends, and when the next request is answered."""
    with running(server) as (port, processes):
        going = asyncio.ensure_future(streams(port, number, tokens, []))
        await asyncio.sleep(tokens / 40)
        began = time.monotonic()
        os.kill(next(process.pid for process in processes if _runs_app(process, processes)), signal.SIGSEGV)
        while not await asyncio.to_thread(_answers, port):
            if time.monotonic() - began > 30:
                break
        answered = time.monotonic() - began
        clients = await going
    whole = sum(client.whole and client.came == tokens for client in clients)
    cut = sum(not client.whole for client in clients)
    return {"whole": whole, "cut": cut, "silent": number - whole - cut, "next": answered}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each run (default: 4)")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("flask", "fastapi", "idle", "streams"), help="one part of it")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("scripts/load needs wrk: on Debian, apt-get install wrk (and nginx-light, for that row)")
    console = Console(width=200)
    console.print(_machine())
    apps = {"flask": ("Flask", flask_servers), "fastapi": ("FastAPI", fastapi_servers)}
    for key, (app, make) in apps.items():
        if options.only not in (None, key):
            continue
        servers = {name: server for name, server in make(options.workers).items() if server.there}
        for every, title in ((0, "healthy"), (100, "one request in a hundred segfaults")):
            results: dict[str, list[Result]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name, server in servers.items():
                    results[name].append(measured_load(server, options.seconds, options.connections, every))
            console.print(_load_table(f"{app}, {title}", results))
    if options.only in (None, "idle"):
        some = flask_servers(options.workers)
        names = ("blastdoor serve", "gunicorn, 8 threads", "nginx, gunicorn sync", "uWSGI, its router")
        table = _table("1,000 idle keep-alive connections", "by", "memory of each")
        for name in names:
            if some[name].there:
                try:
                    each = asyncio.run(measured_idle(some[name], 1000))["each"]
                    table.add_row(name, f"{each / 1024:.1f} KiB")
                except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
                    table.add_row(name, f"does not hold them: {type(error).__name__}")
        console.print(table)
    if options.only in (None, "streams"):
        preload = "--preload=scripts.measure.served_fastapi"
        lanes = ours(FASTAPI, str(options.workers), "--concurrency=500", "--connections=2000")
        compare_streams(
            console, 200, 100, {"blastdoor serve, 200 workers": ours(FASTAPI, "200", preload), "200 in one": lanes}
        )
        uvicorn = fastapi_servers(options.workers)["uvicorn"]
        compare_streams(console, 1000, 200, {"blastdoor serve, 500 at once in each": lanes, "uvicorn": uvicorn})


def compare_streams(console: Console, number: int, tokens: int, servers: dict[str, Server]) -> None:
    """Measure so many streams by each of these, twice: undisturbed, and with a segfault in the midst."""
    columns: tuple[str, ...] = ("by", "µs a token", "tokens", "lag", "p99", "memory")
    columns += ("a worker segfaults: whole", "cut, and told", "the next answer")
    table = _table(f"{number:,} streams of 20 tokens a second, for {tokens // 20} s", *columns)
    for name, server in servers.items():
        told = asyncio.run(measured_streams(server, number, tokens))
        crash = asyncio.run(measured_crash(server, number, tokens))
        table.add_row(
            name,
            f"{told['token']:.0f}",
            f"{told['came']:,.0f} of {number * tokens:,}",
            f"{told['p50'] * 1000:.1f} ms",
            f"{told['p99'] * 1000:.1f} ms",
            f"{told['memory'] / (1 << 20):,.0f} MiB",
            f"{crash['whole']:,.0f}",
            f"{crash['cut']:,.0f}",
            f"after {crash['next'] * 1000:.0f} ms",
        )
    console.print(table)


def _machine() -> str:
    """What it runs on."""
    versions = []
    for name in ("blastdoor", "uvloop", "gunicorn", "pyuwsgi", "uvicorn", "flask", "fastapi"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    if nginx := shutil.which("nginx"):
        versions.append(subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr.split()[-1])
    python_version = platform.python_version()
    return f"{os.cpu_count()} cores, Linux {platform.release()}, Python {python_version}; {', '.join(versions)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "by" else "right")
    return table


def _load_table(title: str, results: dict[str, list[Result]]) -> Table:
    table = _table(
        title,
        "by",
        "200s a second",
        "median, ms",
        "p99, ms",
        "µs a request",
        "of it front",
        "workers",
        "healthy sent",
        "healthy lost",
        "answers to the fatal",
    )
    for name, runs in results.items():
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("rate", "p50", "p99", "whole", "front", "workers")
        }
        total = {key: int(sum(run[key] for run in runs)) for key in ("healthy", "lost", "fatal", "failed")}
        table.add_row(
            name,
            f"{middle['rate']:,.0f}",
            f"{middle['p50']:.2f}",
            f"{middle['p99']:.1f}",
            f"{middle['whole']:.0f}",
            f"{middle['front']:.0f}",
            f"{middle['workers']:.0f}",
            f"{total['healthy']:,}",
            f"{total['lost']:,} ({total['lost'] / max(total['healthy'], 1):.2%})",
            f"{total['failed']:,} of {total['fatal']:,}" if total["fatal"] else "",
        )
    return table


if __name__ == "__main__":
    main()
