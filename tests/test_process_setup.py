"""What `serve` takes on before it serves, and options that users of other servers know."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import requests

from runner import ConfigurationError, Pool
from tests.serving import ROOT, Process, Served, receive_all
from tests.test_cli import blastdoor
from tests.waiting import wait_until
from transport.serving.addresses import Listeners, name_of
from transport.serving.notifier import Notifier
from transport.serving.process_setup import Account, EnvFile, PidFile
from transport.serving.settings import Settings, load_settings

QUIET = ("--port=0", "--admin=none", "--workers=1")

SHOP = """
import os
def app(request, response):
    return f"{os.environ.get('GREETING')} {os.environ.get('OTHER')} {os.getcwd()} {os.getpid()}".encode()
"""


def get(served: Process) -> str:
    return requests.get(served.url, timeout=20).text


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with an app."""
    directory = tmp_path / "shop"
    directory.mkdir()
    (directory / "shop.py").write_text(SHOP)
    return directory


def test_an_app_in_another_directory(shop: Path, tmp_path: Path) -> None:
    """G10: --app-dir says where the app is, --chdir where all of it works."""
    with Process("shop:app", f"--app-dir={shop}", *QUIET, cwd=tmp_path) as served:
        assert get(served).split()[2] == str(tmp_path)
    with Process("shop:app", "--chdir=shop", *QUIET, cwd=tmp_path) as served:
        assert get(served).split()[2] == str(shop)


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_file_keeps_its_place(shop: Path, tmp_path: Path, fronts: int) -> None:
    """G10: the configuration file is looked for before, and again at a reload; apps are found from the new place."""
    (tmp_path / "blastdoor.toml").write_text('app = "shop:app"\nchdir = "shop"\nset_env = { GREETING = "one" }\n')
    options = "--port=0", "--admin=none", f"--workers={fronts}", f"--fronts={fronts}"
    with Process(*options, cwd=tmp_path) as served:
        assert get(served).split()[0] == "one"
        (tmp_path / "blastdoor.toml").write_text('app = "shop:app"\nchdir = "shop"\nset_env = { GREETING = "two" }\n')
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: get(served).split()[0] == "two", 30)


def test_variables_from_a_file(shop: Path) -> None:
    """G10: workers see them, what the environment has counts more, and a reload reads them again."""
    file = shop / "variables"
    file.write_text('# of the shop\nexport GREETING="hi"\nOTHER=from_file\n')
    with Process("shop:app", f"--env-file={file}", *QUIET, cwd=shop, env={"OTHER": "own"}) as served:
        assert get(served).split()[:2] == ["hi", "own"]
        file.write_text("GREETING=anew\n")
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: get(served).split()[0] == "anew", 30)


def test_what_a_file_has_set_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: a variable that is in the file no more is gone; one that has another value by now is somebody else's."""
    file = tmp_path / "variables"
    file.write_text("ONE_OF_OURS=1\nTWO_OF_OURS=2\n")
    env_file = EnvFile()
    env_file.load(str(file))
    assert os.environ["ONE_OF_OURS"] == "1"
    monkeypatch.setenv("TWO_OF_OURS", "changed")
    file.write_text("")
    env_file.load(str(file))
    assert "ONE_OF_OURS" not in os.environ
    assert os.environ["TWO_OF_OURS"] == "changed"


def test_a_pid_file(shop: Path, tmp_path: Path) -> None:
    """G10: it has the server's pid as long as it runs; another server does not take it over."""
    file = tmp_path / "run.pid"
    file.write_text("999999999\n")  # of one that died
    with Process("shop:app", f"--pid={file}", *QUIET, cwd=shop) as served:
        assert int(file.read_text()) == served.process.pid
        other = blastdoor("serve", "shop:app", f"--pid={file}", *QUIET, cwd=shop)
        assert other.returncode == 2
        assert b"names process %d, which runs" % served.process.pid in other.stderr
        assert int(file.read_text()) == served.process.pid
    assert not file.exists()


