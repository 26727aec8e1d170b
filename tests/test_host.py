"""The host: scripts of every kind run a pool, and end in every way; nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runner import Pool, Request
from tests.processes import kill, wait_gone

ROOT = Path(__file__).parents[1]

PREAMBLE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("error")
from runner import Pool, Request

def get(pool, target="/hello"):
    with pool.open(Request("GET", target)) as job:
        return b"".join(job)
"""


def script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(PREAMBLE + textwrap.dedent(body))
    return path


def start_script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-X", "dev", str(script(tmp_path, body))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def run(tmp_path: Path, body: str) -> str:
    with start_script(tmp_path, body) as process:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its threads' stacks tell where it waits
            raise
    assert process.returncode == 0, err
    assert err == ""
    return out


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """I12, W2: the caller's __main__ is never run again, with an import string or a callable."""
    out = run(
        tmp_path,
        """
        print("top level")
        factor = 2
        def handler(request, response):
            return str(21 * factor).encode()
        with Pool(handler, workers=2) as pool:
            print(get(pool).decode())
        with Pool("tests.handlers:app", workers=2) as pool:
            print(get(pool).decode())
        """,
    )
    assert out.splitlines() == ["top level", "42", "hello"]


def test_a_host_with_50_lock_holding_threads(tmp_path: Path) -> None:
    """I12: threads that hold locks, logging's and the allocator's too, at any time: pools start and serve."""
    out = run(
        tmp_path,
        """
        import logging
        logging.basicConfig(stream=open(os.devnull, "w"), level=logging.DEBUG)
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                logging.debug("busy %s", [0] * 1000)
        threads = [threading.Thread(target=busy) for _ in range(50)]
        for thread in threads: thread.start()
        for _ in range(3):
            with Pool("tests.handlers:app", workers=2) as pool:
                for _ in range(5):
                    assert get(pool) == b"hello"
        stop.set()
        for thread in threads: thread.join()
        print("done")
        """,
    )
    assert out == "done\n"


