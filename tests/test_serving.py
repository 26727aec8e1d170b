"""transport.serving and `blastdoor serve`: draining, reloading, the page of status, health, metrics, settings."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from runner import ConfigurationError, JobClosed, Pool, Request, StartError
from runner.events import WorkerEnded
from tests.processes import kill, wait_gone
from tests.serving import Process, Served, receive_all, receive_until
from tests.waiting import wait_until
from transport.serving import addresses
from transport.serving.settings import Settings, load_settings
from transport.serving.settings_parsing import parse_address, parse_mounts, parse_workers

HANDLER = "tests.handlers:app"

GATED = """
import os, pathlib, time
VERSION = {version!r}
while not pathlib.Path({gate!r}).exists():
    time.sleep(0.002)

def app(request, response):
    if request.path == "/slow":
        response.write(b"begun ")
        while not pathlib.Path({go!r}).exists():
            time.sleep(0.002)
    return f"{{VERSION}} {{os.getpid()}}".encode()
"""


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(drain=0) as served:
        yield served


def get(url: str) -> requests.Response:
    return requests.get(url, timeout=20)


def status_of(served: Served | Process) -> dict[str, Any]:
    told: dict[str, Any] = get(f"{served.admin}/-/status.json").json()
    return told


# -- G8: the end, and a new beginning -----------------------------------------------------------------


def test_sigterm_drains(tmp_path: Path) -> None:
    """G8: requests under way are answered whole, new connections refused, readiness is gone; then it exits with 0."""
    here, go = tmp_path / "here", tmp_path / "go"
    with Process(HANDLER, "--workers=2", "--port=0", "--admin=127.0.0.1:0", "--drain=30") as served:
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        with socket.create_connection(address, 20) as client:
            client.sendall(f"GET /wait_for?here={here}&go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(here.exists)
            served.process.terminate()
            served.wait_for("draining")
            assert get(f"{served.admin}/-/readyz").status_code == 503
            assert get(f"{served.admin}/-/healthz").status_code == 200
            wait_until(lambda: not accepts(address))
            go.touch()
            received = receive_all(client)
            assert b"went" in received
            assert received.endswith(b"went")
        assert served.process.wait(30) == 0


def accepts(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, 5):
        return True
    return False


@pytest.mark.parametrize("twice", [False, True])
def test_the_drain_s_end(twice: bool) -> None:
    """G8: what is not done in time is ended, and its client told; a second signal does not wait."""
    drain = "--drain=60" if twice else "--drain=0.3"
    with Process(HANDLER, "--workers=2", "--port=0", "--admin=none", drain) as served:
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        with socket.create_connection(address, 20) as waiting, socket.create_connection(address, 20) as streaming:
            waiting.sendall(b"GET /never_read HTTP/1.1\r\nHost: x\r\n\r\n")
            streaming.sendall(b"GET /stream?count=100000&pause=0.01 HTTP/1.1\r\nHost: x\r\n\r\n")
            receive_until(streaming, b"data: 1 ")
            pids = children(served.process.pid)
            served.process.terminate()
            if twice:
                served.wait_for("draining")
                served.process.send_signal(signal.SIGINT)
            assert b" 503 " in receive_all(waiting)
            assert not receive_all(streaming).endswith(b"0\r\n\r\n")
        assert served.process.wait(30) == 0
        wait_gone(pids, 2)
        assert not any("Traceback" in line for line in served.lines), "".join(served.lines)


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_sigkill_takes_the_workers_along() -> None:
    """G8, W8: when the server is killed, its workers go."""
    with Process(HANDLER, "--workers=2", "--port=0", "--admin=none") as served:
        pids = children(served.process.pid)
        assert len(pids) == 3
        served.process.kill()
        served.process.wait(20)
        wait_gone(pids, 2)


def write_app(directory: Path, version: str, gate: str = "/", go: str = "/") -> None:
    (directory / "gated_app.py").write_text(GATED.format(version=version, gate=gate, go=go))


def test_sighup_reloads(tmp_path: Path) -> None:
    """G8: the new workers first; a request under way ends on the old ones; none is dropped meanwhile."""
    gate, go = tmp_path / "gate", tmp_path / "go"
    write_app(tmp_path, "one", go=str(go))
    with Process("gated_app:app", "--workers=2", "--port=0", "--admin=none", cwd=tmp_path) as served:
        assert get(served.url).text.startswith("one ")
        old = get(served.url).text
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        with socket.create_connection(address, 20) as client:
            client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            receive_until(client, b"begun ")
            write_app(tmp_path, "two", gate=str(gate))
            served.process.send_signal(signal.SIGHUP)
            answers: list[str] = []
            with requests.Session() as session:
                # The new ones are still starting: they wait for the gate.
                answers += [session.get(served.url, timeout=20).text for _ in range(50)]
                assert {answer.split()[0] for answer in answers} == {"one"}
                gate.touch()
                deadline = time.monotonic() + 20
                while not answers[-1].startswith("two "):
                    assert time.monotonic() < deadline
                    response = session.get(served.url, timeout=20)
                    assert response.status_code == 200
                    answers.append(response.text)
            go.touch()
            assert b"one " in receive_until(client, b"0\r\n\r\n")
        wait_gone([int(old.split()[1])], 20)


def test_a_reload_that_fails(tmp_path: Path) -> None:
    """G8, F8: a handler that can't be loaded any more is told of, and the old one goes on; the next reload is tried."""
    write_app(tmp_path, "one")
    with Process("gated_app:app", "--workers=1", "--port=0", "--admin=127.0.0.1:0", cwd=tmp_path) as served:
        (tmp_path / "gated_app.py").write_text("nonsense(")
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("SyntaxError")
        assert get(served.url).text.startswith("one ")
        assert status_of(served)["ready"]
        write_app(tmp_path, "three")
        served.process.send_signal(signal.SIGHUP)
        served.wait_for(": reloaded in")
        assert get(served.url).text.startswith("three ")
        wait_until(lambda: len(children(served.process.pid)) == 2)  # the old pool is closed by and by


