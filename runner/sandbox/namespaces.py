"""A worker in namespaces of its own: how it is born there, and how its end is told.

The zygote forks a process that leaves for new namespaces and forks the first process in them, and ends. The first
process (pid 1 there, whose end is the end of all) forks the worker, reaps, and tells the worker's exit status. The
zygote is its parent then, as that of any worker: it is the subreaper.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from typing import Any, Final, NoReturn

from ..platform import linux
from .egress import listen

_STATUS: Final = struct.Struct("=i")
_DESCRIPTOR_CEILING: Final = 1 << 20


def enter_namespaces(control: socket.socket, zygotes: socket.socket, *, network: bool, egress: bool) -> None:
    """Go on as the worker, in new namespaces; in the host's own network with `network`.

    `zygotes` is the other end of `control`, which the zygote alone is to have: its end is told by that. With `egress`
    there is a socket for the proxy in the new network. Others of the processes that this makes never return.
    """
    zygotes.close()
    kinds = linux.NEW_PIDS | linux.NEW_IPC | linux.NEW_HOSTNAME
    linux.unshare(kinds if network else kinds | linux.NEW_NETWORK)
    first = os.fork()
    if first:
        control.send(_STATUS.pack(first))
        os._exit(0)
    if not control.recv(1):  # the word that our parent is the zygote now
        os._exit(1)
    linux.die_with_parent(signal.SIGKILL)
    if _is_closed(control):
        os._exit(1)  # it ended before the line above took effect
    listeners = [listen()] if egress else []
    worker = os.fork()
    if not worker:
        for listener in (control, *listeners):
            listener.close()
        return
    pidfd = os.pidfd_open(worker)
    socket.send_fds(control, [b"born"], [pidfd, *(listener.fileno() for listener in listeners)])
    _reap(control, worker)


def _is_closed(control: socket.socket) -> bool:
    """Whether the zygote, which only reads from now on, has closed its end."""
    try:
        control.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


def _reap(control: socket.socket, worker: int) -> NoReturn:
    """The rest of the first process's life."""
    fd = control.detach()
    os.closerange(0, fd)
    os.closerange(fd + 1, _DESCRIPTOR_CEILING)
    linux.drop_capabilities()
    while True:
        pid, status = os.wait()
        if pid == worker:
            os.write(fd, _STATUS.pack(os.waitstatus_to_exitcode(status)))
            os._exit(0)


class Nested:
    """A nested worker as the zygote sees it.

    `pid` is of the first process of its namespaces, which is the zygote's child; `worker_pid` is the worker's, as the
    zygote and the host know it. `listener` is the descriptor of the proxy's socket in there, -1 for none.
    """

    def __init__(self, starter: Any) -> None:
        """`starter` makes the process that calls `enter_namespaces` with both sockets. OSError where that fails."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = starter(theirs, self._control)
                process.start()
            answer = self._control.recv(_STATUS.size)
            process.join()
            if not answer:
                raise OSError("it ended before it was in its namespaces")
            (self.pid,) = _STATUS.unpack(answer)
            self._control.send(b"1")
            _, fds, _, _ = socket.recv_fds(self._control, 16, 2)
            if not fds:
                raise OSError("the first process of its namespaces ended")
            self.pidfd, self.listener = fds[0], fds[1] if len(fds) > 1 else -1
            try:
                self.worker_pid = _pid_of(self.pidfd)
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
        except BaseException:
            self._control.close()
            raise

    def abandon(self) -> None:
        """End it: it can't be had as it was asked for."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self._control.close()

    @property
    def exitcode(self) -> int | None:
        """The worker's exit status, None as long as its first process lives; asking reaps it."""
        if self._control.fileno() < 0:
            return -signal.SIGKILL
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        with self._control as control:
            answer = control.recv(_STATUS.size)
        return int(_STATUS.unpack(answer)[0]) if answer else -signal.SIGKILL


def _pid_of(pidfd: int) -> int:
    """The pid that a pidfd stands for (proc(5), fdinfo). OSError where its process has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
        for line in info:
            name, _, value = line.partition(":")
            if name == "Pid" and int(value) > 0:
                return int(value)
    raise OSError("the worker has ended")
