"""runner.sandbox: what a profile grants works, what it asks for and can't have is an error, and nothing is left."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from runner import (
    ConfigurationError,
    HandlerRaised,
    Pool,
    Recycle,
    Request,
    Sandbox,
    StartError,
    WorkerDied,
)
from runner.events import Event, WorkerEnded
from runner.sandbox import probe
from tests.processes import is_gone, kill, wait_gone
from tests.serving import ROOT
from tests.waiting import wait_until

CONFINED = "tests.confined:app"
PROFILES = [pytest.param(Sandbox.default, id="default"), pytest.param(Sandbox.strict, id="strict")]
Make = Callable[..., Sandbox]
every_profile = pytest.mark.parametrize("make", PROFILES)


def get(pool: Pool, target: str) -> str:
    with pool.open(Request("GET", target)) as job:
        return b"".join(job).decode()


@every_profile
@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("/numpy", "8000000.0"),
        ("/sqlite", "4950"),
        ("/files", "1000"),
        ("/threads", "28"),
        ("/zone", "Europe/Berlin"),
        ("/home", "True"),
    ],
)
def test_honest_work(start: Callable[..., Pool], make: Make, target: str, answer: str) -> None:
    """S: numbers, databases, temporary files, threads and time zones are there."""
    assert get(start(CONFINED, workers=1, sandbox=make()), target) == answer


@every_profile
@pytest.mark.parametrize("app", ["flask_app", "fastapi_app", "django_app"])
def test_frameworks(start: Callable[..., Pool], make: Make, app: str) -> None:
    """S: an app of each framework answers from inside."""
    name = {"django_app": "tests.frameworks.django_app:wsgi"}.get(app, f"tests.frameworks.{app}:app")
    assert "world" in get(start(name, workers=1, sandbox=make()), "/hello")


@every_profile
def test_preloaded_modules(start: Callable[..., Pool], make: Make) -> None:
    """S: trusted modules are imported once, outside; the handler itself never is."""
    pool = start("tests.frameworks.flask_app:app", workers=1, sandbox=make(), preload=["flask", "werkzeug.wrappers"])
    assert "world" in get(pool, "/hello")


@pytest.fixture
def tls_server() -> Iterator[tuple[int, trustme.CA]]:
    """An HTTPS server on loopback, and who vouches for it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"over TLS")

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, authority
        server.shutdown()
        thread.join()


@every_profile
def test_a_tls_connection_where_it_is_granted(
    start: Callable[..., Pool], make: Make, tls_server: tuple[int, trustme.CA], tmp_path: Path
) -> None:
    """S: to a named port, and nowhere else; the name is looked up in /etc/hosts."""
    port, authority = tls_server
    trust = tmp_path / "trust.pem"
    authority.cert_pem.write_to_path(str(trust))
    tmp_path.chmod(0o755)
    trust.chmod(0o644)
    pool = start(CONFINED, workers=1, sandbox=make(connect=[port], readable=[trust]))
    target = f"/tls?url=https://localhost:{port}/&trust={trust}"
    assert get(pool, target) == "over TLS"


@every_profile
def test_granted_paths(start: Callable[..., Pool], make: Make, tmp_path: Path) -> None:
    """S: what is named can be read, or written, and its neighbors can't."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text").write_text("to be read")
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    (tmp_path / "secret").write_text("not to be read")
    sandbox = make(readable=[tmp_path / "in"], writable=[tmp_path / "out"])
    pool = start(CONFINED, workers=1, sandbox=sandbox, debug=True)
    assert get(pool, f"/read?path={tmp_path / 'in' / 'text'}") == "to be read"
    assert get(pool, f"/write?path={tmp_path / 'out'}") == "4"
    assert (tmp_path / "out" / "made").read_bytes() == b"made"
    for target in (f"/read?path={tmp_path / 'secret'}", f"/write?path={tmp_path / 'in'}"):
        with pytest.raises(Exception, match=r"PermissionError|FileNotFoundError"):
            get(pool, target)


@every_profile
def test_processes_where_they_are_granted(start: Callable[..., Pool], make: Make) -> None:
    """S: a shell runs then."""
    assert get(start(CONFINED, workers=1, sandbox=make(processes=True)), "/shell").strip() == "42"


@every_profile
def test_the_environment(start: Callable[..., Pool], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """S, W2: nothing of the host's, but what is named."""
    monkeypatch.setenv("HOST_SECRET", "x")
    names = set(get(start(CONFINED, workers=1, sandbox=make(), env={"NAMED": "y"}), "/environment").split(","))
    assert {"NAMED", "HOME", "TMPDIR"} <= names
    assert "HOST_SECRET" not in names
    others = names - {"NAMED", "HOME", "TMPDIR", "LANG", "LC_CTYPE", "PATH", "MALLOC_ARENA_MAX"}
    assert all(name.endswith("_THREADS") for name in others)


