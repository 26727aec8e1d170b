"""`blastdoor serve --fronts`: several front processes at one address, their parent, and what kills do to them."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from runner import ConfigurationError
from tests.processes import is_gone, kill, wait_gone
from tests.serving import ROOT, Process
from tests.waiting import wait_until
from transport.fronts.messages import Counts, Family, Numbers, Sample
from transport.fronts.room import Room
from transport.fronts.shares import how_many, share
from transport.fronts.sums import Sums
from transport.serving.settings import Settings, load_settings

Start = Callable[..., Process]
APP = "tests.handlers:app"


@pytest.fixture
def serve() -> Iterator[Start]:
    """Starts servers with two fronts, and stops them after the test."""
    running: list[Process] = []

    def start(*arguments: str, app: str = APP, cwd: Path | None = None) -> Process:
        options = ["--port=0", "--admin=127.0.0.1:0", "--fronts=2", "--workers=2", "--no-access-log", "--drain=20"]
        served = Process(*options, *arguments, app, cwd=cwd)
        running.append(served.__enter__())
        return served

    yield start
    for served in running:
        served.__exit__(None, None, None)


def status_of(served: Process) -> dict[str, Any]:
    told: dict[str, Any] = requests.get(f"{served.admin}/-/status.json", timeout=20).json()
    return told


def front_pids(served: Process) -> list[int]:
    return [front["pid"] for front in status_of(served)["fronts"]]


def serving(served: Process) -> int:
    return sum(front["state"] == "ready" for front in status_of(served)["fronts"])


def below(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def address(served: Process) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


def front_of(worker: int) -> int:
    """The front whose worker a process is: worker, zygote, front."""
    zygote = psutil.Process(worker).parent()
    front = zygote and zygote.parent()
    assert front is not None
    return front.pid


class Callers:
    """Clients with connections of their own that ask for /pid without end. A context manager.

    `failed` has what went wrong, with the worker that had answered on the same connection before: by it the front is
    known that had the connection.
    """

    def __init__(self, served: Process, number: int = 8, target: str = "/pid", fatal_every: int = 0) -> None:
        self._address = address(served)
        self._fatal_every = fatal_every
        self.fatal = 0
        self.drained = threading.Event()
        self._target = target
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answers: dict[str, int] = {}
        self.failed: list[tuple[str, str]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def total(self) -> int:
        """How many answers there were so far."""
        with self._lock:
            return sum(self.answers.values())

    def _run(self) -> None:
        asked = 0
        while not self._stop.is_set():
            client = http.client.HTTPConnection(*self._address, timeout=20)
            last = ""
            try:
                for _ in range(50):  # then a new connection, perhaps to the other front
                    if self._stop.is_set():
                        break
                    asked += 1
                    fatal = bool(self._fatal_every) and asked % self._fatal_every == 0
                    client.request("GET", "/die" if fatal else self._target)
                    response = client.getresponse()
                    body = response.read().decode()
                    with self._lock:
                        if fatal:
                            assert response.status == 500
                            assert "SIGSEGV" in body
                            self.fatal += 1
                        elif response.status == 200:
                            self.answers[body] = self.answers.get(body, 0) + 1
                            last = body
                        else:
                            self.failed.append((last, f"{response.status} {body}"))
                    if response.headers["connection"] == "close":
                        break
            except ConnectionRefusedError as error:
                if self.drained.is_set():
                    return  # nobody listens any more
                with self._lock:
                    self.failed.append(("", str(error)))
            except (http.client.HTTPException, OSError) as error:
                with self._lock:
                    self.failed.append((last, f"{type(error).__name__}: {error}"))
            finally:
                client.close()


def test_two_fronts_share_an_address(serve: Start) -> None:
    """P1: each has its share of the workers, both take connections, and the parent has none of either."""
    served = serve()
    fronts = front_pids(served)
    assert served.process.pid not in fronts
    with Callers(served) as callers:
        wait_until(lambda: len(callers.answers) == 2 and callers.total() > 200)
        workers = {int(pid) for pid in callers.answers}
        assert {front_of(worker) for worker in workers} == set(fronts)
    assert not callers.failed
    assert {worker["pid"] for worker in status_of(served)["pools"]["/"]["workers"]} == workers


def test_a_front_that_is_killed(serve: Start) -> None:
    """P1, P2: its own connections break, no other; its workers and what they started are gone; another comes."""
    served = serve()
    spawned = int(requests.get(f"{served.url}/spawn?how=session", timeout=20).text)
    with Callers(served) as callers:
        wait_until(lambda: len(callers.answers) == 2 and callers.total() > 100)
        spawner = psutil.Process(spawned).parent()
        assert spawner is not None
        victim = front_of(spawner.pid)
        (worker,) = [pid for pid in callers.answers if front_of(int(pid)) == victim]
        family = below(victim)
        assert spawned in family
        kill(victim)
        wait_gone([victim, *family], 2)
        wait_until(lambda: victim not in front_pids(served) and serving(served) == 2)
        wait_until(lambda: len(callers.answers) == 3)  # the new one's worker answers too
    assert all(last == worker or last == "" for last, _ in callers.failed), callers.failed
    assert len(callers.failed) <= 8  # each client's connection may have been the victim's
    assert "was killed by SIGKILL" in served.wait_for("another takes its place")


def test_fronts_that_are_killed_over_and_over(serve: Start) -> None:
    """P1, P2: at seeded instants, also while they start: in the end two serve, and nothing of the others is left."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    chance = random.Random(seed)
    served = serve()
    families: set[int] = set()
    with Callers(served, 4):
        for _ in range(12):
            wait_until(lambda: serving(served) >= 1)
            victim = chance.choice([front["pid"] for front in status_of(served)["fronts"]])
            if not is_gone(victim):
                families |= {victim, *below(victim)}
                kill(victim)
            time.sleep(chance.random() * 0.6)
        wait_until(lambda: serving(served) == 2)
    wait_gone(list(families), 2)
    assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


