"""Processes that handlers start: forks that come back, orphans that are left, and what runs at a worker's end."""

from __future__ import annotations

import ast
import contextlib
import time
from collections.abc import Callable

import psutil
import pytest

from runner import Limits, Pool, Recycle, Request, Sandbox
from tests.test_pool import get
from tests.waiting import wait_until

KINDS = (
    *("native", "native_writer", "wsgi", "wsgi_stream", "async_native"),
    *("bare_asgi", "asgi", "asgi_thread", "asgi_executor"),
)
DEEDS = {"exits": 7, "exits-with-words": 1, "raises": 1, "returns": 0, "returns-late": 0}


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_never_speaks_for_its_worker(
    start: Callable[..., Pool], log: pytest.LogCaptureFixture, kind: str, preload: bool
) -> None:
    """N1: whatever it does, the job is the parent's, and so are those after it; its output and exit code are kept."""
    pool = start(f"tests.forking:{kind}", workers=1, preload=preload)
    (worker,) = pool.workers()
    framed = kind.startswith("asgi")  # frameworks make an answer of an exception, which the child can't give
    for deed, code in DEEDS.items():
        assert get(pool, f"/{deed}") == str(worker.pid).encode()
        for _ in range(5):
            assert get(pool, "/pid") == str(worker.pid).encode()
        (found,) = ast.literal_eval(get(pool, "/ends").decode())
        assert found == code or (framed and deed == "raises"), deed
        assert get(pool, "/pid") == str(worker.pid).encode()
    assert pool.stats().deaths == 0
    pool.close()
    lines = [record.getMessage() for record in log.records]
    for deed in DEEDS:
        assert any(line.endswith(f"child {deed.replace('-', ' ')}") for line in lines)
    assert any("the words of its end" in line for line in lines)
    assert framed or any("the child's error" in line for line in lines)
    assert sum("shutdown in" in line for line in lines) == framed


@pytest.mark.parametrize("kind", ["native", "asgi"])
def test_processes_of_the_library_stay_as_they_are(start: Callable[..., Pool], kind: str) -> None:
    """N1: subprocess, also with code of the app's in the child, and multiprocessing by all its methods."""
    pool = start(f"tests.forking:{kind}", workers=1)
    assert get(pool, "/processes") == b"[3, 4, 4, 4]"


def test_an_import_that_forks(start: Callable[..., Pool], tmp_path: object) -> None:
    """N1: also in the process that forks the workers: the child is neither a zygote nor a worker."""
    for preload in (False, True):
        pool = start("tests.forking_import:app", workers=1, preload=preload)
        assert get(pool, "/") == b"parent"
        pool.close()


# -- a worker's ordinary end --------------------------------------------------------------------------


def printed(log: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in log.records]
    return [line.partition("at exit: ")[2] for line in lines if "at exit: " in line]


@pytest.mark.parametrize("how", ["close", "recycle"])
def test_exit_functions_run(start: Callable[..., Pool], log: pytest.LogCaptureFixture, how: str) -> None:
    """N2: threads that are no daemons end first, then atexit's functions run, the last registered first."""
    recycle = Recycle(after_jobs=1) if how == "recycle" else None
    pool = start("tests.forking:register_ends", workers=1, recycle=recycle)
    get(pool, "/register")
    if how == "recycle":
        wait_until(lambda: len(printed(log)) == 4)
    pool.close()
    assert printed(log) == [
        "a thread that is no daemon",
        "last registered",
        "first registered",
        "a finalizer of multiprocessing",
    ]


def test_exit_functions_come_after_the_lifespan(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """N2: they come after the lifespan's shutdown."""
    pool = start("tests.forking:asgi_ends", workers=1)
    get(pool, "/")
    pool.close()
    assert printed(log) == ["lifespan shutdown", "registered in start-up"]


def test_exit_functions_have_as_long_as_a_stop_may_take(start: Callable[..., Pool]) -> None:
    """N2: one that hangs is ended with its worker after `stop_timeout`."""
    pool = start("tests.forking:register_ends", workers=1, stop_timeout=0.3)
    get(pool, "/hang")
    began = time.monotonic()
    pool.close()
    assert 0.3 <= time.monotonic() - began < 10


# -- orphans ------------------------------------------------------------------------------------------


def zombies(pool: Pool) -> list[int]:
    """The zombies below a worker."""
    (worker,) = pool.workers()
    found = []
    for process in psutil.Process(worker.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.parametrize("handler", ["leave_orphans", "leave_orphans_async"])
@pytest.mark.parametrize("way", ["/orphan", "/system"])
@pytest.mark.parametrize("sandbox", [None, Sandbox.default(processes=True)])
def test_orphans_are_reaped(start: Callable[..., Pool], handler: str, way: str, sandbox: Sandbox | None) -> None:
    """N4: what a handler's programs leave behind is reaped when it has ended, between jobs and while none comes."""
    pool = start(f"tests.forking:{handler}", workers=1, sandbox=sandbox, limits=Limits())
    for _ in range(10):
        get(pool, way)
    wait_until(lambda: not zombies(pool))
    assert pool.stats().deaths == 0


@pytest.mark.parametrize("handler", ["leave_orphans", "leave_orphans_async"])
def test_own_children_are_left_to_the_app(start: Callable[..., Pool], handler: str) -> None:
    """N4: their exit statuses are there when the app asks, however long that takes, beside orphans that are reaped."""
    pool = start(f"tests.forking:{handler}", workers=1)
    asked_at_once = get(pool, "/keep")
    for _ in range(3):
        get(pool, "/orphan")
    own = 0 if handler.endswith("async") else 1
    wait_until(lambda: len(zombies(pool)) == own)
    time.sleep(1.2)  # two more looks: an own one would be reaped by now
    assert asked_at_once == (b"done" if own else b"5")
    assert get(pool, "/kept") == (b"[1]" if own else b"[]")


def test_strict_workers_leave_nothing(start: Callable[..., Pool]) -> None:
    """N4: with namespaces of their own the orphans go with their worker."""
    pool = start("tests.forking:leave_orphans", workers=1, sandbox=Sandbox.strict(processes=True))
    for _ in range(3):
        assert pool.open(Request("GET", "/orphan")).read() == b"done"
