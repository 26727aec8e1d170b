"""Seccomp filters: which system calls a sandboxed worker may make, compiled once, and loaded by each worker.

The first filter forbids what a handler has no use for and an attacker has, and looks at arguments where these decide.
The strict profile loads a second one, which allows what Python, its frameworks and numpy need, and nothing else; the
kernel takes the stricter verdict. Pointers can't be looked at, so a call whose arguments hide behind one is judged as
a whole.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
import tempfile
from typing import Any, Final

from ..platform import linux

_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER: Final = 1
_TSYNC: Final = 1
_OWN_PID: Final = 0x5BADF00D
"""Stands for the worker's own pid in a compiled filter: no pid can be that high (proc(5), pid_max)."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FORBIDDEN: Final = _names("""
    acct add_key bpf chroot clock_adjtime clock_settime delete_module fanotify_init fanotify_mark finit_module
    get_robust_list init_module inotify_add_watch inotify_init inotify_init1 io_cancel io_destroy io_getevents
    io_pgetevents io_setup io_submit ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie mbind
    memfd_create migrate_pages mknod mknodat modify_ldt mount move_pages mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd name_to_handle_at nfsservctl
    open_by_handle_at perf_event_open personality pivot_root process_vm_readv process_vm_writev ptrace quotactl
    reboot request_key rt_sigqueueinfo rt_tgsigqueueinfo sched_setaffinity seccomp semctl semget semop semtimedop
    set_mempolicy setdomainname setfsgid setfsuid setgid setgroups sethostname setns setregid setresgid setresuid
    setreuid settimeofday setuid shmat shmctl shmdt shmget stime swapoff swapon sync syncfs syslog tee tkill umount
    umount2 unshare uselib userfaultfd vhangup vmsplice
""")

_OF_OWN_FILES: Final = _names("""
    chmod chown fchmod fchmodat fchown fchownat fremovexattr fsetxattr futimesat lchown lremovexattr lsetxattr
    removexattr setxattr utime utimensat utimes
""")
"""What Landlock does not see, and an owner may do to any of its files: for workers that share their user."""

_FORK: Final = ("fork", "vfork", "execve", "execveat")
_SOCKET: Final = ("socket", "connect")
_SERVER: Final = ("bind", "listen", "accept", "accept4")
_FIRST_NEW: Final = 424
_NEW: Final = {"close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449}
"""From this number on calls have the same numbers on all machines, and are forbidden but for these: libseccomp may not
know their names, and nobody those of calls to come. clone3 is among the forbidden, since it hides its flags behind a
pointer: the C library falls back to clone, whose flags can be seen."""

_IOCTL: Final = {"x86_64": 16, "aarch64": 29}
_REQUESTS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Others change what a file's owner may change (inode flags),
or have a signal sent (FIOSETOWN)."""

_OF_OTHERS: Final = _names("""
    getpgid getsid prlimit64 sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler
""")
"""Calls whose first argument is a pid, and 0 for one's own."""

_PRIORITIES: Final = {"getpriority": 0, "setpriority": 0, "ioprio_get": 1, "ioprio_set": 1}
"""Calls whose second argument is a pid, 0 for one's own, where the first one is this; else it is a group, or a user."""

_PRCTL: Final = (1, 4, 22, 24, 26, 28, 35, 36, 0x59616D61)
"""PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, TSC, SECUREBITS, MM, CHILD_SUBREAPER, PTRACER."""

_FCNTL: Final = (8, 10, 15, 1024, 1026, 1031)
"""SETOWN, SETSIG and SETOWN_EX have the kernel send any signal to anybody; with a lease (SETLEASE) the owner of a file
holds up whoever opens it; NOTIFY watches; SETPIPE_SZ takes from what pipes the user may have."""

_CLONE_PARENT: Final = 0x00008000
_CLONE_THREAD: Final = 0x00010000
_CLONE_NAMESPACES: Final = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_FAST_OPEN: Final = 0x20000000
_STREAM: Final = 1
_INET: Final = 2
_INET6: Final = 10
_TCP: Final = 6
_INT: Final = 0xFFFFFFFF

_ALLOWED: Final = _names("""
    accept accept4 access alarm arch_prctl bind brk capget chdir chmod clock_getres clock_gettime clock_nanosleep
    clone clone3 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl
    epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve exit exit_group faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fcntl fdatasync fgetxattr flistxattr flock fork fstat fstatfs fsync ftruncate
    futex futex_waitv get_mempolicy getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getxattr ioctl kill lgetxattr link linkat listen listxattr
    llistxattr lseek lstat madvise membarrier mincore mkdir mkdirat mlock mlock2 mmap mprotect mremap msync munlock
    munmap nanosleep newfstatat open openat openat2 pause pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
    prctl pread64 preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat
    readv recvfrom recvmmsg recvmsg rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
    rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_yield seccomp select sendfile sendmmsg
    sendmsg sendto set_robust_list set_tid_address setitimer setpgid setrlimit setsid setsockopt shutdown
    sigaltstack socket socketpair splice stat statfs statx symlink symlinkat sysinfo tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
    truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
""")


def available() -> str:
    """Why no filter can be compiled here; empty where one can."""
    if platform.machine() not in _SECCOMP:
        return f"the filters are not known to hold on {platform.machine()}: run it on x86_64 or aarch64"
    try:
        import pyseccomp  # noqa: F401
    except ImportError:
        return "the package pyseccomp is missing: install it (it comes with the extra `sandbox`)"
    except (OSError, RuntimeError) as error:
        return f"libseccomp is missing ({error}): on Debian, install libseccomp2"
    return ""