def test_somebody_else_s_pid_file(tmp_path: Path) -> None:
    """G10: one that was taken over is left alone."""
    file = tmp_path / "run.pid"
    with PidFile(str(file)):
        file.write_text("1\n")
    assert file.read_text() == "1\n"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--app-dir=nowhere", "app_dir: there is no directory"),
        ("--chdir=nowhere", "chdir: "),
        ("--env-file=nowhere", "env_file: "),
        ("--pid=nowhere/run.pid", "pid: "),
        ("--per-provider=openai", "per_provider has the form NAME=N"),
        ("--max-requests-jitter=3", "give that too"),
        ("--max-rss=much", "'much' is not a size"),
    ],
)
def test_what_can_not_work(shop: Path, option: str, words: str) -> None:
    """G10: one line that says what is wrong, and exit code 2."""
    done = blastdoor("serve", "shop:app", option, *QUIET, cwd=shop)
    assert done.returncode == 2
    assert words.encode() in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_recycling_by_options(shop: Path) -> None:
    """G10, W9: --max-requests and its kin replace workers."""
    with Process("shop:app", "--max-requests=2", "--max-requests-jitter=0", *QUIET, cwd=shop) as served:
        pids = [get(served).split()[3] for _ in range(6)]
        assert len(set(pids)) == 3
    with Process("shop:app", "--max-rss=1MiB", *QUIET, cwd=shop) as served:
        assert len({get(served).split()[3] for _ in range(3)}) == 3
    with Process("shop:app", "--max-age=0.01", *QUIET, cwd=shop) as served:
        first = get(served).split()[3]
        wait_until(lambda: get(served).split()[3] != first)


def test_limits_of_providers_by_options() -> None:
    """G10, W8: --per-provider, and a table of a file."""
    from transport.cli.serve import _limits

    assert _limits(["openai=8", "a=b=2"]) == {"openai": 8, "a=b": 2}
    settings = load_settings(None, {"mounts": {"/": {"app": "a:b"}}, "per_provider": {"openai": 8}})
    (mount,) = settings.all_mounts.values()
    pool = mount.pool_with("/", settings.defaults)
    assert isinstance(pool, Pool)
    assert pool._options.queueing.per_provider == {"openai": 8}
    with pytest.raises(ConfigurationError, match="1 or more"):
        mount.pool_with("/", {**settings.defaults, "per_provider": {"openai": 0}})


def test_several_addresses(shop: Path, tmp_path: Path) -> None:
    """G10: --bind is repeatable: IPv4, IPv6 on the same port, and a unix socket with the permissions that are asked."""
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    binds = f"--bind=0.0.0.0:{port}", f"--bind=[::]:{port}", f"--bind=unix:{path}"
    with Process("shop:app", *binds, "--uds-mode=600", "--admin=none", "--workers=1", cwd=shop):
        for host in ("127.0.0.1", "[::1]"):
            assert requests.get(f"http://{host}:{port}/", timeout=20).status_code == 200
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert receive_all(client).startswith(b"HTTP/1.1 200")
    assert not path.exists()


def test_who_is_believed_where_there_are_several_addresses(tmp_path: Path) -> None:
    """G4, G10: a proxy on the unix socket is; who comes by TCP beside it is not."""
    path = str(tmp_path / "socket")
    forged = b"GET /echo HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 9.9.9.9\r\nConnection: close\r\n\r\n"
    with Served(bind=["127.0.0.1:0", f"unix:{path}"], trusted_proxies=["10.0.0.1"], admin="none") as served:
        with served.connect() as client:
            client.sendall(forged)
            assert b"9.9.9.9" not in receive_all(client).partition(b'"client"')[2]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(forged)
            assert b"9.9.9.9" in receive_all(client).partition(b'"client"')[2]


def test_addresses_by_two_ways() -> None:
    """G11: `bind` names all of them; what counts more stands in the place of all that counts less."""
    app = {"app": "a:b"}
    with pytest.raises(ConfigurationError, match="leave out host, port"):
        load_settings(None, {**app, "bind": ["1.2.3.4:5"], "host": "::", "port": 3})
    assert load_settings(None, {**app, "port": 3}, {"BLASTDOOR_BIND": "1.2.3.4:5,unix:/x"}).bind == ()
    assert load_settings(None, {**app, "bind": [":9"]}, {"PORT": "80"}).bind == (":9",)