def test_a_child_that_dies_in_start_up(tmp_path: Path) -> None:
    """I12: told by start(), and the script ends by itself."""
    out = run(
        tmp_path,
        """
        from runner import StartError
        for preload in (False, True):
            try:
                Pool("tests.bad_handlers.dies:app", workers=3, preload=preload).start()
            except StartError as error:
                print("code 5" in str(error))
        """,
    )
    assert out == "True\nTrue\n"


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "del pool"])
def test_an_exit_without_close(tmp_path: Path, ending: str) -> None:
    """W11: at interpreter exit a pool that is still open is closed, with a stream in mid-flight as well."""
    with start_script(
        tmp_path,
        f"""
        warnings.simplefilter("ignore")
        pool = Pool("tests.handlers:app", workers=2).start()
        job = pool.open(Request("GET", "/endless"))
        print(*[worker.pid for worker in pool._supervisor._workers.values()], flush=True)
        {ending}
        """,
    ) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2
    wait_gone(pids, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_host_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """W8, I7: when the host dies in mid-job, all workers and their descendants are gone within 2 s."""
    with start_script(
        tmp_path,
        """
        pool = Pool("tests.handlers:app", workers=3).start()
        pids = [get(pool, f"/spawn?how={how}").decode() for how in ("plain", "session", "double")]
        job = pool.open(Request("GET", "/endless"))
        zygote = pool._supervisor._zygote.pid
        print(zygote, *[worker.pid for worker in pool._supervisor._workers.values()], *pids, flush=True)
        time.sleep(60)
        """,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 7
        assert all(psutil.pid_exists(pid) for pid in pids)
        process.send_signal(number)
        process.wait()
        wait_gone(pids, 2)


def test_a_forked_child_of_the_host(tmp_path: Path) -> None:
    """W11: after fork() the child's copy refuses use with a clear error, and leaves the parent's workers alone."""
    out = run(
        tmp_path,
        """
        from runner import PoolForked
        with Pool("tests.handlers:app", workers=2) as pool:
            job = pool.open(Request("GET", "/big?size=1000000"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pid = os.fork()
            if pid == 0:
                try:
                    get(pool)
                except PoolForked as error:
                    print("child:", "make one after the fork" in str(error), flush=True)
                job.close()
                pool.close()
                with Pool("tests.handlers:app", workers=1) as own:
                    print("child:", get(own).decode(), flush=True)
                sys.exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            print("parent:", len(b"".join(job)), get(pool).decode())
        """,
    )
    assert sorted(out.splitlines()) == ["child: True", "child: hello", "parent: 1000000 hello"]


def test_a_forked_child_does_not_keep_the_workers_alive(tmp_path: Path) -> None:
    """W8: a child that the host has forked holds none of the pool's descriptors: the host's death is still seen."""
    with start_script(
        tmp_path,
        """
        pool = Pool("tests.handlers:app", workers=2).start()
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(child, *[worker.pid for worker in pool._supervisor._workers.values()], flush=True)
        time.sleep(60)
        """,
    ) as process:
        assert process.stdout is not None
        child, *pids = (int(pid) for pid in process.stdout.readline().split())
        process.kill()
        process.wait()
        try:
            wait_gone(pids, 2)
        finally:
            os.kill(child, signal.SIGKILL)


def test_interrupts_belong_to_the_host(tmp_path: Path) -> None:
    """W11: a Ctrl-C in a caller ends its job, and the workers, in sessions of their own, never see it."""
    with start_script(
        tmp_path,
        """
        with Pool("tests.handlers:app", workers=1) as pool:
            try:
                print("ready", flush=True)
                get(pool, "/never_read")
            except KeyboardInterrupt:
                print("interrupted", get(pool).decode(), flush=True)
        """,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        host = psutil.Process(process.pid)
        while not any(thread.user_time for thread in host.threads()) or not host.children(recursive=True):
            time.sleep(0.001)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "interrupted hello\n", "")


@pytest.mark.parametrize("waits_for", ["the answer", "a worker", "the start", "the end"])
def test_a_signal_that_wakes_nobody(tmp_path: Path, waits_for: str) -> None:
    """W11: one that comes just before the main thread sleeps, or to another thread, is heard within a second or so."""
    out = run(
        tmp_path,
        f"""
        import signal, threading, time
        waits_for = {waits_for!r}

        def interrupt():
            time.sleep(0.5)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # as if the main thread was about to sleep

        def slow(request, response):
            time.sleep(60)

        def hold():
            try:
                get(pool)
            except Exception:
                pass

        handler = "tests.bad_handlers.hangs:app" if waits_for == "the start" else slow
        pool = Pool(handler, workers=1, start_timeout=50)
        interrupter = threading.Thread(target=interrupt)
        try:
            if waits_for == "the start":
                interrupter.start()
                pool.start()
            pool.start()
            if waits_for in ("a worker", "the end"):
                job = threading.Thread(target=hold, daemon=True)
                job.start()
                while not pool.stats().busy:
                    time.sleep(0.001)
            interrupter.start()
            if waits_for == "the end":
                pool.close(drain=50)
            get(pool)
        except KeyboardInterrupt:
            print("interrupted")
        interrupter.join()
        pool.close(drain=0)
        if waits_for in ("a worker", "the end"):
            job.join()
        """,
    )
    assert out == "interrupted\n"


def test_signals_are_the_main_thread_s(start: Callable[..., Pool]) -> None:
    """W11: the supervisor's thread takes none; zygote and workers begin with none blocked."""
    pool = start(workers=1)
    assert pool._supervisor is not None
    assert pool._supervisor._zygote is not None
    bit = 1 << (signal.SIGINT - 1)
    thread = pool._supervisor._thread.native_id
    (worker,) = pool.workers()
    for place, blocked in (
        (f"/proc/self/task/{thread}", True),
        (f"/proc/{pool._supervisor._zygote.pid}", False),
        (f"/proc/{worker.pid}", False),
    ):
        status = Path(f"{place}/status").read_text()
        mask = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        assert bool(mask & bit) == blocked, place


def test_imports_stay_small() -> None:
    """W2: runner and transport.requests pull in nothing heavy that a caller may not need."""
    code = (
        "import sys; import requests; before = set(sys.modules); import runner, transport.requests; "
        "from runner import Pool; print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    roots = {name.partition(".")[0] for name in out}
    assert not roots & {"dill", "multiprocess", "psutil", "asyncio", "anyio", "httpx", "flask", "rich", "ctypes"}
    assert {name for name in roots if name not in sys.stdlib_module_names} <= {
        "runner",
        "transport",
        "msgspec",
        "typing_extensions",  # msgspec's
    }


def test_a_fork_while_another_thread_starts_the_pool(tmp_path: Path) -> None:
    """W11: the child is told, and not left waiting for a lock whose holder it does not have."""
    out = run(
        tmp_path,
        """
        from runner import PoolForked
        pool = Pool("tests.handlers:app", workers=2)
        starter = threading.Thread(target=pool.start)
        starter.start()
        while pool._supervisor is None: time.sleep(0.0001)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            try:
                get(pool)
            except PoolForked:
                print("refused", flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        starter.join()
        print(get(pool).decode())
        pool.close()
        """,
    )
    assert sorted(out.split()) == ["hello", "refused"]


def test_a_pool_that_was_not_started_before_the_fork(tmp_path: Path) -> None:
    """W11: such a pool is the child's to start: as under a server that forks its own workers."""
    out = run(
        tmp_path,
        """
        pool = Pool("tests.handlers:app", workers=1)
        if os.fork() == 0:
            print(get(pool).decode(), flush=True)
            pool.close()
            os._exit(0)
        assert os.wait()[1] == 0
        print(get(pool).decode())
        pool.close()
        """,
    )
    assert out.split() == ["hello", "hello"]


@pytest.mark.parametrize("what", ["burn", "ignore", "spin"])
def test_the_host_is_killed_while_workers_spin(tmp_path: Path, what: str) -> None:
    """W8, I7: also where every worker is in a tight loop, of Python or of C, or ignores SIGTERM."""
    with start_script(
        tmp_path,
        f"""
        pool = Pool("tests.handlers:app", workers=2).start()
        jobs = [threading.Thread(target=get, args=(pool, "/{what}"), daemon=True) for _ in range(2)]
        for job in jobs: job.start()
        while pool.stats().busy < 2: time.sleep(0.001)
        print(pool._supervisor._zygote.pid, *[info.pid for info in pool.workers()], flush=True)
        time.sleep(60)
        """,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        process.kill()
        process.wait()
        wait_gone(pids, 2)


def test_the_host_s_own_children_are_its_own(tmp_path: Path) -> None:
    """I13: a pool neither reaps nor kills processes that the host has started."""
    out = run(
        tmp_path,
        """
        import logging, subprocess
        logging.disable()
        child = subprocess.Popen(["sleep", "1000"])
        ended = subprocess.Popen(["sh", "-c", "exit 7"])
        with Pool("tests.handlers:app", workers=2) as pool:
            for _ in range(5):
                try: get(pool, "/die")
                except Exception: pass
            # With an order to start a worker on its way fewer than two would end with the zygote.
            while pool.stats().idle < 2: time.sleep(0.001)
            os.kill(pool._supervisor._zygote.pid, 9)
            while pool.stats().deaths < 7: time.sleep(0.001)
        print(child.poll(), ended.wait())
        child.kill()
        child.wait()
        """,
    )
    assert out == "None 7\n"


@pytest.mark.parametrize("how", ["plain", "session", "double"])
def test_the_zygote_is_killed_in_mid_flight(how: str) -> None:
    """W8, W11: what the workers have started is gone as well, though nobody is its parent any more."""
    with Pool("tests.handlers:app", workers=1) as pool:
        with pool.open(Request("GET", f"/spawn?how={how}")) as job:
            pid = int(b"".join(job))
        assert pool._supervisor is not None
        zygote = pool._supervisor._zygote
        assert zygote is not None
        kill(zygote.pid)
        wait_gone([pid], 5)
        with pool.open(Request("GET", "/hello"), lease_timeout=30) as job:
            assert b"".join(job) == b"hello"
