"""What hurts a new user: settings that are silently wrong, errors that do not help, things that can't be seen."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import requests

import runner
from runner import (
    ConfigurationError,
    InvalidBody,
    InvalidRequest,
    Limits,
    Pool,
    Recycle,
    Request,
    Sandbox,
)
from tests.serving import ROOT, Process, Served, receive_all
from tests.test_cli import blastdoor
from tests.test_pool import get
from tests.waiting import wait_until
from transport import httpx as httpx_transport
from transport import httpx2 as httpx2_transport
from transport.gateway import Gateway
from transport.requests import Transport
from transport.serving.settings import load_settings, passed_over
from transport.serving.settings_reference import WORDS, reference

APP = "tests.handlers:app"


# -- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workrs = 3", "there is no 'workrs': did you mean 'workers'?"),
        (
            'sandbox = { profle = "strict", memory = "300MiB" }',
            "sandbox: there is no 'profle': did you mean 'profile'?",
        ),
        ('sandbox = { memory = "300MiB" }', "sandbox: a sandbox table says its profile"),
        (
            '[mounts."/shop"]\napp = "a:b"\nrecycle = { after_job = 3 }',
            "mount '/shop': recycle: there is no 'after_job'",
        ),
        ('[mounts."/shop"]\napp = "a:b"\nsandbox = { profile = "strict", threads = "x" }', "sandbox.threads takes int"),
        ('[mounts."/shop"]\nap = "a:b"', "mount '/shop': there is no 'ap': did you mean 'app'?"),
        ('[mounts."/shop"]\nworkers = 2', "mount '/shop': it has no 'app'"),
        ('[mounts."/shop"]\napp = "a:b"\ntimeout = "x"', "mount '/shop': timeout takes float, not str"),
        (
            '[mounts."/shop"]\napp = "a:b"\nsandbox = "strickt"',
            "mount '/shop': sandbox is 'none', 'default' or 'strict'",
        ),
        (
            '[mounts."/shop"]\napp = "a:b"\n[mounts."/shop".trusted_headers]\nsecret = "x"',
            "trusted_headers: there is no",
        ),
        ("mounts = 3", "mounts is a table"),
        ('[mounts]\n"/x" = "shop:app"', "mount '/x' is a table"),
        ('app = "a:b"\ntimeout = 0', "timeout is a time in seconds above zero"),
        ('app = "a:b"\nport = 70000', "port is a number from 0 to 65535"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    """G10: what a table does not know is refused, with file, mount and key, and the near one."""
    monkeypatch.chdir(tmp_path)
    Path("blastdoor.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        settings = load_settings(None, {})
        for path, mount in settings.all_mounts.items():
            mount.mount(path, settings.defaults)
    assert words in str(caught.value)
    assert "blastdoor.toml" in str(caught.value) or "strickt" in text
    assert "\n" not in str(caught.value)


def test_settings_from_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: they count more than the file and less than the command line; also PORT and WEB_CONCURRENCY."""
    monkeypatch.chdir(tmp_path)
    Path("blastdoor.toml").write_text('app = "file:app"\nport = 1\nworkers = 1\nqueue = 1\nhost = "::1"\n')
    environ = {
        "PORT": "2",
        "WEB_CONCURRENCY": "3",
        "BLASTDOOR_QUEUE": "4",
        "BLASTDOOR_ACCESS_LOG": "false",
        "BLASTDOOR_TRUSTED_PROXIES": "10.0.0.1,10.0.0.2",
        "BLASTDOOR_APPS": "shop:app /tools=tools:app",
    }
    made = load_settings(None, {"queue": 5}, environ)
    assert (made.port, made.workers, made.queue, made.host, made.access_log) == (2, "3", 5, "::1", False)
    assert made.trusted_proxies == ("10.0.0.1", "10.0.0.2")
    assert {path: mount.app for path, mount in made.all_mounts.items()} == {"/": "shop:app", "/tools": "tools:app"}
    assert load_settings(None, {}, {**environ, "BLASTDOOR_PORT": "6"}).port == 6
    with pytest.raises(ConfigurationError, match=r"^the environment: port takes int"):
        load_settings(None, {}, {"BLASTDOOR_PORT": "tcp://10.0.0.1:80"})


