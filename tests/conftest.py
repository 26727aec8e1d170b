"""What every test may use, and what every test must leave behind: nothing."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import psutil
import pytest

from runner import Pool

SHARED_MEMORY: pytest.StashKey[set[str]] = pytest.StashKey()

HANDLER = "tests.handlers:app"

_LAST_STEPS: Final = 2.0
"""Seconds that a thread has to end which has nothing more to do."""


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


def _shared_memory() -> set[str]:
    """Files of shared memory: for root all, for an ordinary user its own, since others' tests may run beside."""
    uid = os.geteuid()
    found = set()
    for entry in os.scandir("/dev/shm"):
        with contextlib.suppress(FileNotFoundError):
            if uid == 0 or entry.stat(follow_symlinks=False).st_uid == uid:
                found.add(entry.name)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: side by side, nobody then waits for one that was begun last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SHARED_MEMORY] = _shared_memory()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported for the tests stays: a collection after each test, which looks for what it left, skips that."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """W11: of shared memory, tests that run side by side are asked at their common end."""
    gc.unfreeze()
    before = session.config.stash[SHARED_MEMORY]
    left = _shared_memory() - before
    if left and "PYTEST_XDIST_WORKER" not in os.environ:
        raise pytest.UsageError(f"shared memory left: {', '.join(sorted(left))}")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """W11: after each test no process, descriptor, thread or shared-memory file is left that was not there before."""
    before = _descriptors(), set(threading.enumerate()), _shared_memory()
    children = set(psutil.Process().children(recursive=True))
    yield
    gc.collect()
    # Trio keeps its idle threads for some seconds, for the next run. AnyIO's have been told to end.
    threads = {thread for thread in threading.enumerate() if not thread.name.startswith("Trio thread")} - before[1]
    for thread in threads:
        if thread.name.startswith("AnyIO"):
            thread.join(_LAST_STEPS)
    assert not [thread for thread in threads if thread.is_alive()], "threads left"
    after = _descriptors()
    assert {fd: name for fd, name in after.items() if fd not in before[0]} == {}, "descriptors left open"
    assert set(psutil.Process().children(recursive=True)) <= children, "processes left"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # there it is another test's as well: see `pytest_sessionfinish`
        assert _shared_memory() <= before[2], "shared memory left"


@pytest.fixture
def start() -> Iterator[Callable[..., Pool]]:
    """Starts pools, by default of two workers with the tests' own handler, and closes them after the test."""
    pools: list[Pool] = []

    def start_pool(handler: Any = HANDLER, **settings: Any) -> Pool:
        settings.setdefault("workers", 2)
        pool = Pool(handler, **settings)
        pools.append(pool)
        return pool.start()

    yield start_pool
    for pool in pools:
        pool.close(drain=0)


@pytest.fixture
def pool(start: Callable[..., Pool]) -> Pool:
    """A pool of two workers with the tests' own handler."""
    return start()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All that blastdoor logs."""
    caplog.set_level(logging.DEBUG, "blastdoor")
    return caplog