def test_a_day_of_a_server(serve: Start) -> None:
    """P2, P4: requests that segfault, a front that is killed, a reload, the end: only that front's are lost."""
    served = serve("--workers=4")
    with Callers(served, 6, fatal_every=50) as callers:
        wait_until(lambda: callers.total() > 500)
        victim = front_pids(served)[0]
        kill(victim)
        wait_until(lambda: victim not in front_pids(served) and serving(served) == 2)
        lost = list(callers.failed)
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum("reloaded in" in line for line in served.lines) == 2)
        before = callers.total()
        wait_until(lambda: callers.total() > before + 300)
        callers.drained.set()
        served.process.terminate()
        assert served.process.wait(30) == 0
    assert callers.fatal > 10
    assert callers.failed == lost
    assert len(lost) <= 6


def test_a_parent_that_is_killed(serve: Start) -> None:
    """P1: nothing of its fronts, their workers and what those started is left."""
    served = serve()
    requests.get(f"{served.url}/spawn?how=session", timeout=20)
    family = below(served.process.pid)
    assert len(family) >= 7  # two fronts, two zygotes, two workers, what was spawned
    kill(served.process.pid)
    served.process.wait(20)
    wait_gone(family, 2)


def counters(served: Process) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = requests.get(f"{served.admin}/-/metrics", timeout=20).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_counters_never_go_back(serve: Start) -> None:
    """P3: one admin address tells of all fronts; what a front had counted stays when it is killed."""
    served = serve()
    with Callers(served, 4) as callers:
        wait_until(lambda: len(callers.answers) == 2 and callers.total() > 300)
    requests.get(f"{served.url}/die", timeout=20)
    before, status = counters(served), status_of(served)
    answered = before["blastdoor_job_duration_seconds_count", (("outcome", "ok"), ("pool", "/"), ("provider", ""))]
    assert answered == callers.total()
    assert status["pools"]["/"]["outcomes"]["ok"] == answered
    assert status["pools"]["/"]["deaths"] == 1
    assert sum(second["answers"] for second in status["history"]) == answered + 1
    for front in front_pids(served):
        kill(front)
        wait_until(lambda front=front: front not in front_pids(served) and serving(served) == 2)  # type: ignore[misc]
        after = counters(served)
        assert {key: value for key, value in before.items() if after.get(key, -1) < value} == {}
        told = status_of(served)["pools"]["/"]
        assert told["outcomes"]["ok"] == answered
        assert told["deaths"] == 1


VERSIONED = """
import os, time, pathlib

def app(request, response):
    if request.path == "/slow":
        response.write(b"begun ")
        while not pathlib.Path({go!r}).exists():
            time.sleep(0.002)
    return b"{version}"
"""


