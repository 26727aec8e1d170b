"""Waiting for processes to be gone."""

from __future__ import annotations

import os
import signal
import time

import psutil


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that its parent, or init, has yet to reap has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pids: list[int], seconds: float) -> None:
    """Wait until all of them have ended; an assertion fails where that takes longer."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < deadline, f"still there after {seconds} s: {left}"
        time.sleep(0.002)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that is known; 0 and None, which would mean all of one's own, are refused."""
    assert pid
    os.kill(pid, number)
