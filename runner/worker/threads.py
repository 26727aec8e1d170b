"""The worker's life where handlers are functions and several jobs run at once: a thread for each lane.

The main thread listens to the line: it opens lanes, and has jobs whose callers have left hear of it, by an exception
in their threads at the next bytecode (PyThreadState_SetAsyncExc). A thread serves one lane as long as there is one, and
is a daemon: what hangs in it holds up no end. Each job has a context (contextvars) and thread locals of its own.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import traceback
from collections import deque
from contextvars import Context
from types import TracebackType

from ..control.lane_threads import lane_thread_name
from ..control.line_messages import LANE_DESCRIPTORS, OPEN, take
from ..control.output_tags import tag_of
from ..control.signals import SIGNAL
from ..errors import JobCancelled
from ..model.limits import THREAD_STACK
from ..platform import linux
from . import reaper
from .forks import SOFTWARE, disown_forks, end_broken, own_again
from .handlers.adapter import Adapter
from .job_loop import run_job
from .pipes import HostGone, IncomingRequest, OutgoingResponse, Pipes, close_all
from .stdio import OutputFlag, current_tag

_reaping = threading.Lock()

_set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_exception.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
_thread_dict = ctypes.pythonapi.PyThreadState_GetDict
_thread_dict.restype = ctypes.c_void_p


class _Heard(JobCancelled):
    """JobCancelled as it comes into a thread: its making is the sign that it has come."""

    def __init__(self) -> None:
        super().__init__()
        lane = _lanes.get(threading.get_ident())
        if lane is not None:
            lane.on_its_way = False


_Heard.__name__, _Heard.__qualname__, _Heard.__module__ = "JobCancelled", "JobCancelled", JobCancelled.__module__

_lanes: dict[int, ThreadCancellation] = {}


class ThreadCancellation:
    """The ear of one lane, whose jobs run in a thread. A context manager around what must not be interrupted.

    The lock is held by the lane's thread in such places, and by the main thread while it has an exception come into
    that thread. So the exception never comes in there; and one that the interpreter has not delivered until then is
    taken back, and raised at once. `on_its_way` says that there is such a one.
    """

    __slots__ = ("_depth", "_early", "_job", "_lock", "_numbers", "_thread", "cancelled", "on_its_way")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._thread = 0
        self._job = 0
        self._early = 0
        self._numbers: deque[int] = deque()
        self.cancelled = self.on_its_way = False

    def install(self) -> None:
        """This is the lane's thread."""
        self._thread = threading.get_ident()
        _lanes[self._thread] = self

    def after_fork_in_child(self) -> None:
        """In a process that the handler has forked: the main thread is not here to give the lock back."""
        self._lock = threading.RLock()

    def begin(self, job: int) -> None:
        """This job's handler runs from now on. Raises JobCancelled where its caller has left already."""
        with self._lock:
            self.cancelled = self.on_its_way = False
            self._job = job
        if self._numbers or self._early:
            self._look(heard=True)
            self._early = 0

    def end(self) -> None:
        """The handler has ended: nothing is to be interrupted any more."""
        self._enter(end=True)
        self._lock.release()

    def __enter__(self) -> None:
        if threading.get_ident() == self._thread:  # the exception comes nowhere else
            self._enter()
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if threading.get_ident() != self._thread:
            return
        self._depth -= 1
        depth = self._depth
        self._lock.release()
        if self._numbers and not depth:
            self._look(heard=kind is None)

    def cancel(self, job: int) -> None:
        """The caller of this job has left. Called by the main thread; never waits."""
        self._numbers.append(job)
        if self._lock.acquire(blocking=False):  # else the lane's own thread finds it, when it leaves its shield
            try:
                if self._take():
                    self.on_its_way = True
                    _set_exception(self._thread, id(_Heard))
            finally:
                self._lock.release()

    def _enter(self, *, end: bool = False) -> None:
        """Take the lock, for the lane's thread. What is on its way comes now, and no more."""
        try:
            self._lock.acquire()
        except JobCancelled:  # it came as the lock was taken
            if end:
                self._job = 0
            self._lock.release()
            raise
        if end:
            self._job = 0
        if self.on_its_way:  # the interpreter has one flag for all threads, and may be late with it
            self.on_its_way = False
            _set_exception(self._thread, None)
            if not end:
                self._lock.release()
                raise JobCancelled

    def _look(self, *, heard: bool) -> None:
        """Look for a cancel that came while the lane had its shield up, in the lane's thread."""
        found = False
        while self._numbers or self._early:
            self._enter()
            found = self._take() or found
            self._lock.release()
            if not self._numbers:  # else one has come meanwhile, and the main thread could not take it
                break
        if found and heard:
            raise JobCancelled

    def _take(self) -> bool:
        """Take the cancels that have come; whether one is of the job under way, and the first of it. Under the lock."""
        while self._numbers:
            self._early = self._numbers.popleft()
        if not self._job or self._early != self._job:
            return False
        self._early = 0
        first = not self.cancelled
        self.cancelled = True
        return first