def test_variables_that_are_passed_over() -> None:
    """G10: what is nearly a setting's, or one's that is for a file, is told; what platforms set is not."""
    assert passed_over({"BLASTDOOR_PROT": "2"}) == ["BLASTDOOR_PROT is passed over: did you mean BLASTDOOR_PORT?"]
    (told,) = passed_over({"BLASTDOOR_RECYCLE": "nonsense", "BLASTDOOR_ENV": ""})
    assert told == "BLASTDOOR_RECYCLE is passed over: 'recycle' is for a file, or the command line"
    assert passed_over({"BLASTDOOR_CHDIRS": "/srv/app/"}) == [
        "BLASTDOOR_CHDIRS is passed over: did you mean BLASTDOOR_CHDIR?"
    ]
    for service in ("", "_DB", "_ML", "_LOG", "_WORKERS", "_ADMIN"):
        name = f"BLASTDOOR{service}"
        assert not passed_over(
            {
                f"{name}_SERVICE_HOST": "10.0.0.1",
                f"{name}_SERVICE_PORT": "80",
                f"{name}_SERVICE_PORT_HTTP": "80",
                f"{name}_PORT": "tcp://10.0.0.1:80",
                f"{name}_PORT_80_TCP": "tcp://10.0.0.1:80",
                f"{name}_PORT_80_TCP_ADDR": "10.0.0.1",
                f"{name}_PORT_80_TCP_PORT": "80",
                f"{name}_PORT_80_TCP_PROTO": "tcp",
                f"{name}_NAME": "/web/blastdoor",
            }
        )
    assert not passed_over({"BLASTDOOR_PORT": "80", "BLASTDOOR_APPS": "a:b", "BLASTDOOR_PYTHON": "python3.12"})


def test_the_command_hears_variables_and_adds_some(tmp_path: Path) -> None:
    """G10: PORT is where it listens; --set-env adds to the environment of the workers, --env replaces it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    env = {"PORT": str(port), "KEPT": "yes", "BLASTDOOR_WORKERS": "1"}
    with Process(APP, "--admin=none", "--set-env=ADDED=1", env=env) as served:
        assert served.url.endswith(f":{port}")
        seen = requests.get(f"{served.url}/state", timeout=20).json()["environment"]
    assert (seen["ADDED"], seen["KEPT"]) == ("1", "yes")
    with Process(APP, "--admin=none", "--set-env=ADDED=1", "--env=ONLY=1", env=env) as served:
        seen = requests.get(f"{served.url}/state", timeout=20).json()["environment"]
    assert seen["ADDED"] == seen["ONLY"] == "1"
    assert "KEPT" not in seen


ITSELF = """
import functools, threading
from runner import Pool, Request
class App:
    def __call__(self, request, response):
        return b"hello"
def answer(text, request, response):
    return text
def handler(request, response):
    return b"hello"
def run(given, **settings):
    with Pool(given, workers=1, **settings) as pool, pool.open(Request("GET", "/")) as job:
        print(b"".join(job).decode())
def make():
    {in_factory}
    return handler
{code}
"""
NO_END = b"is started where its own workers import it, and would have no end"


@pytest.mark.parametrize(
    "code",
    [
        "run('itself:handler')",
        "run(handler)",
        "run(functools.partial(answer, b'hello'))",
        "run(App())",
        "run('itself:handler', preload=['itself'])",
        "run('itself:handler', preload=True)",
        "run('itself:handler', path=['.'])",
        "in a factory",
    ],
)
def test_a_module_that_starts_a_pool_of_itself(tmp_path: Path, code: str) -> None:
    """G10: each worker would start another one, and so on: the first one says so."""
    made = "run('itself:make()')" if code == "in a factory" else "pass"
    (tmp_path / "itself.py").write_text(ITSELF.format(code="" if code == "in a factory" else code, in_factory=made))
    assert NO_END in blastdoor("check", "itself:make()", cwd=tmp_path).stderr
    command = "import itself; itself.make()"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=_ours(), capture_output=True, timeout=30)
    assert done.returncode
    assert NO_END in done.stderr


def test_pools_that_lie_too_deep(tmp_path: Path) -> None:
    """G10: where no module's import is to blame, pools lie within each other so deep, and no deeper."""
    deeper = """
from runner import Pool, Request
def handler(request, response):
    with open("begun", "a") as begun:
        begun.write(".")
    with Pool("deeper:handler", workers=1) as pool, pool.open(Request("GET", "/")) as job:
        return b"".join(job)
"""
    (tmp_path / "deeper.py").write_text(deeper)
    called = blastdoor("call", "deeper:handler", "/", cwd=tmp_path)
    assert called.returncode == 1
    assert b"is started within 4 others" in called.stderr
    assert (tmp_path / "begun").stat().st_size == 4


