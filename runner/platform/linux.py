"""The platform calls that Python has no function for, each behind a name: prctl(2) and others, and a look at /proc."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import stat
import threading
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_GET_SECCOMP: Final = 21
_PR_CAPBSET_DROP: Final = 24
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522
_LAST_CAPABILITY: Final = 63

NEW_MOUNTS: Final = 0x00020000
NEW_HOSTNAME: Final = 0x04000000
NEW_IPC: Final = 0x08000000
NEW_USERS: Final = 0x10000000
NEW_PIDS: Final = 0x20000000
NEW_NETWORK: Final = 0x40000000

READ_ONLY: Final = 1
NO_SUID: Final = 2
NO_DEVICES: Final = 4
NO_EXEC: Final = 8
BIND: Final = 4096
RECURSIVE: Final = 16384
PRIVATE: Final = 1 << 18
DETACH: Final = 2

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(option: int, value: int) -> int:
    return _checked(_prctl(option, value, 0, 0, 0), f"prctl({option})")


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call that the C library has no function for (syscall(2)). OSError where it fails."""
    # Plain ints would be passed as C ints: the upper halves of the registers would be anything.
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_syscall(ctypes.c_long(number), *wide), f"system call {number}")


def unshare(namespaces: int) -> None:
    """Leave these namespaces for new ones (unshare(2)); NEW_PIDS takes effect on children."""
    _checked(_libc.unshare(namespaces), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount (mount(2))."""
    arguments = (os.fsencode(text) if text else None for text in (source, target, kind))
    _checked(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def unmount(target: str) -> None:
    """Unmount, at once for all who look, and for real once nobody uses it any more (umount2(2), MNT_DETACH)."""
    _checked(_libc.umount2(os.fsencode(target), DETACH), f"umount {target}")


def set_no_new_privs() -> None:
    """Gain no privilege by an exec any more, for good."""
    _call(_PR_SET_NO_NEW_PRIVS, 1)


def has_no_new_privs() -> bool:
    """Whether `set_no_new_privs` was called."""
    return _call(_PR_GET_NO_NEW_PRIVS, 0) == 1


def set_dumpable(*, dumpable: bool) -> None:
    """Whether others of this user may look into this process: its memory, environment, descriptors (proc(5))."""
    _call(_PR_SET_DUMPABLE, int(dumpable))


def is_dumpable() -> bool:
    """Whether others of this user may look into this process."""
    return _call(_PR_GET_DUMPABLE, 0) == 1


def has_seccomp_filter() -> bool:
    """Whether this process's system calls are filtered."""
    return _call(_PR_GET_SECCOMP, 0) == 2


def drop_capabilities() -> None:
    """Give up all capabilities, and what would give any back (capabilities(7))."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            _call(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last that the kernel has, or not ours to drop: no_new_privs sees to that
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def has_capabilities() -> bool:
    """Whether this process has, or could take, any capability."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    _checked(_libc.capget(header, data), "capget")
    return any(data)


def name_thread(name: str) -> None:
    """Give this thread a name, of 15 bytes at most, that others see (proc_pid_comm(5))."""
    text = ctypes.create_string_buffer(name.encode())
    _call(_PR_SET_NAME, ctypes.addressof(text))


def thread_name(pid: int, thread: int) -> str:
    """The name of a thread of a process (proc_pid_comm(5)); empty where it has ended."""
    try:
        with open(f"/proc/{pid}/task/{thread}/comm", "rb", buffering=0) as file:
            return file.read(64).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""


def threads(pid: int) -> list[int]:
    """The threads of a process (proc_pid_task(5))."""
    return [int(thread) for thread in _listed(f"/proc/{pid}/task")]


def thread_time(pid: int, thread: int) -> float:
    """The processor time that a thread has used, in seconds (proc_pid_stat(5)); 0 where it has ended."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", encoding="latin-1") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def process_usage(pid: int) -> tuple[int, float]:
    """The resident memory of a process, in bytes, and the processor time that it has used, in seconds.

    OSError where it has ended (proc_pid_stat(5)).
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        fields = file.read(4096).rpartition(b")")[2].split()
    return int(fields[21]) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


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
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(fields[1]) == parent:
                found.append(int(name))
    return found


def pids_with_pipe_open(inodes: set[int]) -> list[int]:
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
    for pid in pids_with_pipe_open(inodes):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            # The pidfd names one process; that it is still the one that holds a pipe is certain only now.
            if pid in pids_with_pipe_open(inodes):
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


def reopen(fd: int) -> bool:
    """Put a new open file description of the same file in the place of an old one; False where there can be none.

    Only regular files and character devices can be opened anew with the same meaning (proc(5), /proc/pid/fd).
    """
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISCHR(kind):
            return False
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(kind):
                os.lseek(again, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(again, fd, inheritable=os.get_inheritable(fd))
        finally:
            os.close(again)
    except OSError:
        return False
    return True


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the descriptor of the listing itself
    return True