def test_the_first_address_is_given_back(tmp_path: Path) -> None:
    """G11: where the second can't be had, nothing is left of the first."""
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        binds = [f"unix:{path}", f"127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(ConfigurationError, match="choose another with --bind"):
            Served(bind=binds)
    assert not path.exists()


@contextlib.contextmanager
def listening(path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """What systemd has: a socket for notifications; gives what receives the next one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(30)

        def next_one() -> dict[str, str]:
            lines = receiver.recv(4096).decode().splitlines()
            return dict(line.split("=", 1) for line in lines)

        yield next_one


@pytest.mark.parametrize("fronts", [1, 2])
def test_systemd_is_told(shop: Path, tmp_path: Path, fronts: int) -> None:
    """G10: sd_notify(3): ready, reloading, ready again, stopping; the watchdog's pings; no worker sees the socket."""
    (shop / "shop.py").write_text("import os\napp = lambda request, response: repr(sorted(os.environ)).encode()\n")
    options = f"--fronts={fronts}", f"--workers={fronts}", "--port=0", "--admin=none"
    with listening(tmp_path / "notify") as next_one:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        with Process("shop:app", *options, cwd=shop, env=env) as served:
            ready = next_one()
            assert ready["READY"] == "1"
            assert served.url in ready["STATUS"]
            assert [next_one() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
            for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
                assert name not in get(served)
            before = time.monotonic_ns() // 1000
            os.kill(served.process.pid, signal.SIGHUP)
            told = [one for one in iter(next_one, ready) if "WATCHDOG" not in one]
            assert [sorted(one) for one in told] == [["MONOTONIC_USEC", "RELOADING"]]
            assert before <= int(told[0]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            (shop / "shop.py").write_text("no python")
            os.kill(served.process.pid, signal.SIGHUP)
            *_, failed = iter_until(next_one, "READY")
            assert "the last reload failed" in failed["STATUS"]
            served.process.terminate()
            *_, stopping = iter_until(next_one, "STOPPING")
            assert stopping["STATUS"] == "draining"


def iter_until(next_one: Callable[[], dict[str, str]], key: str) -> Iterator[dict[str, str]]:
    """Notifications up to the first with this key."""
    while key not in (one := next_one()):
        yield one
    yield one


def test_a_watchdog_of_another_process(tmp_path: Path) -> None:
    """G10: its variables are for the process that they name (sd_watchdog_enabled(3)); an abstract name is one too."""
    environ = {"NOTIFY_SOCKET": "@blastdoor-test", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1", "OTHER": "x"}
    notifier = Notifier(environ)
    assert environ == {"OTHER": "x"}
    asyncio.run(asyncio.wait_for(notifier.keep_alive(), 5))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0blastdoor-test")
        notifier.stopping()
        assert receiver.recv(100).startswith(b"STOPPING=1")
    notifier.stopping()  # nobody listens: that is logged, and no more


def test_pid_1(shop: Path) -> None:
    """G10: the first process of a container reaps what is none of its own, passes signals on, and ends as its child."""
    program = (
        "import os, sys\n"
        "if not os.fork():\n"
        "    if not os.fork(): os.execvp('sleep', ['sleep', '0.2'])\n"  # an orphan, which becomes a child of pid 1
        "    os._exit(0)\n"
        "os.wait()\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'transport.cli', 'serve', 'shop:app', *{QUIET!r}])"
    )
    spaces = ["unshare", "--pid", "--fork", "--mount-proc", *(["--map-root-user"] if os.getuid() else [])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*spaces, sys.executable, "-c", program], cwd=shop, env=env, stderr=subprocess.PIPE, text=True
    ) as unshare:
        assert unshare.stderr is not None
        try:
            url = next(line for line in unshare.stderr if "serving" in line).split()[-1]
            (first,) = psutil.Process(unshare.pid).children()
            (server,) = (child for child in first.children() if child.name() != "sleep")
            assert requests.get(url, timeout=20).text.split()[3] != "1"
            wait_until(lambda: first.children() == [server])  # nothing that waits to be reaped either
            first.send_signal(signal.SIGHUP)
            next(line for line in unshare.stderr if "reloaded in" in line)
            first.send_signal(signal.SIGTERM)
            assert "stopped" in unshare.stderr.read()
            assert unshare.wait(30) == 0
        finally:
            if unshare.poll() is None:
                unshare.kill()


def test_pid_1_passes_on_what_is_meant_for_it(tmp_path: Path) -> None:
    """G10: sockets and a watchdog for pid 1 are its child's, which serves."""
    program = (
        "import os, socket, sys\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "os.dup2(os.dup(listener.fileno()), 3)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID='1', WATCHDOG_PID='1', WATCHDOG_USEC='100000')\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'transport.cli', 'serve', 'shop:app', *{QUIET!r}])"
    )
    (tmp_path / "shop.py").write_text(SHOP)
    spaces = ["unshare", "--pid", "--fork", "--mount-proc", *(["--map-root-user"] if os.getuid() else [])]
    with listening(tmp_path / "notify") as next_one:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen([*spaces, sys.executable, "-c", program], cwd=tmp_path, env=env) as unshare:
            try:
                told = next_one()
                assert told["READY"] == "1"
                assert requests.get(told["STATUS"].split()[-1], timeout=20).status_code == 200
                assert next_one() == {"WATCHDOG": "1"}
                (first,) = psutil.Process(unshare.pid).children()
                first.terminate()
                assert unshare.wait(30) == 0
            finally:
                if unshare.poll() is None:
                    unshare.kill()


def test_pid_1_ends_as_its_child_does(shop: Path) -> None:
    """G10: its exit status tells whoever runs the container what went wrong."""
    spaces = ["unshare", "--pid", "--fork", "--mount-proc", *(["--map-root-user"] if os.getuid() else [])]
    command = [*spaces, sys.executable, "-m", "transport.cli", "serve", "nosuch:app", *QUIET]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=shop, env=env, capture_output=True, check=False, timeout=60).returncode == 1


