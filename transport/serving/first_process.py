"""The first process of a container: it has a child serve, passes signals on to it, and reaps what others leave behind.

As pid 1 a process has duties that a server must not have (pid_namespaces(7)): every orphan of the container becomes its
child, and signals that it has no handler for are dropped.
"""

from __future__ import annotations

import os
import signal
from typing import Final, NoReturn

_PASSED_ON: Final = frozenset(
    (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
)


def leave_pid_1() -> None:
    """Go on as a child where this process is pid 1, which ends when the child does, with its exit status."""
    if os.getpid() != 1:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # were it ignored, nobody would be told of the end (wait(2))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child:
        _watch_over(child)
    for name in ("LISTEN_PID", "WATCHDOG_PID"):  # whoever has started the container means what serves
        if os.environ.get(name) == "1":
            os.environ[name] = str(os.getpid())
    os.setpgid(0, 0)  # a terminal's signals come to pid 1, which passes them on: not twice
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_over(child: int) -> NoReturn:
    """The rest of the first process's life."""
    while True:
        _reap(child)  # first of all: nobody has told of what had ended before
        number = signal.sigwait({*_PASSED_ON, signal.SIGCHLD})
        if number in _PASSED_ON:
            os.kill(child, number)  # it is ours to reap: its number is no other's


def _reap(child: int) -> None:
    """Reap who has ended. With the child this process ends."""
    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
        if ended[0] == child:
            code = os.waitstatus_to_exitcode(ended[1])
            os._exit(code if code >= 0 else 128 - code)