def test_reloads_under_load() -> None:
    """G8: requests from many threads, reloads one after the other: every answer is a 200, and one pool is left."""
    with Served(drain=30) as served:
        stop = threading.Event()
        statuses: list[int] = []

        def call() -> None:
            with requests.Session() as session:
                while not stop.is_set():
                    statuses.append(session.get(f"{served.url}/hello", timeout=20).status_code)

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        before = served.pool
        for _ in range(6):
            assert served.reload()
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        assert len(statuses) > 50
        assert served.pool is not before
        wait_until(lambda: len(children(os.getpid())) == 3, 60)


def test_callers_in_the_queue_move_on(tmp_path: Path) -> None:
    """G8: who waits for a worker of the old pool as that closes is served by the new one."""
    here, go = tmp_path / "here", tmp_path / "go"
    with Served(workers=1, drain=0) as served:
        answers: list[int] = []

        def call(target: str) -> None:
            answers.append(get(served.url + target).status_code)

        threads = [threading.Thread(target=call, args=(f"/wait_for?here={here}&go={go}",))]
        threads[0].start()
        wait_until(here.exists)
        threads += [threading.Thread(target=call, args=("/hello",)) for _ in range(3)]
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: served.pool.stats().waiting == 3)
        assert served.reload()
        for thread in threads[1:]:
            thread.join()
        assert answers == [200, 200, 200]
        go.touch()
        threads[0].join()
        assert answers[-1] == 200


def test_reload_watches_files(tmp_path: Path) -> None:
    """G8: with --reload a changed file is enough."""
    write_app(tmp_path, "one")
    with Process("gated_app:app", "--workers=1", "--port=0", "--admin=none", "--reload", cwd=tmp_path) as served:
        served.wait_for("are watched")
        deadline = time.monotonic() + 30
        while not get(served.url).text.startswith("two "):
            write_app(tmp_path, "two")  # again and again: when the watch has begun is not told
            time.sleep(0.1)
            assert time.monotonic() < deadline