def test_a_reload_under_load(serve: Start, tmp_path: Path) -> None:
    """P4: SIGHUP has each front serve the new code, and no request is dropped."""
    module = tmp_path / "shop.py"
    module.write_text(VERSIONED.format(go="", version=1))
    served = serve(app="shop:app", cwd=tmp_path)
    with Callers(served, 6, "/") as callers:
        wait_until(lambda: callers.total() > 100)
        for version in (2, 3):
            module.write_text(VERSIONED.format(go="", version=version))
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda version=version: callers.answers.get(str(version), 0) > 100)  # type: ignore[misc]
            wait_until(lambda version=version: sum("reloaded in" in line for line in served.lines) == 2 * (version - 1))  # type: ignore[misc]
        seen = dict(callers.answers)
        wait_until(lambda: callers.answers["3"] > seen["3"] + 100)
        assert callers.answers["2"] <= seen["2"] + 6  # what was under way; no front is left behind
    assert not callers.failed
    module.write_text("nonsense(")
    served.process.send_signal(signal.SIGHUP)
    served.wait_for("can't be reloaded")
    assert "reload failed" in status_of(served)["reload_error"]
    assert requests.get(served.url, timeout=20).text == "3"


def test_a_reload_while_a_front_starts(serve: Start, tmp_path: Path) -> None:
    """P4: one that has read the old code as it started serves the new one in the end, as all do."""
    module, gate = tmp_path / "shop.py", tmp_path / "gate"
    gate.touch()
    code = "import pathlib, time\nwhile not pathlib.Path({gate!r}).exists():\n    time.sleep(0.002)\n"
    code += "def app(request, response):\n    return b'{version}'\n"
    module.write_text(code.format(gate=str(gate), version=1))
    served = serve(app="shop:app", cwd=tmp_path)
    gate.unlink()
    kill(front_pids(served)[0])
    wait_until(lambda: status_of(served)["fronts"][0]["state"] == "starting")
    (starting,) = [front["pid"] for front in status_of(served)["fronts"] if front["state"] == "starting"]
    wait_until(lambda: len(below(starting)) >= 2)  # its worker imports
    module.write_text(code.format(gate=str(gate), version=2))
    served.process.send_signal(signal.SIGHUP)
    gate.touch()
    wait_until(lambda: sum("reloaded in" in line for line in served.lines) == 2)
    assert {requests.get(served.url, timeout=20).text for _ in range(40)} == {"2"}


@pytest.mark.parametrize("signals", [1, 2])
def test_draining(serve: Start, tmp_path: Path, signals: int) -> None:
    """P4: SIGTERM lets all fronts answer what they have; a second one ends them at once."""
    go = tmp_path / "go"
    (tmp_path / "shop.py").write_text(VERSIONED.format(go=str(go), version=1))
    served = serve(app="shop:app", cwd=tmp_path)
    bodies: list[str] = []

    def ask() -> None:
        try:
            bodies.append(requests.get(f"{served.url}/slow", timeout=30).text)
        except requests.RequestException as error:
            bodies.append(type(error).__name__)

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()
    wait_until(lambda: status_of(served)["pools"]["/"]["busy"] + status_of(served)["pools"]["/"]["waiting"] == 2)
    family = below(served.process.pid)
    served.process.terminate()
    served.wait_for("draining")
    if signals == 2:
        served.process.terminate()
    else:
        go.touch()
    for caller in callers:
        caller.join(30)
    assert served.process.wait(20) == 0
    wait_gone(family, 2)
    if signals == 1:
        assert bodies == ["begun 1", "begun 1"]
    else:
        assert "begun 1" not in bodies