def interpreter_for_others() -> str:
    """An interpreter of this version that other users can run, empty where there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for found in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        check = f"import sys, os; os.setuid({NOBODY}); open(os.__file__); open(sys.executable)"
        if (
            Path(found).exists()
            and not subprocess.run([found, "-c", check], capture_output=True, check=False).returncode
        ):
            return found
    return ""


NOBODY = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who alone can become another user")
@pytest.mark.parametrize("fronts", [1, 2])
def test_another_user(tmp_path: Path, fronts: int) -> None:
    """G10: root binds, and is dropped for good, with its groups; a unix socket is the user's."""
    python = interpreter_for_others()
    if not python:
        pytest.skip("no interpreter here that other users can run")
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o755)
        (directory / "shop.py").write_text(
            "import os\n"
            "def app(request, response):\n"
            "    return repr([os.getresuid(), os.getresgid(), os.getgroups(), os.environ['HOME']]).encode()\n"
        )
        path = directory / "socket"
        packages = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry.endswith("-packages"))])
        options = f"--bind=unix:{path}", "--bind=127.0.0.1:80", "--user=nobody", f"--fronts={fronts}", "--workers=2"
        command = [python, "-m", "transport.cli", "serve", "shop:app", "--admin=none", *options]
        env = {**os.environ, "PYTHONPATH": packages}
        with subprocess.Popen(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True) as served:
            assert served.stderr is not None
            try:
                next(line for line in served.stderr if "serving" in line)
                told = requests.get("http://127.0.0.1/", timeout=20).text
                assert told == f"[({NOBODY}, {NOBODY}, {NOBODY}), ({NOBODY}, {NOBODY}, {NOBODY}), [{NOBODY}], {HOME!r}]"
                assert path.stat().st_uid == NOBODY
                assert {uid for process in tree(served.pid) for uid in process.uids()} == {NOBODY}
            finally:
                served.terminate()
                assert "stopped" in served.stderr.read()
    finally:
        shutil.rmtree(directory)


HOME = pwd.getpwuid(NOBODY).pw_dir


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user=nosuch"], "there is no user 'nosuch'"),
        (["--group=nosuch"], "there is no group 'nosuch'"),
        (["--user=99999999999"], "there is no user"),
        (["--bind=nothing"], "bind takes HOST:PORT"),
        (["--bind=unix:"], "bind takes a path"),
        (["--bind=:8000", "--uds=/x"], "leave out uds"),
    ],
)
def test_addresses_and_users_that_make_no_sense(shop: Path, options: list[str], words: str) -> None:
    """G11: one line that says what is wrong, and exit code 2."""
    done = blastdoor("serve", "shop:app", *options, "--admin=none", cwd=shop)
    assert (done.returncode, words in done.stderr.decode()) == (2, True), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_root_becomes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """G11: an ordinary user is told so at once; to stay who one is needs nothing."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getegid", lambda: 1234)
    assert Account.of("1234", "1234") is None
    with pytest.raises(ConfigurationError, match="user: only root"):
        Account.of("nobody", "")
    with pytest.raises(ConfigurationError, match="group: only root"):
        Account.of("", "0")


def test_addresses_that_are_one(shop: Path) -> None:
    """G11: two of a server's own addresses at one port are told in a line, whatever way they are named."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    for options in (
        [f"--bind=127.0.0.1:{port}", f"--bind=127.0.0.1:{port}"],
        [f"--bind=127.0.0.1:{port}", f"--bind=0.0.0.0:{port}"],
        ["--bind=unix:one.sock", "--bind=unix:one.sock"],
        [f"--port={port}", f"--admin=127.0.0.1:{port}"],
    ):
        admin = [] if any("admin" in option for option in options) else ["--admin=none"]
        done = blastdoor("serve", "shop:app", "--workers=1", *options, *admin, cwd=shop)
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stderr
        assert not (shop / "one.sock").exists()