def test_a_strict_worker_has_one_job(start: Callable[..., Pool]) -> None:
    """S: and its successor is another process."""
    pool = start(CONFINED, workers=1, sandbox=Sandbox.strict(), recycle=Recycle(above_rss="1GiB"))
    events: list[Event] = []
    pool.subscribe(events.append)
    for _ in range(3):
        assert get(pool, "/home") == "True"
    wait_until(lambda: sum(isinstance(event, WorkerEnded) for event in events) == 3)
    assert [event.jobs for event in events if isinstance(event, WorkerEnded)] == [1, 1, 1]


@every_profile
def test_deaths_inside(start: Callable[..., Pool], make: Make) -> None:
    """S, F1: the fault tells the signal, or the exit code, as of any worker."""
    pool = start(CONFINED, workers=1, sandbox=make())
    with pytest.raises(WorkerDied) as died:
        get(pool, "/crash")
    assert died.value.fault.signal == "SIGSEGV"
    with pytest.raises(WorkerDied) as died:
        get(pool, "/exit")
    assert died.value.fault.exit_code == 7
    assert get(pool, "/home") == "True"


@every_profile
def test_the_zygote_is_killed(start: Callable[..., Pool], make: Make) -> None:
    """S, W9: everything that it has started ends with it, in namespaces or not, and the pool recovers."""
    pool = start(CONFINED, workers=2, sandbox=make())
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    zygote = pool._supervisor._zygote.pid
    started = [child.pid for child in psutil.Process(zygote).children(recursive=True)]
    assert len(started) >= 2
    kill(zygote)
    wait_gone(started, 5)
    wait_until(lambda: pool.stats().idle == 2)
    assert get(pool, "/home") == "True"


