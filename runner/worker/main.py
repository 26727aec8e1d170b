"""The child: one process that runs one job at a time, or one on each of its lanes, from fork to exit.

`run` is what the zygote's fork calls. It takes on the worker's descriptors (requests on 3, responses on 4, the line
on 5, /dev/null on 0, the log pipes on 1 and 2), closes all else, sheds what belonged to the
zygote, loads the handler, says READY, and then serves jobs until the request pipes end.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

import msgspec

from ..control import source_snapshot
from ..control.line_messages import LANE_DESCRIPTORS
from ..control.signals import STACKS_SIGNAL
from ..control.zygote_messages import ZygoteConfig
from ..platform import descriptors, linux
from ..wire.frames import FAULT, READY, encode
from ..wire.messages import Ready
from . import reaper
from .cancellation import Cancellation
from .exception_report import report_on_start
from .forks import disown_forks, is_fork, leave
from .handlers.adapter import Adapter, AsyncAdapter
from .handlers.load import HandlerError, load
from .job_loop import serve
from .pipes import Pipes
from .stdio import LogStream, OutputFlag, TaggedOutput
from .titles import set_title

REQUEST_FD: Final = 3
RESPONSE_FD: Final = 4
LINE_FD: Final = 5
LAST_FD: Final = LINE_FD
DESCRIPTORS: Final = 5
"""How many descriptors come with a Spawn order: request pipe, response pipe, stdout, stderr, line."""

_DESCRIPTOR_CEILING: Final = 1 << 20

_encode = msgspec.msgpack.Encoder().encode


class ChildSetup(msgspec.Struct, frozen=True):
    """How a worker is born: its parent's pid, its descriptors, and those that a preload had opened before.

    `code_fd` is the snapshot of the app's code, -1 for none.

    Where it is sandboxed, `enter` shuts it in, and `enter_namespaces` takes it into its own namespaces.
    """

    parent: int
    fds: list[int]
    inherited: frozenset[int]
    code_fd: int
    enter: Callable[[], None] | None = None
    enter_namespaces: Callable[[], None] | None = None


def run(config: ZygoteConfig, handler: Adapter | AsyncAdapter | None, setup: ChildSetup) -> NoReturn:
    """The life of a worker. `handler` is given where the zygote has preloaded it."""
    if setup.enter_namespaces is not None:
        setup.enter_namespaces()
    code = source_snapshot.own_view(setup.code_fd)
    _take_descriptors(setup.fds, setup.inherited, code, sandboxed=setup.enter is not None)
    cancellation = Cancellation(LINE_FD)
    prints = OutputFlag() if config.concurrency == 1 else TaggedOutput()
    pipes = Pipes(REQUEST_FD, RESPONSE_FD, cancellation, prints)
    _shed(setup.parent, prints)
    disown_forks((REQUEST_FD, RESPONSE_FD, LINE_FD), pipes.sever)
    reaper.begin()
    set_title("worker", config.label)
    _reseed()
    try:
        config.limits.apply(config.concurrency)
        if config.concurrency > 1:
            descriptors.make_room(config.concurrency * LANE_DESCRIPTORS)
        if setup.enter is not None:
            setup.enter()
            sys.path[:] = config.path  # the app's directories too, now that its modules run in the sandbox
        handler = handler or _load(config, code)
        if code >= 0:
            os.close(code)
        life = _begin(handler, config, pipes, cancellation)
        threads = config.concurrency > 1 and isinstance(handler, Adapter)
        pipes.write(encode(READY, 0, _encode(Ready(handler.kind, threads))))
    except BaseException as error:  # noqa: BLE001 - a start that failed, whatever it raised, is reported
        if is_fork():
            leave(error)
        pipes.write(encode(FAULT, 0, _encode(report_on_start(error, debug=config.debug))))
        sys.stdout.flush()
        os._exit(1)
    life()
    _wind_up()
    sys.exit(0)


def _load(config: ZygoteConfig, code: int) -> Adapter | AsyncAdapter:
    """Load the handler, from the pool's snapshot of its code where there is one; else make that."""
    fresh = config.by_name and not source_snapshot.use(code)
    handler = load(config)
    if fresh:
        source_snapshot.keep(code)
    return handler


def _wind_up() -> None:
    """What an interpreter does at its end, and a process of multiprocessing's leaves out: threads, then `atexit`.

    It has as long as the pool gives a worker to stop.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _begin(
    handler: Adapter | AsyncAdapter, config: ZygoteConfig, pipes: Pipes, cancellation: Cancellation
) -> Callable[[], object]:
    """Get the handler ready; gives what then serves its jobs until there are no more."""
    fds = REQUEST_FD, RESPONSE_FD, LINE_FD
    if isinstance(handler, Adapter):
        if config.concurrency == 1:
            cancellation.install()
            return lambda: serve(pipes, handler, cancellation)
        from .threads import ThreadedWorker  # loaded where it is used

        return ThreadedWorker(handler, fds, pipes.prints, config.limits.memory_bytes).serve
    if config.concurrency > 1 and config.cpu_seconds_asked:
        raise HandlerError(
            "cpu_seconds is a limit of each job, and the jobs of an async handler share one thread: "
            "leave it out (wall_seconds holds for each), or start the pool with concurrency=1"
        )
    from .async_loop import AsyncWorker  # asyncio is loaded where it is used

    worker = AsyncWorker(handler, fds, pipes.prints, config.grace)
    worker.start()
    return worker.serve


def _take_descriptors(fds: list[int], inherited: frozenset[int], code: int, *, sandboxed: bool) -> None:
    """Put the job's descriptors on their numbers and close all that is not the handler's own.

    What has no number here is not shared with anybody: open file descriptions have a position, flags, locks and owners
    that whoever shares one may change (open(2)). Only a preload of trusted code leaves some to its workers; a sandboxed
    worker has them anew.
    """
    request_fd, response_fd, out_fd, err_fd, line_fd = fds
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(out_fd, 1)
    os.dup2(err_fd, 2)
    os.dup2(request_fd, REQUEST_FD, inheritable=False)
    os.dup2(response_fd, RESPONSE_FD, inheritable=False)
    os.dup2(line_fd, LINE_FD, inheritable=False)
    if sandboxed:
        inherited = frozenset(fd for fd in inherited if linux.reopen(fd))
    start = LAST_FD + 1
    for kept in sorted(fd for fd in {*inherited, code} if fd > LAST_FD):
        os.closerange(start, kept)
        start = kept + 1
    os.closerange(start, _DESCRIPTOR_CEILING)


def _shed(parent: int, prints: OutputFlag) -> None:
    """Leave behind what belonged to the zygote, and be bound to its life."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    linux.become_subreaper()
    linux.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the line above took effect
    sys.argv[:] = [""]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open
    if isinstance(prints, TaggedOutput):
        sys.stdout, sys.stderr = prints.stream(1), prints.stream(2)
    else:
        sys.stdout, sys.stderr = LogStream(1, prints.note), LogStream(2, prints.note)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    faulthandler.enable(2)
    faulthandler.register(STACKS_SIGNAL, 2, all_threads=True, chain=False)
    _replace_authkeys()


def _reseed() -> None:
    """Give numpy's global generator a state of its own, where a preload has brought it: the template's is everybody's.

    Python reseeds its `random` by itself.
    """
    random: Any = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()


def _replace_authkeys() -> None:
    """Give this process authentication keys of its own: a key shared by workers would let one pass for another."""
    for name in ("multiprocess.process", "multiprocessing.process"):
        module = sys.modules.get(name)
        if module is not None:
            module.current_process().authkey = os.urandom(32)
