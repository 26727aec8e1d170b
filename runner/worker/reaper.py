"""Orphans that a worker adopts: reaped when they have ended, and no other child is.

A worker is a subreaper (prctl(2)): what a handler's programs leave behind becomes its child, and a zombie when it ends.
The app's own children, and their exit statuses, are the app's. The kernel does not tell one from the other. So the ways
in which Python starts processes note whom they start; a child that nobody has noted is adopted. An extension may start
one by a way of its own, and waits for it at once then: only what was there as a zombie at two looks is reaped.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

LOOK_SECONDS: Final = 0.5
"""Seconds between two looks, as long as there may be orphans."""

_PEEK: Final = os.WEXITED | os.WNOHANG | os.WNOWAIT

_own: set[int] = set()
_starting: set[object] = set()
_seen: set[int] = set()
_next_look = 0.0
_noting_starts = False
possible = False
"""Whether anything was started that may leave orphans. A look says when that is over."""


def note_starts() -> None:
    """Have the ways in which Python starts processes note them. What is imported later uses these."""
    import _posixsubprocess

    os.fork = _noting(os.fork, int)
    os.forkpty = _noting(os.forkpty, lambda result: int(result[0]))
    os.posix_spawn = _noting(os.posix_spawn, int)
    os.posix_spawnp = _noting(os.posix_spawnp, int)
    os.system = _noting(os.system, lambda result: 0)
    fork_exec = _noting(_posixsubprocess.fork_exec, int)
    _posixsubprocess.fork_exec = fork_exec
    subprocess: Any = sys.modules.get("subprocess")
    if subprocess is not None:
        subprocess._fork_exec = fork_exec


def begin() -> None:
    """This process is a worker: it has no children yet."""
    global _noting_starts
    _noting_starts = True


def reap() -> None:
    """Look for orphans that have ended, where it is time for that."""
    global possible, _next_look
    now = time.monotonic()
    if now < _next_look or _starting:
        return
    _next_look = now + LOOK_SECONDS
    for pid in list(_own):
        if _has_ended(pid) is None:
            _own.discard(pid)
    listed = _listed()
    if listed is None:
        possible = _reap_unlisted()
        return
    strangers = [pid for pid in listed if pid not in _own]
    ended = {pid for pid in strangers if _has_ended(pid)}
    reaped = ended & _seen
    for pid in reaped:
        os.waitpid(pid, os.WNOHANG)
    _seen.clear()
    _seen.update(ended - reaped)
    possible = bool(listed or _own)


def _reap_unlisted() -> bool:
    """The same where /proc can't be read; whether there are children. One of the app's that has ended hides others."""
    certain = False
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, _PEEK)
        except ChildProcessError:
            _seen.clear()
            return False
        if found is None or found.si_pid in _own:
            return True
        if not certain and found.si_pid not in _seen:
            _seen.clear()
            _seen.add(found.si_pid)
            return True
        certain = True
        os.waitpid(found.si_pid, os.WNOHANG)


def _has_ended(pid: int) -> bool | None:
    """Whether a child has ended and is yet to be reaped; None where there is no such child."""
    try:
        return os.waitid(os.P_PID, pid, _PEEK) is not None
    except ChildProcessError:
        return None


def _listed() -> list[int] | None:
    """The children of the main thread, which adopts; None where they can't be listed, or by other numbers only."""
    pid = os.getpid()
    try:
        if os.readlink("/proc/self") != str(pid):
            return None
        with open(f"/proc/self/task/{pid}/children", encoding="ascii") as listing:
            return [int(child) for child in listing.read().split()]
    except OSError:
        return None


def _noting(start: Callable[..., Any], pid_of: Callable[[Any], int]) -> Callable[..., Any]:
    @functools.wraps(start)
    def noted(*args: Any, **kwargs: Any) -> Any:
        global possible
        if not _noting_starts:
            return start(*args, **kwargs)
        token = object()
        _starting.add(token)
        try:
            result = start(*args, **kwargs)
            if pid := pid_of(result):
                _own.add(pid)
            return result
        finally:
            _starting.discard(token)
            possible = True

    return noted