NESTED: dict[str, tuple[str, str]] = {
    "another app of this name": ("run('itself:handler', path=['tenant'])", "tenant"),
    "a function by value": ("run(lambda request, response: b'value')", "value"),
    "another role": (
        "import os\nif os.environ.get('ROLE') != 'inner': run('itself:role', set_env={'ROLE': 'inner'})",
        "inner",
    ),
    "when it is asked": ("", "asked"),
}


@pytest.mark.parametrize("name", NESTED)
def test_pools_within_pools(tmp_path: Path, name: str) -> None:
    """G10: an app that has pools of its own is none of that, even where one is of a module of its name."""
    code, inner = NESTED[name]
    app = (
        ITSELF.format(code=code, in_factory="pass")
        + """
import os
def role(request, response):
    return os.environ["ROLE"].encode()
def asks(request, response):
    if request.path == "/asked":
        return b"asked"
    with Pool("itself:asks", workers=1) as pool, pool.open(Request("GET", "/asked")) as job:
        return b"".join(job)
"""
    )
    (tmp_path / "itself.py").write_text(app)
    (tmp_path / "tenant").mkdir()
    (tmp_path / "tenant" / "itself.py").write_text("def handler(request, response):\n    return b'tenant'\n")
    called = blastdoor("call", "itself:asks" if name == "when it is asked" else "itself:handler", "/", cwd=tmp_path)
    assert called.returncode == 0, called.stderr
    assert inner.encode() in called.stdout + called.stderr


def _ours() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_reference_is_current() -> None:
    """G10: docs/settings.md is what the code says, in every process, and has words for each key."""
    assert all(WORDS.values())
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == reference(), "run scripts/reference"
    code = "from transport.serving.settings_reference import reference; print(reference(), end='')"
    for seed in "0123":  # sets have another order with each
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        made = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True)
        assert made.stdout == page


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    """G8, G10: of pools what it says now holds; what only a restart takes is told; nonsense changes nothing."""
    file = tmp_path / "blastdoor.toml"
    file.write_text(f'app = "{APP}"\nworkers = 1\nport = 0\n')
    with Process(f"--config={file}", "--admin=none") as served:
        file.write_text(f'app = "{APP}"\nworkers = 1\nport = 0\nset_env = {{ NEW = "1" }}\nconnections = 7\n')
        served.process.send_signal(signal.SIGHUP)
        assert "connections" in served.wait_for("taken only by a restart")
        served.wait_for("reloaded in")
        assert requests.get(f"{served.url}/state", timeout=20).json()["environment"]["NEW"] == "1"
        file.write_text("workrs = 1\n")
        served.process.send_signal(signal.SIGHUP)
        assert "did you mean 'workers'" in served.wait_for("can't be read again")
        assert requests.get(f"{served.url}/hello", timeout=20).text == "hello"