def test_an_abstract_socket_of_systemd_s() -> None:
    """G10, G4: it has a name, and its peer is a proxy as on any unix socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0blastdoor-abstract")
        assert name_of(listener) == "unix:@blastdoor-abstract"
        with Served(drain=0, admin="none") as served:
            served.service.listeners.sockets.append(listener)
            listener.listen()
            front = served.service.front
            assert front is not None
            served.call(lambda: front.listen([listener]))
            with socket.socket(socket.AF_UNIX) as client:
                wait_until(lambda: client.connect_ex("\0blastdoor-abstract") == 0)
                client.sendall(
                    b"GET /echo HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 9.9.9.9\r\nConnection: close\r\n\r\n"
                )
                assert b"9.9.9.9" in receive_all(client).partition(b'"client"')[2]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who alone can give what it has to others")
def test_a_path_that_became_a_link(tmp_path: Path) -> None:
    """G10: what somebody has put in a socket's place meanwhile does not become the user's: it may be root's."""
    secret = tmp_path / "secret"
    secret.write_text("root's")
    listeners = Listeners.of(msgspec.convert({"app": "a:b", "uds": str(tmp_path / "socket")}, Settings))
    try:
        (tmp_path / "socket").unlink()
        (tmp_path / "socket").symlink_to(secret)
        listeners.give(NOBODY, NOBODY)
        assert secret.stat().st_uid == 0
    finally:
        listeners.close()


def test_a_pid_file_that_can_not_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: as in a directory of root's, once it has become another user: it names nobody afterwards."""
    file = tmp_path / "run.pid"

    def refuse(path: Path) -> None:
        raise PermissionError(1, "not yours")

    with PidFile(str(file)):
        assert file.read_text() == f"{os.getpid()}\n"
        monkeypatch.setattr(Path, "unlink", refuse)
    assert file.read_text() == ""
    monkeypatch.undo()
    with PidFile(str(file)):
        assert int(file.read_text()) == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_pid_1_that_was_told_to_ignore_ends(shop: Path) -> None:
    """G10: SIGCHLD that is ignored by whoever has started it does not keep the container for ever."""
    spaces = ["unshare", "--pid", "--fork", "--mount-proc", *(["--map-root-user"] if os.getuid() else [])]
    serve = [sys.executable, "-m", "transport.cli", "serve", "nosuch:app", *QUIET]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*spaces, "sh", "-c", "trap '' CHLD; exec \"$@\"", "sh", *serve],
        cwd=shop,
        env=env,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1


def test_a_reload_as_it_stops(tmp_path: Path) -> None:
    """G9, G10: SIGHUP, then SIGTERM: it stops, and systemd is told nothing more, least of all that it is ready."""
    (tmp_path / "shop.py").write_text(SHOP)
    with listening(tmp_path / "notify") as next_one:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with Process("shop:app", *QUIET, cwd=tmp_path, env=env) as served:
            assert next_one()["READY"] == "1"
            (tmp_path / "shop.py").write_text(
                f"import time\nopen({str(tmp_path / 'loads')!r}, 'w')\ntime.sleep(1)\n" + SHOP
            )
            os.kill(served.process.pid, signal.SIGHUP)
            wait_until((tmp_path / "loads").exists)
            served.process.terminate()
            *_, last = iter_until(next_one, "STOPPING")
            assert last["STATUS"] == "draining"
            assert served.process.wait(30) == 0
    assert not any("Traceback" in line for line in served.lines)