def test_a_handler_that_can_t_be_loaded() -> None:
    """G8, F8: the service does not start, says why, and leaves nothing behind."""
    with pytest.raises(StartError, match="the import went wrong"), Served("tests.bad_handlers.raises:app"):
        pass


# -- G9: what the operator asks -----------------------------------------------------------------------


def test_health_and_readiness(served: Served) -> None:
    """G9: alive, and ready; on the admin address only, which answers to its own names only."""
    assert get(f"{served.admin}/-/healthz").text == "ok\n"
    assert get(f"{served.admin}/-/readyz").text == "ready\n"
    assert get(f"{served.url}/-/readyz").text != "ready\n"
    rebound = requests.get(f"{served.admin}/-/status.json", headers={"Host": "evil.example"}, timeout=20)
    assert rebound.status_code == 400


@pytest.mark.parametrize("how", ["exit0", "SIGSTOP in its job", "SIGSTOP"])
def test_readiness_goes_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """I10, G9: os._exit(0), and SIGSTOP: not ready while the only worker is away, ready once its successor is there."""
    gate = tmp_path / "gate"
    gate.touch()
    (tmp_path / "ready_app.py").write_text(
        "import pathlib, time\n"
        f"while not pathlib.Path({str(gate)!r}).exists():\n    time.sleep(0.002)\n"
        "from tests.handlers import app\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Served("ready_app:app", workers=1, timeout=0.3, drain=0) as served:
        (worker,) = served.pool.workers()
        assert get(f"{served.admin}/-/readyz").status_code == 200
        gate.unlink()
        if how == "SIGSTOP":
            kill(worker.pid, signal.SIGSTOP)
        else:
            assert get(f"{served.url}/die?how={how.split()[0]}").status_code in (500, 504)
        wait_until(lambda: get(f"{served.admin}/-/readyz").status_code == 503)
        assert not status_of(served)["ready"]
        gate.touch()
        wait_until(lambda: get(f"{served.admin}/-/readyz").status_code == 200)
        assert get(f"{served.url}/hello").text == "hello"


def test_status(served: Served, log: pytest.LogCaptureFixture) -> None:
    """G9, W10: workers with state, job, age and memory; what happened; the last faults with their stacks."""
    starts: list[object] = []
    served.pool.subscribe(starts.append)
    assert get(f"{served.url}/die").status_code == 500
    assert get(f"{served.url}/raise").status_code == 500
    with served.connect() as client:
        client.sendall(b"GET /head_then_wait?go=/nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        receive_until(client, b"\r\n\r\n")
        wait_until(lambda: status_of(served)["pools"]["/"]["idle"] == 1)
        told = status_of(served)
        (busy,) = [worker for worker in told["pools"]["/"]["workers"] if worker["state"] == "busy"]
        assert busy["job_id"].endswith("-3")
        assert busy["rss"] > 1 << 20
    raised, died = told["faults"]
    assert (raised["outcome"], died["outcome"]) == ("raised", "died")
    assert "ValueError: boom from the handler" in raised["log"]
    assert "in do_die" in died["log"]
    assert died["log"].count("Segmentation fault") == 1
    assert died["detail"] == "the worker process was ended by SIGSEGV during the job"
    assert sum(second["answers"] for second in told["history"]) == 2
    assert sum(second["errors"] for second in told["history"]) == 2
    assert told["latency"]["p99"] > 0
    assert told["active"] == 1


def test_a_fault_s_stacks(log: pytest.LogCaptureFixture) -> None:
    """G9, W12: of a job that was over its time the page tells where it was stuck, once that is in the log."""
    with Served(workers=1, timeout=0.2, drain=0) as served:
        assert get(f"{served.url}/never_read").status_code == 504
        wait_until(lambda: "in do_never_read" in status_of(served)["faults"][0]["log"])


def test_status_is_bounded(served: Served) -> None:
    """G9: many faults with long stories: the page keeps the last ones, and little of each."""
    for _ in range(120):
        get(f"{served.url}/raise")
    assert get(f"{served.url}/flood?size=3000000").ok
    told = get(f"{served.admin}/-/status.json")
    assert len(told.json()["faults"]) == 50
    assert len(told.content) < 1 << 20


def samples(served: Served) -> dict[str, float]:
    """The metrics of this moment, by name and labels."""
    text = get(f"{served.admin}/-/metrics").text
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(tmp_path: Path) -> None:
    """G9: counts and times in Prometheus' names, as its own parser reads them."""
    with Served(workers=2, drain=0, queue=0) as served:
        get(f"{served.url}/hello")
        get(f"{served.url}/die")
        requests.request("PROPFIND", f"{served.url}/hello", timeout=20)
        found = samples(served)
        request = {"http_request_method": "GET", "http_response_status_code": "200", "http_route": "/"}
        name = "http_server_request_duration_seconds_count"
        assert found[name + json.dumps(request, sort_keys=True)] == 1
        other = {**request, "http_request_method": "_OTHER"}
        assert found[name + json.dumps(other, sort_keys=True)] == 1
        job = {"outcome": "died", "pool": "/", "provider": ""}
        assert found["blastdoor_job_duration_seconds_count" + json.dumps(job)] == 1
        assert found["blastdoor_job_wait_seconds_count" + json.dumps({"pool": "/", "provider": ""})] == 3
        ends = {"how": "SIGSEGV", "pool": "/"}
        assert found["blastdoor_worker_ends_total" + json.dumps(ends)] == 1
        assert found["blastdoor_workers_resident_memory_bytes" + json.dumps({"pool": "/"})] > 1 << 20
        assert found["http_server_active_requests{}"] == 0
        wait_until(lambda: served.pool.stats().idle == 2)
        with served.connect() as one, served.connect() as two:
            for number, client in enumerate((one, two)):
                here = tmp_path / str(number)
                client.sendall(f"GET /wait_for?here={here}&go=/nowhere HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                wait_until(here.exists)
            assert get(f"{served.url}/hello").status_code == 503
            found = samples(served)
        assert found["blastdoor_jobs_refused_total" + json.dumps({"pool": "/", "provider": ""})] == 1
        assert found["blastdoor_workers" + json.dumps({"pool": "/", "state": "busy"})] == 2
        assert found["http_server_active_requests{}"] == 2


def test_metrics_go_on_after_a_reload(served: Served) -> None:
    """G9, G8: counts are kept, and gauges are the new pool's."""
    get(f"{served.url}/hello")
    assert served.reload()
    get(f"{served.url}/hello")
    found = samples(served)
    labels = json.dumps({"outcome": "ok", "pool": "/", "provider": ""})
    assert found["blastdoor_job_duration_seconds_count" + labels] == 2
    wait_until(lambda: not served.service._retired)
    found = samples(served)
    workers = [found["blastdoor_workers" + json.dumps({"pool": "/", "state": state})] for state in ("idle", "busy")]
    assert sum(workers) == 2


def test_the_page_is_whole(served: Served) -> None:
    """G9: one page without anything from elsewhere; nothing in it runs but its own script."""
    response = get(f"{served.admin}/-/status")
    assert not re.search(r"(src|href)=\"(?!data:)", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert get(served.admin).url == f"{served.admin}/-/status"


# -- G11: settings ------------------------------------------------------------------------------------


def test_a_file_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G11: what is given on the command line counts, then a mount's own, then what stands at the top of the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blastdoor.toml").write_text(
        'workers = "2:16"\ntimeout = 30\nport = 9000\n'
        '[mounts."/a"]\napp = "a:app"\ntimeout = 5\n'
        '[mounts."/b"]\napp = "b:app"\nsandbox = { profile = "strict", connect = [443] }\n'
    )
    settings = load_settings(None, {"port": 9001})
    assert (settings.port, settings.defaults["timeout"]) == (9001, 30)
    assert (settings.mounts["/a"].timeout, settings.mounts["/b"].timeout) == (5, Settings().timeout)
    given = load_settings(None, {"timeout": 7.0})
    assert given.defaults["timeout"] == 7
    assert given.mounts["/a"].timeout == Settings().timeout
    other = load_settings(None, {"mounts": parse_mounts(["c:app"])})
    assert {path: mount.app for path, mount in other.all_mounts.items()} == {"/": "c:app"}
    pool = settings.mounts["/b"].pool_with("/b", settings.defaults)
    assert isinstance(pool, Pool)
    assert pool._config.sandbox is not None
    assert pool._config.sandbox.connect == (443,)
    assert (pool._options.size.least, pool._options.size.most, pool._config.limits.wall_seconds) == (2, 16, 30)
    assert pool._config.root_path == "/b"


def test_pyproject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G11: the settings may stand in pyproject.toml, where there is no file of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.blastdoor]\napp = "shop:app"\nmemory = "512MiB"\n')
    assert load_settings(None, {}).all_mounts["/"].app == "shop:app"
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    with pytest.raises(ConfigurationError, match="nothing to serve"):
        load_settings(None, {}).all_mounts  # noqa: B018 - it raises


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('wrkers = 2\napp = "a:b"', "wrkers"),
        ('app = "a:b"\nport = "x"', "port"),
        ('[mounts."/a"]\napp = "a:b"\nport = 1', "port"),
        ("[mounts.'/a']\nworkers = 1", "app"),
        ("app = ", "blastdoor.toml"),
        ('app = "a:b"\n[sandbox]\nprofile = "strict"\nconnect = [0]', "TCP ports"),
        ('app = "a:b"\n[recycle]\nafter_jobs = 0', "after_jobs"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, words: str) -> None:
    """G11: what is wrong is named, with the file that it stands in."""
    path = tmp_path / "blastdoor.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as raised:
        load_settings(str(path), {})
    assert "blastdoor.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": "2:x"}, "2:16"),
        ({"workers": "16:2"}, "least number"),
        ({"sandbox": "some"}, "'strict'"),
        ({"admin": "8000"}, "HOST:PORT"),
        ({"memory": "lots"}, "512MiB"),
        ({"mounts": {}}, "nothing to serve"),
        ({"app": "a:b"}, "short for a mount"),
        ({"host": "203.0.113.1"}, "--port"),
        ({"uds": "/nowhere/at/all"}, "--uds"),
        ({"mounts": {"a": {"app": "a:b"}}}, "a mount is '/'"),
        ({"drain": float("inf")}, "drain is a time"),
        ({"drain": float("nan")}, "drain is a time"),
        ({"send_timeout": -1}, "send_timeout is a time"),
        ({"port": 65536}, "port is a number"),
        ({"connections": 0}, "connections is a number"),
        ({"mounts": {"/x": {"app": "a:b", "provider": "p"}}}, "act for nobody"),
        (
            {
                "mounts": {
                    "/": {"app": "a:b", "provider": "p", "trusted_headers": {"secret_file": "/nowhere"}},
                }
            },
            "secret",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    """G11: they are refused before anything is started."""
    with pytest.raises((ConfigurationError, msgspec.ValidationError), match=words), Served(**settings):
        pass


def test_texts() -> None:
    """G11: numbers of workers, addresses, apps."""
    assert (parse_workers("2:16"), parse_workers("4"), parse_workers(3)) == ((2, 16), 4, 3)
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_mounts(["/a=m:x", "n:y"]) == {"/a": {"app": "m:x"}, "/": {"app": "n:y"}}
    with pytest.raises(ConfigurationError, match="two apps"):
        parse_mounts(["m:x", "n:y"])


def test_a_port_that_is_taken(served: Served) -> None:
    """G11: it is told before any worker is started."""
    port = int(served.url.rpartition(":")[2])
    before = len(children(os.getpid()))
    with pytest.raises(ConfigurationError, match="choose another with --port"):
        Served(port=port)
    with pytest.raises(ConfigurationError, match="choose another with --admin"):
        Served(admin=f"127.0.0.1:{port}")
    assert len(children(os.getpid())) == before


def test_a_unix_socket(tmp_path: Path) -> None:
    """G11: served at a path, which is taken over where nobody listens any more, and gone at the end."""
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with Served(uds=str(path), drain=0, admin="none"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"hello" in receive_all(client)
        with pytest.raises(ConfigurationError, match="somebody listens"):
            addresses.bind_path(str(path))
    assert not path.exists()


def test_modules_beside_a_sandboxed_app_never_run_in_the_server(tmp_path: Path) -> None:
    """G11, S: the working directory is the app's: what lies there by the name of a library is not the server's."""
    mark = tmp_path / "mark"
    names = "psutil watchfiles starlette multiprocessing asyncio anyio dill runner transport pyseccomp uvloop h11 ssl"
    app = tmp_path / "app"
    app.mkdir()
    for name in names.split():
        (app / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(3)\n")
    (app / "plain.py").write_text("def app(request, response):\n    return b'plain'\n")
    command = [Path(sys.executable).with_name("blastdoor"), "serve", "plain:app", "--sandbox=default", "--workers=1"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [*map(str, command), "--port=0", "--admin=127.0.0.1:0"], cwd=app, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        url = next(line for line in process.stderr if "serving" in line).split()[-1]
        admin = next(line for line in process.stderr if "status" in line).split()[-1]
        assert get(url).text == "plain"
        assert get(f"{admin}.json").json()["ready"]
        process.send_signal(signal.SIGHUP)
        next(line for line in process.stderr if ": reloaded in" in line)
        assert get(url).text == "plain"
        process.terminate()
        process.stderr.read()
    assert not mark.exists(), mark.read_text()


def test_a_sandboxed_app_is_served(tmp_path: Path) -> None:
    """G11, S: --sandbox strict."""
    mount = {"app": HANDLER, "sandbox": "strict", "workers": 1}
    with Served({"/": mount}, drain=0) as served:
        assert {get(f"{served.url}/hello").status_code for _ in range(3)} == {200}
        ends: list[object] = []
        served.pool.subscribe(ends.append)
        get(f"{served.url}/hello")
        wait_until(lambda: any(isinstance(event, WorkerEnded) for event in ends))


# -- what a hostile review has found ------------------------------------------------------------------


def test_a_path_that_a_successor_has_taken(tmp_path: Path) -> None:
    """G8, G11: a unix socket is given up as the drain begins: its successor's is not removed at the end."""
    path, here, go = tmp_path / "socket", tmp_path / "here", tmp_path / "go"
    with Served(uds=str(path), drain=30, admin="none") as old, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(f"GET /wait_for?here={here}&go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(here.exists)
        old.stop()
        wait_until(lambda: not path.exists())
        with Served(uds=str(path), drain=0, admin="none"):
            go.touch()
            assert b"went" in receive_all(client)
            old.__exit__(None, None, None)
            assert path.exists()


@pytest.mark.parametrize("twice", [False, True])
def test_jobs_of_a_pool_that_was_replaced_end_with_the_service(tmp_path: Path, twice: bool) -> None:
    """G8: a reload lets them go on; the end of the drain, or a second signal, ends them too."""
    here = tmp_path / "here"
    with Served(workers=1, drain=60 if twice else 0.2) as served, served.connect() as client:
        client.sendall(f"GET /wait_for?here={here}&go=/nowhere HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(here.exists)
        assert served.reload()
        served.stop()
        wait_until(lambda: served.service.status.draining)
        assert not served.reload()
        if twice:
            served.stop()
        began = time.monotonic()
        assert b" 503 " in receive_all(client)
        assert time.monotonic() - began < 20


def test_a_reload_does_not_end_long_jobs(tmp_path: Path) -> None:
    """G8: jobs of the old pool may take longer than a drain."""
    here, go = tmp_path / "here", tmp_path / "go"
    with Served(workers=1, drain=0) as served, served.connect() as client:
        client.sendall(f"GET /wait_for?here={here}&go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(here.exists)
        assert served.reload()
        assert get(f"{served.url}/hello").text == "hello"
        go.touch()
        assert b"went" in receive_until(client, b"went")
        wait_until(lambda: not served.service._retired)


def test_metrics_after_a_reload_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G9, G8: the gauges are still those of the pool that goes on."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    write_app(tmp_path, "one")
    with Served("gated_app:app", drain=0) as served:
        (tmp_path / "gated_app.py").write_text("nonsense(")
        assert not served.reload()
        assert "the last reload failed" in status_of(served)["reload_error"]
        assert samples(served)["blastdoor_last_reload_failed{}"] == 1
        assert samples(served)["blastdoor_workers" + json.dumps({"pool": "/", "state": "idle"})] == 2
        get(served.url)
        labels = json.dumps({"outcome": "ok", "pool": "/", "provider": ""})
        assert samples(served)["blastdoor_job_duration_seconds_count" + labels] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_while_it_starts(tmp_path: Path, number: signal.Signals) -> None:
    """G8: the end is an orderly one then too; a reload is none yet."""
    gate, started = tmp_path / "gate", tmp_path / "started"
    (tmp_path / "slow_app.py").write_text(
        f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\n"
        f"while not pathlib.Path({str(gate)!r}).exists():\n    time.sleep(0.002)\n"
        "def app(request, response):\n    return b'slow'\n"
    )
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "transport.cli", "serve", "slow_app:app", f"--uds={path}", "--admin=none"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_until(started.exists)
        pids = children(process.pid)
        process.send_signal(number)
        if number == signal.SIGHUP:
            gate.touch()
            next(line for line in process.stderr if "serving" in line)
            process.terminate()
        process.stderr.read()
        assert process.wait(30) == 0
    wait_gone(pids, 2)
    assert not path.exists()


def test_ordinary_requests_leave_the_story_of_a_fault(log: pytest.LogCaptureFixture) -> None:
    """G9: what is logged of requests that went well, prints as well, does not push a fault's stack off the page."""
    with Served(drain=0, access_log=True) as served:
        get(f"{served.url}/raise")
        with requests.Session() as session:
            for _ in range(150):
                session.get(f"{served.url}/print_id", timeout=20)
        assert "boom from the handler" in status_of(served)["faults"][0]["log"]


def test_closing_a_pool_that_is_being_closed(pool: Pool) -> None:
    """W11: a second close ends the patience of the first."""
    job = pool.open(Request("GET", "/endless"))
    closing = threading.Thread(target=lambda: pool.close(drain=float("inf")))
    closing.start()
    wait_until(lambda: pool._supervisor is None)
    assert closing.is_alive()
    pool.close(drain=0)
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(JobClosed):
        while job.read():
            pass


def test_the_environment() -> None:
    """G11: workers have the server's environment, unless the command line names what they have."""
    with Process("tests.cluster_handlers:app", "--workers=1", "--port=0", "--admin=none", env={"GIVEN": "1"}) as served:
        assert "GIVEN" in requests.get(f"{served.url}/look_around?file=/dev/null").json()["names"]
    arguments = ("tests.cluster_handlers:app", "--workers=1", "--port=0", "--admin=none", "--env=OTHER=2")
    with Process(*arguments, env={"GIVEN": "1"}) as served:
        names = requests.get(f"{served.url}/look_around?file=/dev/null").json()["names"]
    assert "GIVEN" not in names
    assert "OTHER" in names