def test_sockets_that_systemd_has_opened() -> None:
    """G10: LISTEN_FDS: they are served, told of, and no worker has them."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [sock.getsockname()[1] for sock in (first, second)]
        script = (
            "import os, sys; [os.dup2(int(fd), 3 + n) for n, fd in enumerate(sys.argv[1:3])]; "
            "os.environ.update(LISTEN_FDS='2', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.executable, [sys.executable, '-m', 'transport.cli', 'serve', *sys.argv[3:]])"
        )
        high = [os.dup(sock.fileno()) + 0 for sock in (first, second)]
        command = [sys.executable, "-c", script, *map(str, high), APP, "--workers=1", "--admin=none"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, pass_fds=high) as process:
            for fd in high:
                os.close(fd)
            assert process.stderr is not None
            line = next(line for line in process.stderr if "serving" in line)
            assert all(str(port) in line for port in ports)
            for port in ports:
                seen = requests.get(f"http://127.0.0.1:{port}/state", timeout=20).json()["environment"]
                assert not {"LISTEN_FDS", "LISTEN_PID"} & set(seen)
            process.terminate()
            process.stderr.read()
        assert process.returncode == 0


# -- values -------------------------------------------------------------------------------------------


def test_values_of_the_wrong_kind() -> None:
    """W2, T1: refused at once, in a line that says what is meant."""
    wrong: Any
    for settings, words in (
        ({"sandbox": "stricter"}, "'default', 'strict', or a runner.Sandbox"),
        ({"limits": {"memory": 1}}, r"Limits\(memory='1GiB'\)"),
        ({"recycle": 5}, r"Recycle\(after_jobs=1000\)"),
        ({"path": "x"}, "list of paths"),
        ({"label": 5}, "printable"),
        ({"set_env": {"A": 1}}, "str to str"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            wrong = settings
            Pool(APP, **wrong)
    with pytest.raises(ConfigurationError, match="16 MiB"):
        Limits(memory=1)
    for made in (Transport, httpx_transport.Transport, httpx2_transport.Transport, httpx2_transport.AsyncTransport):
        wrong = made
        with pytest.raises(TypeError, match=r"Transport\(Pool\('shop:app'\)\)"):
            wrong("shop:app")
    wrong = "GET"
    with pytest.raises(TypeError, match="opens a Request"), Pool(APP, workers=1) as pool:
        pool.open(wrong)
    for address in (("127.0.0.1", "5"), "x", ("h", -1), ("h", 5, 6)):
        with pytest.raises(InvalidRequest, match="a host and a port"):
            Request("GET", "/", client=address)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [float("nan"), -1, "5"])
def test_timeouts_that_are_none(pool: Pool, seconds: Any) -> None:
    """W2, X: NaN, negative ones and texts, through every client."""
    with pytest.raises(ConfigurationError):
        pool.open(Request("GET", "/"), read_timeout=seconds)
    with pytest.raises(ConfigurationError):
        pool.open(Request("GET", "/"), lease_timeout=seconds)
    import httpx2

    with httpx2.Client(transport=httpx2_transport.Transport(pool)) as client, pytest.raises(ConfigurationError):
        client.get("http://app.local/", extensions={"timeout": {"read": seconds}})


def test_a_body_that_gives_no_bytes(pool: Pool) -> None:
    """T1: a TypeError, as http.client raises, and no error of the URL."""
    session = requests.Session()
    session.mount("http://app.local/", Transport(pool))
    body: Any = iter([5])
    with session, pytest.raises(TypeError, match="not bytes") as caught:
        session.post("http://app.local/mirror", data=body)
    assert isinstance(caught.value, InvalidBody)


def test_a_sandbox_by_its_name(start: Callable[..., Pool]) -> None:
    """S: its profile's name is enough."""
    pool = start(workers=1, sandbox="default")
    assert pool._config.sandbox == Sandbox.default()
    assert get(pool, "/hello") == b"hello"


def test_options_are_called_by_their_names() -> None:
    """G11: what is wrong with an option is said of it."""
    for option, words in (
        ("--timeout=0", b"timeout is"),
        ("--memory=1", b"memory"),
        ("--host=nohost.invalid", b"--host"),
    ):
        done = blastdoor("serve", APP, option, "--admin=none")
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["call"], ["check"], ["top"], ["doctor"]])
def test_flags_show_no_type(command: list[str]) -> None:
    """G11: what takes no value shows none."""
    assert b"<bool>" not in blastdoor(*command, "--help").stdout


def test_a_missing_extra_is_named() -> None:
    """G11: with ways to have it that work for a checkout, too."""
    for module, extra in (("transport.httpx2", "httpx2"), ("transport.httpx", "httpx")):
        code = f"import sys; sys.modules[{extra!r}] = None; import {module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
        last = done.stderr.splitlines()[-1]
        assert f"pip install {extra}" in last
        assert f".[{extra}]" in last


def test_another_platform_is_told() -> None:
    """W2: before anything else fails."""
    code = "import sys; sys.platform = 'darwin'; import runner"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "needs Linux 5.9" in done.stderr.splitlines()[-1]


# -- servers ------------------------------------------------------------------------------------------


