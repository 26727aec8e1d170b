"""The platform calls that Python has no function for, each behind a name: prctl(2), and a look at /proc."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _call(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that created it ends (prctl(2))."""
    _call(_PR_SET_PDEATHSIG, signal_number)


def become_subreaper() -> None:
    """Become the parent of all descendants whose own parents end (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    _call(_PR_SET_CHILD_SUBREAPER, 1)


def children() -> list[int]:
    """The pids of this process's children, zombies included. For single-threaded processes (proc(5))."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listing:
            return [int(child) for child in listing.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return _children_by_search(pid)


def descendants(pid: int) -> list[int]:
    """The pids of all that a process has started, and what that has started: the children of each thread (proc(5))."""
    if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
        import psutil  # a kernel without CONFIG_PROC_CHILDREN: all of /proc has to be looked through

        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as listing:
                    parents += (born := [int(child) for child in listing.read().split()])
                    found += born
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def _children_by_search(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(fields[1]) == parent:
                found.append(int(name))
    return found


def holders(inodes: set[int]) -> list[int]:
    """The pids of the processes, this one left out, that hold a pipe with one of these inodes open (proc(5))."""
    links = {f"pipe:[{inode}]" for inode in inodes}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            descriptors = os.listdir(f"/proc/{name}/fd")
        except OSError:
            continue  # it has ended, or is another user's
        for fd in descriptors:
            try:
                if os.readlink(f"/proc/{name}/fd/{fd}") in links:
                    found.append(int(name))
                    break
            except OSError:
                continue
    return found


def kill_holders(inodes: set[int]) -> int:
    """SIGKILL the processes that hold one of these pipes open; their number. Each by pidfd, looked at again."""
    killed = 0
    for pid in holders(inodes):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            # The pidfd names one process; that it is still the one that holds a pipe is certain only now.
            if pid in holders(inodes):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                killed += 1
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
    return killed


def open_descriptors() -> set[int]:
    """The numbers of this process's open descriptors."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the descriptor of the listing itself
    return True
