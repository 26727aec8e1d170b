"""The process that forks the workers, and reports their ends.

One per pool, started with `subprocess`, so that the caller's `__main__` is never run again and nothing
but standard input, the log pipe and the control socket is inherited. It is single-threaded, which makes
forking safe; it is the parent of every worker, so that their parent-death signal is tied to a thread that
lasts; and it is a subreaper: what a dead worker leaves behind becomes its child, and is killed.

It takes `Spawn` orders over the control socket, each with the descriptors of a new worker, and answers
`Born` with the worker's pidfd and `Died` with its exit status. When the control socket closes, because
the pool closed or because the host is gone, it kills all that it has started and exits.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
import multiprocess

from ..control import nested_pools, source_snapshot
from ..control.import_isolation import AppModuleFinder
from ..control.zygote_messages import (
    MAX_MESSAGE,
    Born,
    Died,
    Failed,
    MissingLayers,
    News,
    Noted,
    Spawn,
    Stopped,
    ZygoteConfig,
)
from ..platform import linux
from . import main as worker
from . import reaper
from .exception_report import report_on_start
from .forks import leave
from .handlers.adapter import Adapter, AsyncAdapter
from .handlers.load import HandlerError, load
from .titles import set_title

if TYPE_CHECKING:
    from ..sandbox.egress import EgressProxy
    from ..sandbox.namespaces import Nested
    from ..sandbox.setup import SandboxSetup

_encode = msgspec.msgpack.Encoder().encode
_decode_order = msgspec.msgpack.Decoder(Spawn).decode
_fork_context = multiprocess.get_context("fork")


def main() -> None:
    """Run a zygote until its control socket closes. The socket's descriptor is the first argument."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that has started this one takes no signals
    control = socket.socket(fileno=int(sys.argv[1]))
    told = int(sys.argv[2])
    code_fd = source_snapshot.own_view(told)
    if told >= 0:
        os.close(told)
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ZygoteConfig)
    sys.argv[1:] = []
    sys.stdin.close()
    null = os.open(os.devnull, os.O_RDWR)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open
    nested_pools.within[:] = config.within
    if config.taken:
        sys.meta_path.insert(0, AppModuleFinder(config.taken))
    linux.become_subreaper()
    set_title("template", config.label)
    zygote = Zygote(control, config, code_fd)
    if not zygote.prepare():
        os._exit(1)
    zygote.run()


_ENDS = frozenset((os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED))
_CHANGES = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT


def _is_stopped(pid: int) -> bool:
    """Whether this child was stopped since the last look. A nested worker's first process is not the worker."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is not None
    except ChildProcessError:
        return False


def _start(process: Any) -> None:
    """Start a process, and forget it in `multiprocess`, which would poll each of its children at each start."""
    process.start()
    multiprocess.process._children.discard(process)


class Zygote:
    """The workers that it has forked, and the loop that waits for orders and ends."""

    def __init__(self, control: socket.socket, config: ZygoteConfig, code_fd: int) -> None:
        self._code_fd = code_fd
        self._control = control
        self._config = config
        self._sandbox: SandboxSetup | None = None
        self._handler: Adapter | AsyncAdapter | None = None
        self._workers: dict[int, tuple[int, Any]] = {}
        self._egress: EgressProxy | None = None
        self._kept: frozenset[int] = frozenset()
        self._inherited: frozenset[int] = frozenset()
        # The workers' descriptors get fixed numbers; nothing that a preload opens may sit on them.
        while (fd := os.dup(0)) <= worker.LAST_FD:
            pass
        os.close(fd)

    def prepare(self) -> bool:
        """Do once what is for all workers; False after telling the host why that failed."""
        config = self._config
        if config.sandbox is not None and config.sandbox.connect_hosts:
            from ..sandbox.egress import EgressProxy  # loaded where it is used

            try:
                self._egress = EgressProxy(
                    config.sandbox.connect_hosts, functools.partial(set_title, "egress", config.label)
                )
            except OSError as error:
                self._send(Failed(f"the egress proxy can't be started: {error}"))
                return False
        reaper.note_starts()  # before anything of the app's is imported
        if config.modules or config.preload:
            pid = os.getpid()
            try:
                self._preload()
                if os.getpid() != pid:
                    leave()  # the import has forked: this is no zygote
            except BaseException as error:  # noqa: BLE001 - whatever the import raised is the host's to know
                if os.getpid() != pid:
                    leave(error)
                report = report_on_start(error, debug=config.debug)
                why = f"the handler can't be preloaded:\n{report.traceback}" if report.traceback else report.message
                self._send(Failed(why))
                return False
        if config.sandbox is not None:
            from ..sandbox.setup import SandboxError, SandboxSetup  # loaded where it is used

            try:
                self._sandbox = SandboxSetup(
                    config.sandbox, "" if config.pickle else config.handler, config.path, config.limits.memory_bytes
                )
            except (SandboxError, OSError) as error:
                self._send(Failed(str(error)))
                return False
            if self._sandbox.lacking:
                self._send(MissingLayers(self._sandbox.lacking))
            if self._sandbox.notes:
                self._send(Noted(self._sandbox.notes))
        return True

    def _preload(self) -> None:
        """Import the handler here, or what it will import."""
        fresh = not source_snapshot.use(self._code_fd)
        before = linux.open_descriptors()
        with nested_pools.importing_handler():
            for name in self._config.modules:
                importlib.import_module(name)
        if self._config.preload:
            self._handler = load(self._config)
            if fresh:
                source_snapshot.keep(self._code_fd)
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise HandlerError(
                f"importing the handler started {threads - 1} thread(s), which a fork would lose: start the pool with "
                f"preload=False; or, where they are a numeric library's, with OMP_NUM_THREADS=1 and "
                f"OPENBLAS_NUM_THREADS=1 in its environment"
            )
        self._inherited = frozenset(linux.open_descriptors() - before)
        self._kept = frozenset(pid for pid in linux.children() if self._egress is None or pid != self._egress.pid)

    def run(self) -> None:
        """Fork, reap and report, until the control socket closes; then kill everything and exit."""
        # After a preload: the handler's import may have set signals for purposes of its own.
        child_ended, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(child_ended, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if child_ended in ready:
                    os.read(child_ended, 4096)
                    if not self._reap():
                        break
                if self._control.fileno() in ready and not self._take_order():
                    break
        except OSError:
            traceback.print_exc()
        finally:
            self._end()

    def _take_order(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, worker.DESCRIPTORS)
        if not data:
            return False
        try:
            self._fork(_decode_order(data), fds)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, order: Spawn, fds: list[int]) -> None:
        try:
            child, pid, pidfd = self._start(order.worker, fds)
        except OSError as error:  # no more processes or memory: the host counts it as a death in start-up
            print(f"worker {order.worker} can't be forked: {error}", file=sys.stderr, flush=True)
            self._send(Died(order.worker, 1))
            return
        self._workers[child.pid] = (order.worker, child)
        try:
            self._send(Born(order.worker, pid), pidfd)
        finally:
            os.close(pidfd)

    def _start(self, number: int, fds: list[int]) -> tuple[Any, int, int]:
        """Fork a worker; what tells its end, its pid, and its pidfd."""
        sandbox = self._sandbox
        name = f"blastdoor-worker-{number}"
        if sandbox is None:
            process = self._process(name, worker.ChildSetup(os.getpid(), fds, self._inherited, self._code_fd))
            _start(process)
            return process, process.pid, os.pidfd_open(process.pid)
        try:
            resources = sandbox.resources(number)
            if sandbox.nested:
                from ..sandbox.namespaces import Nested, enter_namespaces  # loaded where it is used

                def begin(control: socket.socket, ours: socket.socket) -> Any:
                    enter = functools.partial(sandbox.enter, resources, 1)
                    setup = worker.ChildSetup(
                        1,
                        fds,
                        self._inherited,
                        self._code_fd,
                        enter,
                        functools.partial(
                            enter_namespaces, control, ours, network=sandbox.network, egress=sandbox.egress
                        ),
                    )
                    return self._process(name, setup)

                nested = Nested(begin)
                if nested.listener >= 0:
                    self._let_out(number, nested)
                return nested, nested.worker_pid, nested.pidfd
            parent = os.getpid()
            enter = functools.partial(sandbox.enter, resources, parent)
            process = self._process(name, worker.ChildSetup(parent, fds, self._inherited, self._code_fd, enter))
            _start(process)
            return process, process.pid, os.pidfd_open(process.pid)
        except BaseException:
            self._clear(number)
            raise

    def _let_out(self, number: int, nested: Nested) -> None:
        """Have the proxy accept at the worker's socket."""
        assert self._egress is not None
        try:
            self._egress.add(number, nested.worker_pid, nested.listener)
        except BaseException:
            nested.abandon()
            raise
        finally:
            os.close(nested.listener)

    def _clear(self, number: int) -> None:
        """Remove what was a worker's own; what can't be removed costs no other worker its life."""
        assert self._sandbox is not None
        for step in (self._sandbox.clear, *(() if self._egress is None else (self._egress.remove,))):
            try:
                step(number)
            except OSError:
                traceback.print_exc()

    def _process(self, name: str, setup: worker.ChildSetup) -> Any:
        return _fork_context.Process(target=worker.run, args=(self._config, self._handler, setup), name=name)

    def _reap(self) -> bool:
        """Report workers that have ended or were stopped, kill and reap what they left behind; whether to go on.

        What is done for each of them does not grow with how many there are.
        """
        ended = False
        egress = -1 if self._egress is None else self._egress.pid
        while (change := self._next_change()) is not None:
            pid = change.si_pid
            number, process = self._workers.get(pid, (0, None))
            if change.si_code not in _ENDS:
                if _is_stopped(pid) and process is not None:
                    self._send(Stopped(number))
            elif pid == egress:
                print("the egress proxy has ended, and all that it served with it", file=sys.stderr, flush=True)
                return False
            elif process is None:
                os.waitpid(pid, os.WNOHANG)  # it was a worker's child, or is one that we have killed
                ended = True
            else:
                del self._workers[pid]
                if self._sandbox is not None:
                    self._clear(number)
                self._send(Died(number, process.exitcode))
                ended = True
        if ended:
            for pid in linux.children():
                if pid not in self._workers and pid not in self._kept and pid != egress:
                    self._kill(pid)
        return True

    def _next_change(self) -> os.waitid_result | None:
        """A child that has ended or was stopped, and that nobody has waited for; None for none."""
        if not self._kept:
            try:
                return os.waitid(os.P_ALL, 0, _CHANGES)
            except ChildProcessError:
                return None
        ours = [*self._workers] if self._egress is None else [*self._workers, self._egress.pid]
        for pid in ours:  # a preload's own children are not ours to wait for, and may stand before ours
            if (change := os.waitid(os.P_PID, pid, _CHANGES)) is not None:
                return change
        return None

    @staticmethod
    def _kill(pid: int) -> None:
        # A child's pid is not used again before we have reaped it, so the number is safe here.
        os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass

    def _send(self, message: News, *fds: int) -> None:
        data = _encode(message)
        try:
            if fds:
                socket.send_fds(self._control, [data], fds)
            else:
                self._control.send(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the host is gone; the loop ends at its next look

    def _end(self) -> None:
        """Kill and reap every child, and what becomes a child by that, then exit."""
        while pids := linux.children():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        os._exit(0)
