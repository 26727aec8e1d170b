"""Processes that a handler forks: they never speak for the worker.

`os.fork` in a handler makes a second process in the midst of our code. It has none of the pipes, and ends where it
would come back to us: where the handler returns or raises, reads or answers its request, or gives way to the event
loop, which is its parent's. A fork of `multiprocessing` runs what it was made for and never comes here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

from .exception_report import explain

SOFTWARE: Final = 70
"""The exit code of a worker that has met a mistake of ours (sysexits.h, EX_SOFTWARE)."""

_fds: list[int] = []
_severs: list[Callable[[], object]] = []
_is_fork = False
_asked: SystemExit | None = None
"""What `sys.exit` has raised in this fork: a task group may keep it to itself."""


def disown_forks(fds: Iterable[int], sever: Callable[[], object]) -> None:
    """From now on take these descriptors too from every process that this one forks, and call `sever` in it."""
    if not _severs:
        os.register_at_fork(after_in_child=_disown)
    _fds.extend(fds)
    _severs.append(sever)


def own_again(fds: Iterable[int], sever: Callable[[], object]) -> None:
    """These descriptors are closed: their numbers may be the handler's."""
    for fd in fds:
        _fds.remove(fd)
    _severs.remove(sever)


def is_fork() -> bool:
    """Whether this process is one that a handler has forked."""
    return _is_fork


def leave(error: BaseException | None = None) -> NoReturn:
    """End this process, with the exit status that an interpreter gives what ends so, and its output kept."""
    code = 0
    error = error or _asked
    try:
        if isinstance(error, SystemExit):
            code = _code_of(error)
        elif error is not None:
            code = 1
            print(explain(error), end="", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code & 0xFF)


def end_broken(error: BaseException) -> NoReturn:
    """End a worker that has met a mistake of ours: a lane that answers nothing would have its callers wait for ever."""
    if is_fork():
        leave(error)
    print(explain(error, whole=True), end="", file=sys.stderr, flush=True)
    os._exit(SOFTWARE)


def leave_with_result(*results: object, **context: object) -> NoReturn:
    """`leave`, for a thread that hands its result over: what it raised is among `results`, or in a future there."""
    for result in results:
        if isinstance(result, BaseException):
            leave(result)
        exception = getattr(result, "exception", None)
        if callable(exception) and getattr(result, "done", bool)():
            leave(exception())
    leave()


def _disown() -> None:
    global _is_fork
    _is_fork = True
    sys.exit = _note_exit
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        for fd in _fds:
            os.close(fd)
    else:
        for fd in _fds:
            os.dup2(null, fd, inheritable=False)  # the numbers stay taken: nothing that it opens is taken for a pipe
        os.close(null)
    for sever in _severs:
        sever()


def _note_exit(status: sys._ExitCode | None = None, /) -> NoReturn:
    """`sys.exit`, in a fork."""
    global _asked
    _asked = SystemExit(status)
    raise _asked


def _code_of(error: SystemExit) -> int:
    """As the interpreter understands it (sys.exit)."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)
    return 1