def deny_filter(*, processes: bool, network: bool, own_user: bool, own_pids: bool) -> bytes:
    """What no handler may call, compiled.

    `own_user`: the worker shares its user with nobody; `own_pids`: it sees no process but its own.
    """
    import pyseccomp as seccomp

    forbid = seccomp.ERRNO(errno.EPERM)
    filters = seccomp.SyscallFilter(seccomp.ALLOW)
    names = [*_FORBIDDEN, *_SERVER]
    if not own_user:
        names += _OF_OWN_FILES
    if not processes:
        names += _FORK
    if not network:
        names += _SOCKET
    for name in names:
        _add(filters, forbid, name)

    def when(argument: int, comparison: int, value: int, masked: int = 0) -> Any:
        return seccomp.Arg(argument, comparison, value, masked)

    equal, masked, other, above, below = seccomp.EQ, seccomp.MASKED_EQ, seccomp.NE, seccomp.GT, seccomp.LT
    if not processes:
        _add(filters, forbid, "clone", when(0, masked, _CLONE_THREAD, 0))
    for flag in (_CLONE_PARENT, *_CLONE_NAMESPACES):
        _add(filters, forbid, "clone", when(0, masked, flag, flag))
    # An int's upper half is nobody's: what is forbidden is compared without it, what is allowed with it.
    for name in _OF_OTHERS:
        _add(filters, forbid, name, when(0, other, 0))
    for name, process in _PRIORITIES.items():
        _add(filters, forbid, name, when(0, other, process))
        _add(filters, forbid, name, when(1, other, 0))
    if not own_pids and not processes:
        for name in ("kill", "tgkill"):
            _add(filters, forbid, name, when(0, other, _OWN_PID))
    for option in _PRCTL:
        _add(filters, forbid, "prctl", when(0, masked, _INT, option))
    for command in _FCNTL:
        _add(filters, forbid, "fcntl", when(1, masked, _INT, command))
    # A stream pair is connected for good; a pair of datagram sockets could be sent elsewhere.
    kinds = [kind for kind in range(16) if kind != _STREAM]
    for kind in kinds:
        _add(filters, forbid, "socketpair", when(1, masked, 0xF, kind))
    if network:
        for family in range(_INET + 1, _INET6):
            _add(filters, forbid, "socket", when(0, equal, family))
        _add(filters, forbid, "socket", when(0, below, _INET))
        _add(filters, forbid, "socket", when(0, above, _INET6))
        for kind in kinds:
            _add(filters, forbid, "socket", when(1, masked, 0xF, kind))
        # Multipath TCP and SCTP are streams as well, and no TCP to Landlock.
        for protocol in range(1, _TCP):
            _add(filters, forbid, "socket", when(2, equal, protocol))
        _add(filters, forbid, "socket", when(2, above, _TCP))
        # TCP Fast Open connects without connect(2), which is where Landlock looks at the port.
        for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
            _add(filters, forbid, name, when(flags, masked, _FAST_OPEN, _FAST_OPEN))
    return _export(seccomp, filters)


def allow_filter() -> bytes:
    """What the strict profile allows, compiled."""
    import pyseccomp as seccomp

    filters = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in _ALLOWED:
        _add(filters, seccomp.ALLOW, name)
    return _export(seccomp, filters)


def request_filter() -> bytes:
    """What depends on more than a libseccomp rule can say: new calls, and ioctl by its request."""
    machine = platform.machine()
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    allow, unknown, forbid = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EPERM
    low_half = 24 if sys.byteorder == "little" else 28  # of the second argument (seccomp(2), struct seccomp_data)
    new = sorted(_NEW.values())
    # Each step: code, steps to skip where it holds, and where it does not, operand.
    steps = [(load, 0, 0, 0), (equal, len(new) + 3, 0, _IOCTL[machine]), (above, 0, len(new) + 1, _FIRST_NEW)]
    steps += [(equal, len(new) - at, 0, number) for at, number in enumerate(new)]
    steps += [(answer, 0, 0, unknown), (answer, 0, 0, allow), (load, 0, 0, low_half)]
    steps += [(equal, len(_REQUESTS) - at, 0, request) for at, request in enumerate(_REQUESTS)]
    steps += [(answer, 0, 0, forbid), (answer, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def load(compiled: bytes, pid: int) -> None:
    """Filter the calls of this process, all threads, for good. Needs no_new_privs."""
    program = _with_pid(compiled, pid)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    linux.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, _TSYNC, header)


def _add(filters: Any, action: int, name: str, *conditions: Any) -> None:
    import pyseccomp as seccomp

    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    if number >= 0:  # else this machine, or libseccomp, does not know it by name
        filters.add_rule(action, number, *conditions)


def _export(seccomp: Any, filters: Any) -> bytes:
    try:
        filters.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # a tree instead of a list
    except (OSError, ValueError):
        pass  # an older libseccomp
    with tempfile.TemporaryFile() as file:
        filters.export_bpf(file)
        file.seek(0)
        return file.read()


def _with_pid(compiled: bytes, pid: int) -> bytes:
    """The filter with this process's pid in the place that was left for it; `struct sock_filter` is <HBBI."""
    program = bytearray(compiled)
    for at in range(4, len(program), 8):
        if struct.unpack_from("=I", program, at)[0] == _OWN_PID:
            struct.pack_into("=I", program, at, pid)
    return bytes(program)
