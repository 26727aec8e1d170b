"""The handler of somebody who wants to do harm. Each attack says what it achieved; "denied" where that is nothing.

A request's path names the attack, its body are the attack's arguments as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from runner import HandlerRequest, HandlerResponse
from runner.wire.frames import BODY, END, HEAD, READY, pack_header

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
left_behind: list[str] = []
MIB = 1 << 20


def app(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Run the attack that the path names."""
    arguments = json.loads(request.body.read() or b"{}")
    try:
        got = globals()["do_" + request.path[1:]](**arguments)
    except (OSError, ValueError) as error:
        return f"denied: {error}".encode()
    return b"fine" if got is None else f"GOT {got}".encode()


def call(number: int, *arguments: int | bytes | None) -> int:
    """A system call by its number on x86_64. OSError where it fails."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def do_nothing() -> None:
    """What a benign request does."""


# -- reading ---------------------------------------------------------------------------------------------


def do_read(path: str) -> str:
    with open(path, "rb") as file:
        return repr(file.read(100))


def do_list(path: str) -> str:
    return repr(os.listdir(path))


def do_symlink(path: str) -> str:
    link = os.path.join(os.environ["TMPDIR"], "link")
    os.symlink(path, link)
    return do_read(link)


def do_hard_link(path: str) -> str:
    link = os.path.join(os.environ["TMPDIR"], "hard")
    os.link(path, link)
    return do_read(link)


def do_by_handle(path: str) -> str:
    handle = struct.pack("Ii", 128, 0) + bytes(128)
    call(303, -100, path.encode(), handle, bytes(4), 0)
    return "a handle"


def do_environment(secret: str) -> str | None:
    return "the secret" if secret in repr(os.environ) else None


def do_own_environ(secret: str) -> str | None:
    with open("/proc/self/environ", "rb") as file:
        return "the secret" if secret.encode() in file.read() else None


def do_watch(path: str) -> str:
    fd = check(libc.inotify_init1(0))
    try:
        return str(check(libc.inotify_add_watch(fd, path.encode(), 0xFFF)))
    finally:
        os.close(fd)


# -- writing ---------------------------------------------------------------------------------------------


def do_write(path: str) -> str:
    with open(path, "ab") as file:
        file.write(b"harm")
    return "written"


def do_truncate(path: str) -> str:
    os.truncate(path, 0)
    return "truncated"


def do_unlink(path: str) -> str:
    os.unlink(path)
    return "gone"


def do_rename(path: str) -> str:
    os.rename(path, path + ".moved")
    return "moved"


def do_chmod(path: str) -> str:
    os.chmod(path, 0o777)
    return "open to all"


def do_fchmod(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fchmod(fd, 0o777)
    finally:
        os.close(fd)
    return "open to all"


def do_chown(path: str) -> str:
    os.chown(path, os.getuid(), -1)
    return "owned"


def do_utime(path: str) -> str:
    os.utime(path, (0, 0))
    return "old"


def do_inode_flags(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0x80))
    finally:
        os.close(fd)
    return "flagged"


def do_setxattr(path: str) -> str:
    os.setxattr(path, "user.harm", b"1")
    return "marked"


def do_lease(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    finally:
        os.close(fd)
    return "a lease"


def do_own_code() -> str:
    return do_write(__file__)


def do_fill_one_file(size: int) -> str | None:
    written = 0
    path = os.path.join(os.environ["TMPDIR"], "big")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open(path, "wb", buffering=0) as file:
            while written <= size:
                written += file.write(bytes(MIB))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
    finally:
        os.unlink(path)
    return f"{written} bytes" if written > size else None


def do_fill_many_files(size: int, each: int = 1024) -> str | None:
    written = 0
    directory = os.path.join(os.environ["TMPDIR"], "many")
    os.mkdir(directory)
    try:
        for number in range(200_000):
            with open(os.path.join(directory, str(number)), "wb") as file:
                file.write(bytes(each))
            written += each
    except OSError as error:
        return None if error.errno in (errno.ENOSPC, errno.EDQUOT) and written <= size else f"{written}: {error}"
    finally:
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
    return f"{written} bytes"


def do_hold_up() -> str | None:
    """Make every end that it has block, fill what can be filled, close what is left, and hear of no cancel."""
    for fd in range(6):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    for fd in (0, 3, 5):
        with contextlib.suppress(OSError):
            os.write(fd, b"\xfe" + b"\xff" * 7)
    os.close(5)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        time.sleep(600)


# -- other processes -------------------------------------------------------------------------------------


def do_ptrace(pid: int) -> str:
    check(libc.ptrace(16, pid, None, None))
    return "attached"


def do_read_memory(pid: int) -> str:
    buffer = ctypes.create_string_buffer(8)
    vector = struct.pack("PL", ctypes.addressof(buffer), 8)
    call(310, pid, vector, 1, vector, 1, 0)
    return "memory"


def do_pidfd(pid: int) -> str:
    return str(os.pidfd_open(pid))


def do_kill(pid: int, number: int = signal.SIGKILL) -> str:
    os.kill(pid, number)
    return "killed"


def do_kill_group(pid: int) -> str:
    os.killpg(pid, signal.SIGKILL)
    return "killed"


def do_tkill(pid: int) -> str:
    call(200, pid, signal.SIGKILL)
    return "killed"


def do_queue_signal(pid: int) -> str:
    call(129, pid, signal.SIGTERM, struct.pack("iii", signal.SIGTERM, 0, -1) + bytes(116))
    return "queued"


def do_prlimit(pid: int) -> str:
    return str(resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3)))


def do_renice(pid: int) -> str:
    os.setpriority(os.PRIO_PROCESS, pid, 19)
    return "reniced"


def do_affinity(pid: int) -> str:
    os.sched_setaffinity(pid, {0})
    return "moved"


def do_scheduler(pid: int) -> str:
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    return "idle"


def do_renice_user(pid: int) -> str | None:
    os.setpriority(os.PRIO_USER, 0, 7)
    return "reniced" if os.getpriority(os.PRIO_PROCESS, 0) == 7 else None


def do_signal_by_file(pid: int, command: int) -> str:
    one, two = socket.socketpair()
    with one, two:
        fcntl.fcntl(one, command, pid)
    return "owned"


def do_signal_by_ioctl(pid: int) -> str:
    one, two = socket.socketpair()
    with one, two:
        fcntl.ioctl(one, 0x8901, struct.pack("i", pid))
    return "owned"


def do_pipe_pages() -> str:
    read, write = os.pipe()
    try:
        return str(fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, MIB))
    finally:
        os.close(read)
        os.close(write)


def do_timers(most: int) -> str | None:
    made: list[bytes] = []
    try:
        while len(made) <= most:
            timer = struct.pack("i", 0)
            call(222, 1, None, timer)
            made.append(timer)
    except OSError:
        return None
    return f"{len(made)} timers"


# -- starting processes ----------------------------------------------------------------------------------


def do_fork() -> str:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return "forked"


def do_clone3() -> str:
    return str(call(435, bytes(88), 88))


def do_exec() -> NoReturn:
    os.execv("/bin/sh", ["sh", "-c", "exit 7"])


def do_shell() -> str:
    return subprocess.run(["/bin/sh", "-c", "id"], capture_output=True, check=False).stdout.decode()


def do_fork_bomb(most: int) -> str | None:
    born: list[int] = []
    try:
        while len(born) <= most:
            pid = os.fork()
            if not pid:
                time.sleep(600)
                os._exit(0)
            born.append(pid)
    except OSError:
        return None
    finally:
        for pid in born:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return f"{len(born)} processes"


def do_daemon() -> None:
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check(libc.prctl(15, b"harm-daemon", 0, 0, 0))
    time.sleep(600)


def do_thread_bomb(most: int) -> str | None:
    gate = threading.Event()
    threads: list[threading.Thread] = []
    try:
        while len(threads) <= most:
            thread = threading.Thread(target=gate.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        return None
    finally:
        gate.set()
        for thread in threads:
            thread.join()
    return f"{len(threads)} threads"


# -- the network -----------------------------------------------------------------------------------------


def do_tcp(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"harm")
    return "sent"


def do_tcp_any(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as connection:
        connection.connect(("127.0.0.1", port))
    return "connected by MPTCP"


def do_fast_open(port: int) -> str:
    with socket.socket() as connection:
        connection.sendto(b"harm", 0x20000000, ("127.0.0.1", port))
    return "sent"


def do_udp(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"harm", ("127.0.0.1", port))
    return "sent"


def do_listen() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
    return "listening"


def do_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path if path[0] == "/" else "\0" + path)
        connection.sendall(b"harm")
    return "sent"


def do_datagram_pair(path: str) -> str:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        one.sendto(b"harm", path)
    return "sent"


def do_reconnect_pair(path: str) -> str:
    one, two = socket.socketpair()
    with one, two:
        one.connect(path)
    return "connected"


def do_family(family: int, kind: int) -> str:
    socket.socket(family, kind).close()
    return "a socket"


# -- resources -------------------------------------------------------------------------------------------


def do_heap() -> str:
    pieces: list[bytes] = []
    while len(pieces) < 4096:
        pieces.append(b"x" * MIB)
    return f"{len(pieces)} MiB"


def do_shared_mapping() -> str:
    pieces: list[mmap.mmap] = []
    while len(pieces) < 64:
        piece = mmap.mmap(-1, 64 * MIB)
        for at in range(0, 64 * MIB, 4096):
            piece[at] = 1
        pieces.append(piece)
    return f"{len(pieces) * 64} MiB"


def do_memfd() -> str:
    return str(os.memfd_create("harm"))


def do_descriptors(most: int) -> str | None:
    opened: list[int] = []
    try:
        while len(opened) <= most:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        return None if error.errno == errno.EMFILE else str(error)
    finally:
        for fd in opened:
            os.close(fd)
    return f"{len(opened)} descriptors"


def do_spinning_children() -> None:
    for _ in range(2):
        if not os.fork():
            while True:
                pass
    while True:
        time.sleep(1)


def do_leave_spinning() -> None:
    threading.Thread(target=do_spin, daemon=True).start()


def do_spin() -> NoReturn:
    while True:
        pass


def do_stubborn() -> NoReturn:
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    while True:
        try:
            time.sleep(600)
        except BaseException:
            continue


def do_raise_limits() -> str:
    for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            resource.setrlimit(which, (hard + 1, hard + 1))
            return f"more than {hard}"
    return "no limits at all"


# -- the pipes -------------------------------------------------------------------------------------------


def do_every_descriptor() -> None:
    for fd in range(4096):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            continue


def do_held() -> str | None:
    held = []
    for fd in range(4096):
        try:
            os.fstat(fd)
        except OSError:
            continue
        held.append(fd)
    return None if held == list(range(6)) else f"descriptors {held}"


def do_half_frame() -> NoReturn:
    os.write(4, pack_header(HEAD, 1, 100) + b"half")
    os._exit(0)


def do_huge_frame() -> None:
    os.write(4, struct.pack("<BII", BODY, 1, 0xFFFFFFFF) + b"x" * 1000)


def do_pickle(path: str) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return open, (path, "w")

    data = pickle.dumps(Harm())
    os.write(4, data)
    os.write(4, pack_header(HEAD, 1, len(data)) + data)


def do_frame_flood() -> None:
    frame = pack_header(END, 1, 0) + pack_header(READY, 0, 0)
    for _ in range(100_000):
        os.write(4, frame * 10)


def do_output_flood() -> None:
    for _ in range(2000):
        os.write(1, b"harm " * 2000 + b"\n")


def do_exit() -> NoReturn:
    os._exit(0)


def do_segfault() -> None:
    ctypes.string_at(0)


def do_abort() -> NoReturn:
    os.abort()


def do_close_all() -> None:
    os.closerange(0, 4096)


# -- the cage itself -------------------------------------------------------------------------------------


def do_prctl(option: int, value: int) -> str:
    call(157, option, value, 0, 0, 0)
    return "done"


def do_undumpable_no_more() -> str:
    return do_prctl(4, 1)


def do_unfilter() -> str:
    call(157, 22, 0, 0)
    return "unfiltered"


def do_call(number: int, arguments: list[int]) -> str:
    return str(call(number, *arguments))


def do_set_user() -> str:
    os.setuid(0)
    return "root"


def do_root_by_id() -> str | None:
    return "root" if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()) else None


def do_capabilities() -> str | None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data))
    return "capabilities" if any(data) else None


def do_leave_state() -> str | None:
    left_behind.append("here")
    return f"what {len(left_behind) - 1} jobs before have left" if len(left_behind) > 1 else None