@every_profile
def test_the_host_is_killed(make: Make) -> None:
    """S, W9: nothing outlives it."""
    code = (
        "import sys; from runner import Pool, Sandbox\n"
        f"pool = Pool({CONFINED!r}, workers=2, sandbox=Sandbox.{make().profile}()).start()\n"
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        started = [child.pid for child in psutil.Process(host.pid).children(recursive=True)]
        host.kill()
    wait_gone(started, 5)


@every_profile
def test_workers_killed_while_they_are_born(start: Callable[..., Pool], make: Make) -> None:
    """S, I4: at any moment of it; the pool recovers, and no scratch directory or namespace is left."""
    pool = start(CONFINED, workers=2, sandbox=make())
    zygote = pool._supervisor._zygote  # type: ignore[union-attr]
    assert zygote is not None
    for _ in range(30):
        for child in psutil.Process(zygote.pid).children(recursive=True):
            with_suppressed(child.kill)
    wait_until(lambda: pool.stats().idle == 2)
    assert get(pool, "/home") == "True"
    mounts = Path(f"/proc/{zygote.pid}/mounts")
    wait_until(lambda: mounts.read_text().count(" /tmp/worker-") == 2)


def with_suppressed(step: Callable[[], object]) -> None:
    try:
        step()
    except psutil.Error:
        pass


# -- failing closed --------------------------------------------------------------------------------------

IN_A_CONTAINER = """
import errno, logging, os, sys
import pyseccomp
from runner import Pool, Request, Sandbox, StartError
from runner.platform import linux
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
linux.set_no_new_privs()
filters = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filters.add_rule(pyseccomp.ERRNO(errno.{error}), {denied!r})
filters.load()
try:
    with Pool("tests.confined:app", workers=1, sandbox=Sandbox.{profile}(require={require!r})) as pool:
        with pool.open(Request("GET", "/threads")) as job:
            print("answered", b"".join(job))
        try:
            with pool.open(Request("GET", "/read?path=/etc/passwd")) as job:
                print("read", b"".join(job))
        except Exception as error:
            print("refused", error)
except StartError as error:
    print("StartError", error)
"""


def in_a_container(denied: str | int, profile: str, require: str, error: str = "EPERM") -> str:
    """What a host prints that may not make this system call, as in a container with a filter of its own."""
    code = IN_A_CONTAINER.format(denied=denied, profile=profile, require=require, error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


LANDLOCK = 444  # landlock_create_ruleset; libseccomp may not know its name
LACKING = [
    pytest.param("mount", "EPERM", "default", "a scratch directory of limited size", id="mounts"),
    pytest.param("unshare", "EPERM", "strict", "processes, network and IPC of its own", id="namespaces"),
    pytest.param(LANDLOCK, "ENOSYS", "default", "this kernel has no Landlock", id="landlock"),
    pytest.param("seccomp", "EPERM", "default", "system calls", id="seccomp"),
]


@pytest.mark.parametrize(("denied", "error", "profile", "words"), LACKING)
def test_a_layer_that_is_lacking_is_an_error(denied: str | int, error: str, profile: str, words: str) -> None:
    """S: it names the layer, and the way out."""
    said = in_a_container(denied, profile, "all", error)
    assert "StartError" in said
    assert words in said
    assert f"Sandbox.{profile}(require='available')" in said
    assert "answered" not in said


@pytest.mark.parametrize(("denied", "error", "profile", "words"), LACKING)
def test_going_without_a_layer(denied: str | int, error: str, profile: str, words: str) -> None:
    """S: only where that was asked for; what is missing is in the log as a warning, and the rest holds."""
    said = in_a_container(denied, profile, "available", error)
    assert "answered b'28'" in said
    assert "WARNING" in said
    assert words in said
    if denied != LANDLOCK:
        assert "refused" in said


def test_the_probe_finds_a_hole(start: Callable[..., Pool]) -> None:
    """S: a sandbox that does not hold, for whatever reason, takes no job: here a trusted module has broken Landlock."""
    with pytest.raises(StartError, match="the sandbox does not hold: it can list /"):
        start(CONFINED, workers=1, sandbox=Sandbox.default(), preload=["tests.hostile.saboteur"])


def test_an_app_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S: all of it would be the handler's to read: refused, with the way out."""
    (tmp_path / "homely.py").write_text("def app(request, response): return b'x'")
    monkeypatch.syspath_prepend(str(tmp_path))
    sandbox = Sandbox.default()
    with pytest.raises(StartError, match="put it in a directory of its own"):
        Pool("homely:app", workers=1, sandbox=sandbox, env={"HOME": str(tmp_path)}).start()


def test_a_handler_by_value(start: Callable[..., Pool]) -> None:
    """S: a callable is confined as a module is."""

    def handler(request: Any, response: Any) -> bytes:

        try:
            return repr(os.listdir("/")).encode()
        except PermissionError:
            return b"confined"

    assert get(start(handler, workers=1, sandbox=Sandbox.default()), "/") == "confined"


PLANTED = """
import os
open({mark!r}, "a").write("ran outside")
def app(request, response):
    import helper
    return helper.WORDS
"""


@pytest.mark.parametrize("name", ["multiprocess", "pyseccomp", "ctypes", "msgspec"])
def test_modules_of_the_app_never_run_outside(tmp_path: Path, name: str) -> None:
    """S: not where they are named as those that the zygote imports, be they first on the host's path."""
    directory, mark = tmp_path / "app", tmp_path / "mark"
    directory.mkdir(mode=0o755)
    (directory / f"{name}.py").write_text(PLANTED.format(mark=str(mark)))
    (directory / "planted.py").write_text("def app(request, response): return b'planted'")
    code = (
        "import sys, dill, psutil; from runner import Pool, Request, Sandbox\n"
        "import runner.pool, runner.supervision.supervisor\n"
        f"sys.path.insert(0, {str(directory)!r})\n"
        "with Pool('planted:app', workers=1, sandbox=Sandbox.default()) as pool:\n"
        "    with pool.open(Request('GET', '/')) as job: print(b''.join(job))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not mark.exists()
    assert "planted" in done.stdout


@every_profile
def test_a_path_of_its_own(start: Callable[..., Pool], make: Make, tmp_path: Path) -> None:
    """S: code that is not on the host's path at all."""
    directory = tmp_path / "customer"
    directory.mkdir(mode=0o755)
    (directory / "theirs.py").write_text("import helper\ndef app(request, response): return helper.WORDS")
    (directory / "helper.py").write_text("WORDS = b'theirs'")
    tmp_path.chmod(0o755)
    assert get(start("theirs:app", workers=1, sandbox=make(path=[directory])), "/") == "theirs"


@every_profile
def test_without_scratch(start: Callable[..., Pool], make: Make) -> None:
    """S: nothing can be written then."""
    pool = start(CONFINED, workers=1, sandbox=make(scratch=None))
    assert get(pool, "/threads") == "28"
    with pytest.raises(HandlerRaised):
        get(pool, "/files")


# -- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"readable": "/etc"},
        {"readable": ["/nonexistent/path"]},
        {"writable": ["/"]},
        {"readable": ["/tmp"]},
        {"connect": [0]},
        {"connect": [True]},
        {"scratch": "1KiB"},
        {"threads": 1},
        {"open_files": 3},
        {"require": "some"},
        {"profile": "lax"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    """S, W1: refused when the sandbox is made."""
    with pytest.raises(ConfigurationError):
        Sandbox(**settings)


@pytest.mark.parametrize("preload", [True, "flask", [1]])
def test_a_preload_that_makes_no_sense(preload: Any) -> None:
    """S: the handler is never imported outside its sandbox."""
    with pytest.raises(ConfigurationError, match="preload"):
        Pool(CONFINED, sandbox=Sandbox.default(), preload=preload)


def test_the_host_is_protected(start: Callable[..., Pool]) -> None:
    """S: others of its user can't look into it, unless that was declined."""
    code = (
        "from runner import Pool, Sandbox\nfrom runner.platform import linux\n"
        "for protect in (False, True):\n"
        f"    with Pool({CONFINED!r}, workers=1, sandbox=Sandbox.default(protect_host=protect)):\n"
        "        print(linux.is_dumpable())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_what_the_doctor_says() -> None:
    """S: each layer, and each profile."""
    done = subprocess.run([sys.executable, "-m", "transport.cli", "doctor"], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1)
    for layer in (probe.FILES, probe.CALLS, probe.SCRATCH, probe.NAMESPACES):
        assert f"  {layer}: " in done.stdout
    for profile in ("default", "strict"):
        assert f"Sandbox.{profile}()" in done.stdout


DIES_BEFORE_ITS_WORD = """
import os, signal, socket
import multiprocess
from runner.platform import linux
from runner.sandbox import namespaces

class Ours(socket.socket):
    def send(self, data):
        os.kill(os.getpid(), signal.SIGKILL)

def pair(*kind):
    ours, theirs = real(*kind)
    return Ours(fileno=ours.detach()), theirs

def start(control, ours):
    return multiprocess.get_context("fork").Process(
        target=lambda: namespaces.enter_namespaces(control, ours, network=False, egress=False)
    )

real, socket.socketpair = socket.socketpair, pair
linux.unshare(linux.NEW_USERS) if os.geteuid() else None
namespaces.Nested(start)
"""


def test_a_zygote_that_dies_while_it_makes_a_worker() -> None:
    """S1, W11: the first process of a worker's namespaces ends too, though nobody told it that it may begin."""
    zygote = subprocess.Popen([sys.executable, "-c", DIES_BEFORE_ITS_WORD], start_new_session=True, cwd=ROOT)
    assert zygote.wait(30) == -signal.SIGKILL
    try:
        wait_until(lambda: not _of_session(zygote.pid), 5)
    finally:
        for pid in _of_session(zygote.pid):
            kill(pid)


def _of_session(session: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and not is_gone(process.pid):
                found.append(process.pid)
    return found