def test_the_gateway_under_granian(tmp_path: Path) -> None:
    """G5: a server that gives ports as texts: they are numbers for the handler."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "granian", "--interface=asgi", f"--port={port}", "tests.served_gateway:gateway"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:

            def answers() -> bool:
                try:
                    return requests.get(f"http://127.0.0.1:{port}/hello", timeout=5).text == "hello"
                except requests.ConnectionError:
                    return False

            wait_until(answers, 60)
            for _ in range(5):
                assert (
                    requests.post(f"http://127.0.0.1:{port}/mirror", data=b"x" * 70_000, timeout=20).content
                    == b"x" * 70_000
                )
        finally:
            process.terminate()
            process.wait(30)


def test_a_server_that_does_not_wait(pool: Pool) -> None:
    """G5, I13: one whose `receive` gives messages without end after the body does not make the host grow."""
    received = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        await anyio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/hello",
        "query_string": b"",
        "headers": [],
        "client": ["127.0.0.1", "5"],
        "server": ["127.0.0.1", "80"],
    }
    anyio.run(Gateway(pool), scope, receive, send)
    assert sent[0]["status"] == 200
    assert received <= 3


# -- seeing -------------------------------------------------------------------------------------------


def test_the_app_s_errors_at_the_level_of_warnings(
    start: Callable[..., Pool], caplog: pytest.LogCaptureFixture
) -> None:
    """W9: stderr is WARNING, stdout INFO: a 500's reason shows where only warnings are."""
    caplog.set_level(logging.INFO, "blastdoor")
    pool = start("tests.talkers:app", workers=1, label="/talk")
    get(pool, "/")
    pool.close()
    levels = {record.getMessage().rpartition(": ")[2]: record.levelno for record in caplog.records}
    assert levels["said on stdout"] == logging.INFO
    assert levels["said on stderr"] == levels["said past Python"] == logging.WARNING
    assert all(record.getMessage().startswith("/talk: worker ") for record in caplog.records)


def test_a_crash_s_stack_once(start: Callable[..., Pool], caplog: pytest.LogCaptureFixture) -> None:
    """W9, F1: once, and without our own frames."""
    caplog.set_level(logging.INFO, "blastdoor")
    pool = start(workers=1)
    with pytest.raises(runner.WorkerDied):
        pool.open(Request("GET", "/die?how=segfault"))
    pool.close()
    text = caplog.text
    assert text.count("Fatal Python error: Segmentation fault") == 1
    assert "do_die" in text
    assert "/runner/worker/" not in text


def test_what_fails_over_and_over_is_counted(
    start: Callable[..., Pool], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """F8: a broken import is logged whole once, and counted then."""
    broken = tmp_path / "broken"
    (tmp_path / "breaks.py").write_text(
        f"import os\nif os.path.exists({str(broken)!r}):\n    raise RuntimeError('it is broken')\n"
        "def app(request, response):\n    return b'whole'\n"
    )
    pool = start("breaks:app", path=[tmp_path], workers=1)
    broken.touch()
    os.kill(pool.workers()[0].pid, signal.SIGKILL)
    wait_until(lambda: "the same as before" in log.text)
    pool.close()
    assert log.text.count("RuntimeError: it is broken\n") == 1


# -- generations --------------------------------------------------------------------------------------

PACKAGE = {
    "shop/__init__.py": "",
    "shop/prices.py": "PRICE = 'old'\n",
    "shop/web.py": "from shop.prices import PRICE\ndef app(request, response):\n    return PRICE.encode()\n",
}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The directory of an app that is a package."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preload": True},
        {"preload": ["json"], "workers": 2},
        {"sandbox": "default"},
        {"sandbox": "strict"},
        {"recycle": Recycle(after_jobs=1)},
    ],
)
def test_a_generation_s_code_stays(start: Callable[..., Pool], shop: Path, settings: dict[str, Any]) -> None:
    """G8: whatever is edited, and dies: workers, the template process; broken, changed and removed files."""
    pool = start("shop.web:app", path=[shop], **{"workers": 1, **settings})
    assert get(pool, "/") == b"old"
    for edit in ("PRICE = 'new'\n", "a syntax error", None):
        if edit is None:
            (shop / "shop" / "prices.py").unlink()
        else:
            (shop / "shop" / "prices.py").write_text(edit)
        assert pool._supervisor is not None
        for victim in ("worker", "template"):
            before = {worker.pid for worker in pool.workers()}
            zygote = pool._supervisor._zygote
            if victim == "worker":
                for pid in before:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            elif zygote is not None:
                os.kill(zygote.pid, signal.SIGKILL)
            wait_until(lambda before=before: bool({w.pid for w in pool.workers() if w.state == "idle"} - before))  # type: ignore[misc]
            assert get(pool, "/", lease_timeout=30) == b"old"
    (shop / "shop" / "prices.py").write_text("PRICE = 'newer'\n")
    pool.close()
    assert get(start("shop.web:app", path=[shop], workers=1), "/") == b"newer"