def test_what_can_t_start(tmp_path: Path) -> None:
    """P1: an app that can't be loaded is told once, with the exit code that one front has, and nothing is left."""
    (tmp_path / "shop.py").write_text("raise RuntimeError('no shop')")
    command = [sys.executable, "-m", "transport.cli", "serve", "--port=0", "--admin=none", "--workers=2", "shop:app"]
    codes, words = [], []
    for fronts in ("1", "2"):
        done = subprocess.run(
            [*command, f"--fronts={fronts}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        codes.append(done.returncode)
        words.append(done.stderr)
    assert codes[0] == codes[1] != 0
    assert all("no shop" in said for said in words)
    assert "Traceback" not in words[1].partition("no shop")[2]


def test_new_connections_go_where_there_is_room(serve: Start, tmp_path: Path) -> None:
    """P1: a front whose requests wait leaves new connections to one that has a free worker."""
    served = serve()
    here, go = tmp_path / "here", tmp_path / "go"
    busy: list[socket.socket] = []

    def pool() -> dict[str, Any]:
        found: dict[str, Any] = status_of(served)["pools"]["/"]
        return found

    try:
        while True:  # until one front has a request that waits, and the other none at all
            held = socket.create_connection(address(served), 20)
            busy.append(held)
            held.sendall(f"GET /wait_for?here={here}&go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(lambda: pool()["busy"] + pool()["waiting"] == len(busy))
            now = pool()
            if now["busy"] == 2:
                busy.pop().close()
                wait_until(lambda: pool()["busy"] == 1 and pool()["idle"] == 1)
            elif now["waiting"] == 1:
                break
        for _ in range(40):
            with requests.Session() as session:
                assert session.get(f"{served.url}/hello", timeout=20).text == "hello"
        assert pool()["waiting"] == 1
    finally:
        go.touch()
        for held in busy:
            held.close()


def test_a_front_that_hangs_keeps_no_connection_waiting(serve: Start, tmp_path: Path) -> None:
    """P1: what is left to a front that has room, and is stopped, is taken by the full one after a while."""
    served = serve("--queue-timeout=1")
    here, go = tmp_path / "here", tmp_path / "go"
    asked = f"GET /wait_for?here={here}&go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    stopped = front_pids(served)[0]
    os.kill(stopped, signal.SIGSTOP)
    held = [socket.create_connection(address(served), 20) for _ in range(3)]
    try:
        for client in held[:2]:  # one runs, one waits: the other front is full
            client.sendall(asked)
        wait_until(here.exists)
        held[2].sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[2].recv(1 << 16).startswith(b"HTTP/1.1 503 ")  # by the full one, and not never
    finally:
        os.kill(stopped, signal.SIGCONT)
        go.touch()
        for client in held:
            client.close()


def test_shares() -> None:
    """P1: workers, queue and connections are parted; what can't be is refused at the start."""
    settings = load_settings(None, {"app": APP, "workers": "5:9", "queue": 7, "connections": 11, "fronts": "2"})
    parts = [share(settings, front, how_many(settings)) for front in range(2)]
    assert [part.mounts["/"].workers for part in parts] == ["3:5", "2:4"]
    assert [part.mounts["/"].queue for part in parts] == [4, 4]
    assert [part.connections for part in parts] == [6, 6]
    with pytest.raises(ConfigurationError, match="3 fronts need 3 workers"):
        how_many(Settings(app=APP, workers=2, fronts=3))
    with pytest.raises(ConfigurationError, match="reload is for development"):
        how_many(Settings(app=APP, workers=2, fronts=2, reload=True))
    for wrong in (0, -1, "many", 1000):
        with pytest.raises(ConfigurationError, match="fronts is a number"):
            Settings(app=APP, fronts=wrong)
    assert how_many(Settings(app=APP, fronts="auto")) == max((os.cpu_count() or 1) // 8, 1)


def test_room() -> None:
    """P1: each front says of itself whether it is full; one that is gone has no room."""
    room = Room.make(3)
    try:
        assert not room.is_elsewhere(0)
        room.note(1, full=False)
        assert room.is_elsewhere(0)
        assert not room.is_elsewhere(1)
        room.note(1, full=True)
        assert not room.is_elsewhere(0)
        room.note(2, full=False)
        room.forget(2)
        assert not room.is_elsewhere(0)
    finally:
        room.close()


def test_sums() -> None:
    """P3: counters of fronts that are gone stay, gauges do not; the highest tells where a sum would say nothing."""

    def numbers(count: float, active: float, failed: float, deaths: int) -> Numbers:
        return Numbers(
            [
                Family("jobs", "Jobs.", "counter", [Sample("jobs_total", {"pool": "/"}, count)]),
                Family("active", "Active.", "gauge", [Sample("active", {}, active)]),
                Family("blastdoor_last_reload_failed", "Failed.", "gauge", [Sample("failed", {}, failed)]),
            ],
            {"/": Counts(deaths, {"ok": int(count)})},
        )

    def told() -> dict[str, float]:
        return {sample.name: sample.value for metric in sums.metrics() for sample in metric.samples}

    sums = Sums()
    sums.take(0, numbers(5, 1, 1, 2))
    sums.take(1, numbers(7, 2, 1, 3))
    assert told() == {"jobs_total": 12, "active": 3, "failed": 1}
    sums.retire(0)
    assert told() == {"jobs_total": 12, "active": 2, "failed": 1}
    assert sums.counts("/") == Counts(2, {"ok": 5})
    sums.take(0, numbers(1, 1, 0, 0))
    sums.retire(1)
    assert told() == {"jobs_total": 13, "active": 1, "failed": 0}
    sums.retire(0)
    sums.retire(0)
    assert told() == {"jobs_total": 13}
    assert json.dumps(sums.counts("/").outcomes) == '{"ok": 13}'