class _Lane:
    """One lane, and its thread."""

    def __init__(self, number: int, request_fd: int, response_fd: int, handler: Adapter, prints: OutputFlag) -> None:
        self.number = number
        self.cancellation = ThreadCancellation()
        self._fds = request_fd, response_fd
        self._pipes = Pipes(request_fd, response_fd, self.cancellation, prints)
        self._handler = handler
        disown_forks(self._fds, self._sever)
        self.thread = threading.Thread(target=self._run, name=f"blastdoor-lane-{number}", daemon=True)

    def forget(self) -> None:
        """It was not begun."""
        own_again(self._fds, self._sever)

    def _run(self) -> None:
        linux.name_thread(lane_thread_name(self.number))
        self.cancellation.install()
        try:
            while True:
                request = self._pipes.next_request()
                Context().run(self._run_job, request)
                request.skip()
                _drop_thread_locals()
                self._reap()
        except HostGone:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it was
            end_broken(error)

    def _sever(self) -> None:
        self.cancellation.after_fork_in_child()
        self._pipes.sever()

    def _reap(self) -> None:
        """Reap what the handler's programs have left behind, while there is no request; one thread at a time does."""
        while reaper.possible and _reaping.acquire(blocking=False):
            try:
                reaper.reap()
            finally:
                _reaping.release()
            if self._pipes.wait(reaper.LOOK_SECONDS):
                return

    def _run_job(self, request: IncomingRequest) -> None:
        current_tag.set(tag_of(self.number, request.number))
        run_job(self._handler, request, OutgoingResponse(self._pipes, request.number), self.cancellation)


class ThreadedWorker:
    """One worker and its lanes. `serve` is for the main thread."""

    def __init__(
        self, handler: Adapter, fds: tuple[int, int, int], prints: OutputFlag, memory_bytes: int | None
    ) -> None:
        self._handler = handler
        self._request_fd, self._response_fd, self._line_fd = fds
        self._prints = prints
        self._stack = 0 if memory_bytes is None else THREAD_STACK
        self._lanes: dict[int, _Lane] = {}

    def serve(self) -> None:
        """Run jobs on all lanes, until the host opens no more and each has ended."""
        signal.signal(SIGNAL, signal.SIG_IGN)  # the line says it all
        if not self._open(0, self._request_fd, self._response_fd):
            os._exit(SOFTWARE)
        line = socket.socket(fileno=self._line_fd)
        poll = select.poll()
        poll.register(line, select.POLLIN)
        while True:
            try:
                poll.poll()
            except (Exception, KeyboardInterrupt):  # noqa: BLE001 - an app's signal handler: it ends no job
                traceback.print_exc()
                continue
            try:
                if not self._hear(line):
                    break
            except BaseException as error:  # noqa: BLE001 - a message may be lost, whose lane has callers
                end_broken(error)
        for lane in self._lanes.values():
            lane.thread.join()

    def _hear(self, line: socket.socket) -> bool:
        """Take the next message; False at the end."""
        message = take(line)
        if message is None:
            return False
        kind, number, job, fds = message
        if kind != OPEN:
            if number in self._lanes:
                self._lanes[number].cancellation.cancel(job)
        elif len(fds) != LANE_DESCRIPTORS or not self._open(number, *fds):
            close_all(fds)  # there is no room for more: the host goes elsewhere
        return True

    def _open(self, number: int, request_fd: int, response_fd: int) -> bool:
        """Begin to serve a lane; whether the system has a thread for it."""
        lane = _Lane(number, request_fd, response_fd, self._handler, self._prints)
        before = threading.stack_size(self._stack)
        try:
            lane.thread.start()
        except RuntimeError:
            lane.forget()
            return False
        finally:
            threading.stack_size(before)
        self._lanes[number] = lane
        return True


def _drop_thread_locals() -> None:
    """Have the next job of this thread begin without what this one has left in `threading.local` objects."""
    address = _thread_dict()
    if address:
        state: dict[object, object] = ctypes.cast(address, ctypes.py_object).value
        for key in [key for key in state if isinstance(key, str) and key.startswith("thread.local.")]:
            state.pop(key, None)