def test_a_failed_reload_changes_nothing(shop: Path, tmp_path: Path) -> None:
    """G8: after a reload that has failed the old code goes on, also when workers die, and in a strict mount."""
    table = {"app": "shop.web:app", "workers": 1, "sandbox": "strict"}
    place = os.getcwd()
    os.chdir(shop)
    try:
        with Served({"/": table}, drain=0) as served:
            assert requests.get(served.url, timeout=20).text == "old"
            (shop / "shop" / "prices.py").write_text("PRICE = broken\n")
            assert not served.reload()
            for _ in range(3):
                assert requests.get(served.url, timeout=20).text == "old"
            (shop / "shop" / "prices.py").write_text("PRICE = 'new'\n")
            assert requests.get(served.url, timeout=20).text == "old"
            assert served.reload()
            assert requests.get(served.url, timeout=20).text == "new"
    finally:
        os.chdir(place)


def test_titles(start: Callable[..., Pool]) -> None:
    """G9: ps tells a worker, and whose."""
    pool = start(workers=1, label="/shop")
    (worker,) = pool.workers()
    process = psutil.Process(worker.pid)
    assert process.cmdline()[0].rstrip("\0") == "blastdoor: worker /shop"
    parent = process.parent()
    assert parent is not None
    assert parent.cmdline()[0].rstrip("\0") == "blastdoor: template /shop"


def test_what_is_shown_of_requests(tmp_path: Path) -> None:
    """G9: busy workers and faults with method and path, app and version; by the page's data, and by top, once."""
    with Served(drain=0) as served:
        requests.get(f"{served.url}/raise?secret=1", timeout=20)
        here, go = tmp_path / "here", tmp_path / "go"
        waiting = threading.Thread(target=requests.get, args=(f"{served.url}/wait_for?here={here}&go={go}",))
        waiting.start()
        wait_until(here.exists)
        status = requests.get(f"{served.admin}/-/status.json", timeout=20).json()
        shown = blastdoor("top", served.admin).stdout.decode()
        go.touch()
        waiting.join()
    assert status["version"] == runner.__version__
    assert status["pools"]["/"]["app"] == APP
    assert any(worker["request"].startswith("GET /wait_for?") for worker in status["pools"]["/"]["workers"])
    assert status["faults"][0]["request"] == "GET /raise?secret=1"
    assert "GET /wait" in shown
    assert "GET" in shown.partition("last faults")[2]


def test_the_access_log() -> None:
    """G9: what was no request stands there with client and reason; query strings can be left out."""
    with Process(APP, "--port=0", "--workers=1", "--admin=none", "--no-access-log-queries") as served:
        host, port = re.findall(r"//(.*):(\d+)", served.url)[0]
        for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(data)
                receive_all(client)
        requests.get(f"{served.url}/hello?secret=1", timeout=20)
        assert "127.0.0.1" in served.wait_for('"-" 400 refused: ')
        assert "of head" in served.wait_for('"-" 431 refused: ')
        assert "secret" not in served.wait_for('"GET /hello" 200')


def test_what_holds_is_said_at_the_start(tmp_path: Path) -> None:
    """G10: each mount's profile and limits; and what an ASGI app has to know of streams."""
    with Process(
        "/one=tests.handlers:app",
        "/two=tests.asgi_apps:app",
        "--sandbox=strict",
        "--timeout=30",
        "--port=0",
        "--admin=none",
    ) as served:
        line = served.wait_for("/one: tests.handlers:app")
        assert "sandbox strict, memory 1024 MiB, timeout 30 s" in line
        served.wait_for("serving")
        assert sum("as many requests at once as there are workers" in line for line in served.lines) == 1
    with Process("tests.asgi_apps:app", "--workers=2", "--concurrency=8", "--port=0", "--admin=none") as served:
        assert not any("as many requests at once" in line for line in served.lines)
        assert any("workers 2 of 8 jobs at once" in line for line in served.lines)


def test_log_lines_of_mounts() -> None:
    """G9: with several mounts each line of a worker says whose it is."""
    with Process(
        "/one=tests.handlers:app", "/two=tests.handlers:app", "--workers=1", "--port=0", "--admin=none"
    ) as served:
        requests.get(f"{served.url}/two/print_id", timeout=20)
        assert "/two: worker " in served.wait_for("printed in")
        requests.get(f"{served.url}/one/raise", timeout=20)
        assert " ERROR /one: job " in served.wait_for("the handler raised")


def test_version() -> None:
    """W2: as the distribution has it."""
    assert blastdoor("--version").stdout.decode().split()[1] == runner.__version__
    assert json.loads(json.dumps(runner.__version__))
