"""Starts and ends of workers: one thread per pool that keeps the wanted number of workers alive.

It stands beside the lane, never on it. Its loop waits for the zygote's news (births, exits), for the response pipes of
workers that start (READY) or that their callers have left (the end of the job, within the grace time), for the log
pipes, and for orders from other threads.

It is longer than other modules: a birth, an exit and the zygote's own end meet in one state. What could be told apart
has modules of its own: scaling, spawning, zygote_watch, watchdog, abandoned.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Final

from ..control.source_snapshot import make_snapshot
from ..control.zygote_messages import (
    Born,
    Died,
    MissingLayers,
    Noted,
    Stopped,
    ZygoteConfig,
    describe_exit,
)
from ..errors import StartError, WorkersUnavailable
from ..events import Events, WorkerEnded, WorkerInfo, WorkerReady, WorkerStarted
from ..model.durations import longest_wait
from ..wire.frames import FAULT
from ..wire.printable import one_line, quoted
from .abandoned_jobs import AbandonedJobs, Remainder
from .backoff import RestartBackoff
from .leases import Leases
from .line_watch import LineWatch
from .logs import LogPipe
from .reactor import Reactor
from .record import Lane, Worker
from .retirement import Retirement
from .scaling import Scaler, Size
from .spawning import order_worker, read_first_frame, read_report
from .start_failure_log import StartFailureLog
from .watchdog import Watchdog
from .zygote_client import ZygoteClient
from .zygote_watch import ZygoteWatch

logger = logging.getLogger("blastdoor")

_SETTLED: Final = 2.0
"""Seconds that a worker has to live after READY to count as a start that has succeeded."""

_STATUS_LIMIT: Final = 1.0
"""Seconds that the zygote has to tell how a worker has ended."""

_MOST_ORDERS: Final = 64
"""How many orders the zygote may have before it: they hold descriptors, and fill its socket."""

_EXIT_LIMIT: Final = 1.0
"""Seconds that the zygote has to exit by itself when a pool closes."""


class Supervisor:
    """Starts workers, hands the ready ones to `leases`, notes their ends, and starts new ones."""

    def __init__(
        self,
        leases: Leases,
        events: Events,
        config: ZygoteConfig,
        size: Size,
        env: Mapping[str, str] | None,
        start_timeout: float,
        stop_timeout: float,
        drain: float,
    ) -> None:
        self.limits = config.limits
        self.leases = leases
        self.events = events
        self._config = config
        self._label = f"{config.label}: " if config.label else ""
        self._start_failures = StartFailureLog(self._label)
        self._orders_are_held = False
        self._env = env
        self._start_timeout = start_timeout
        self._backoff = RestartBackoff()
        self._workers: dict[int, Worker] = {}
        self._numbers = itertools.count(1)
        # Those that are on their way, so that no step of a start looks at all that there are.
        self._starting: set[Worker] = set()
        self._unborn: set[Worker] = set()
        self._ready_unborn: set[Worker] = set()
        self._zygote: ZygoteClient | None = None
        self._started = threading.Event()
        self._start_error = ""
        self._zygote_error = ""
        self._closing = False
        self._stopping = False
        self._respawn_is_due = False
        self.in_forked_child = False
        self.kind = ""
        self._reactor = Reactor()
        self._retirement = Retirement(self._reactor, leases, self._respawn, stop_timeout, drain)
        self._scaler = Scaler(size, leases, self._reactor, self._respawn, self._retirement.retire)
        self._zygote_watch = ZygoteWatch(self._reactor, self._births_owed, self._zygote_is_silent)
        background = None if config.sandbox is None else config.sandbox.background_seconds
        lines = LineWatch(self._reactor, leases)
        self._abandoned = AbandonedJobs(
            self._reactor, leases, config.grace, config.limits.wall_seconds, background, lines.await_room
        )
        self.watchdog = Watchdog(self._reactor, leases, self._abandoned, config.limits, self._workers.values)
        self.look_for_lost, self.look_after_jobs = self.watchdog.look_for_lost, self.watchdog.look_after_jobs
        self._thread = threading.Thread(target=self._run, name="blastdoor-supervisor", daemon=True)
        self._code_fd = make_snapshot() if config.by_name else -1  # last: nothing after it fails

    # -- called from other threads -------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to start the workers. Where one does not start, `leases` refuses callers with a StartError.

        RuntimeError where the system gives no thread.
        """
        self._reactor.call(self._start_zygote)
        if self._config.sandbox is not None:
            self._reactor.call(self.watchdog.look_at_idle)
        try:
            self._thread.start()
        except RuntimeError:
            self._reactor.abandon()
            self._close_snapshot()
            raise

    def wait_started(self) -> None:
        """Wait until all workers are ready. StartError if one is not; `stop` is then all there is to do."""
        while not self._started.wait(longest_wait()):
            pass  # signals are handled now and then
        if self._start_error:
            raise StartError(self._start_error)

    def adopt(self, lane: Lane, rest: Remainder) -> None:
        """Take over a lane whose caller has left it: in the middle of its job, or to its background work.

        It goes back to work if that ends in time, else it is discarded.
        """
        if not self._reactor.call(lambda: self._take_left(lane, rest)):
            self.leases.discard(lane)

    def stop(self, grace: float) -> None:
        """End all workers, the held ones too, and then the zygote and this thread. `leases` is closed by now.

        Workers have `grace` seconds to exit before they are killed.
        """
        self._reactor.call(lambda: self._begin_stop(grace))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, and leave the processes alone."""
        self.in_forked_child = True
        self.leases.after_fork_in_child()
        self.events.after_fork_in_child()
        for worker in self._workers.values():
            worker.after_fork_in_child()
        if self._zygote is not None:
            self._zygote.after_fork_in_child()
        self._reactor.after_fork_in_child()
        self._close_snapshot()

    @property
    def starting(self) -> int:
        """How many workers have been ordered and are not ready."""
        return len(self._starting)

    def describe_workers(self) -> list[WorkerInfo]:
        """The workers of this moment."""
        from .worker_status import describe_workers  # ctypes is loaded where it is used

        return describe_workers(list(self._workers.values()), self.leases)

    def _run(self) -> None:
        # A signal to the process must not come here: it would interrupt no wait of the main thread (signal(7)).
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._reactor.run()
        self._close_snapshot()
        self._started.set()

    def _close_snapshot(self) -> None:
        if self._code_fd >= 0:
            os.close(self._code_fd)
            self._code_fd = -1

    # -- the zygote ----------------------------------------------------------------------------------

    def _start_zygote(self) -> None:
        try:
            zygote = ZygoteClient(self._config, self._env, self._code_fd)
        except Exception as error:  # noqa: BLE001 - whatever it was, those who wait for workers are told
            self._start_failed(f"the zygote process can't be started: {type(error).__name__}: {error}")
            self._respawn_after(1.0)
            return
        self._zygote = zygote
        self._orders_are_held = False
        self._zygote_watch.begin()
        self._watch_log(zygote.log)
        self._reactor.watch(zygote.control_fd, self._hear_zygote)
        self._reactor.watch(zygote.pidfd, self._zygote_ended)
        self._spawn_missing()

    def _hear_zygote(self) -> bool:
        """Take the next news, if there is any."""
        assert self._zygote is not None
        heard = self._zygote.hear()
        if heard is None:
            if self._zygote.silent:
                self._reactor.unwatch(self._zygote.control_fd)  # it is ending; its pidfd tells the rest
            return False
        self._zygote_watch.heard()
        news, pidfd = heard
        if isinstance(news, (Born, Died)):
            self._spawn_held()
        if isinstance(news, Born):
            if pidfd < 0:
                # Out of descriptors as it came: a worker that can't be killed may not be. Begin anew.
                logger.error(
                    "the pidfd of worker %d was lost for want of descriptors: the zygote starts anew", news.pid
                )
                self._zygote.kill()
            else:
                self._born(self._workers[news.worker], news.pid, pidfd)
        elif isinstance(news, Died):
            self._zygote_watch.unreported.discard(news.worker)
            if (worker := self._workers.get(news.worker)) is not None:  # else it was too late to tell
                self._on_worker_exit(worker, news.status)
        elif isinstance(news, Stopped):
            if (worker := self._workers.get(news.worker)) is not None:
                self.watchdog.look_at_stopped(worker)
        elif isinstance(news, MissingLayers):
            for layer in news.layers:
                logger.warning("the sandbox goes without a layer on this machine: %s", layer)
        elif isinstance(news, Noted):
            for line in news.lines:
                logger.warning("%s", one_line(line))
        else:
            self._zygote_error = quoted(news.why).lstrip()
        return True

    def _zygote_ended(self) -> None:
        """The zygote is gone, and by their death signal all workers with it."""
        zygote = self._zygote
        assert zygote is not None
        while self._hear_zygote():
            pass
        for fd in (zygote.control_fd, zygote.pidfd):
            self._reactor.unwatch(fd)
        for fd in zygote.log.fds:
            self._reactor.unwatch(fd)
        status = zygote.close()
        self._zygote = None
        self._zygote_watch.unreported.clear()
        workers = list(self._workers.values())
        inodes = {os.fstat(fd).st_ino for worker in workers for fd in worker.pipe_ends()}
        for worker in workers:
            self.leases.kill(worker)
            self._on_worker_exit(worker, -signal.SIGKILL)
        if inodes:
            self._sweep(inodes)
        if self._stopping:
            self._reactor.finish()
            return
        why = f"the zygote process {describe_exit(status)[0]}"
        if self._zygote_error:
            why = self._zygote_error
            self._zygote_error = ""
        elif output := zygote.log.tail(""):
            why = f"{why}:\n{quoted(output)}"
        self._start_failed(why)
        self._respawn()

    def _note_exit(self, worker: Worker) -> None:
        """A worker has ended. The zygote, which is its parent, tells its status in a moment, or is stuck."""
        if worker.pidfd is not None:
            self._reactor.unwatch(worker.pidfd)
        self._reactor.after(_STATUS_LIMIT, lambda: self._on_exit_untold(worker))
        self._zygote_watch.expect_news()
        self._zygote_watch.unreported.add(worker.number)

    def _on_exit_untold(self, worker: Worker) -> None:
        if not worker.dead:
            self._on_worker_exit(worker, None)

    def _births_owed(self) -> bool:
        return bool(self._unborn)

    def _zygote_is_silent(self, seconds: float) -> None:
        """It was stopped, or hangs: begin anew."""
        if self._zygote is None or self._stopping:
            return
        logger.error(
            "the zygote process %d has said nothing for %.0f s, though it should: it is stopped, or hangs. "
            "It is killed, with all its workers, and starts anew",
            self._zygote.pid,
            seconds,
        )
        self._zygote.kill()

    # -- the number of workers -----------------------------------------------------------------------

    # -- what is left behind ----------------------------------------------------------------------

    def _sweep(self, inodes: set[int]) -> None:
        """What the workers of a dead zygote have started is nobody's child now: find it by the pipes that it holds."""
        from ..platform import linux  # ctypes is loaded where it is used

        if linux.kill_holders(inodes):
            self._reactor.after(0.05, lambda: self._sweep(inodes))

    def _watch_log(self, log: LogPipe) -> None:
        for fd in log.fds:
            self._reactor.watch(fd, lambda: self._read_log(log))

    def _read_log(self, log: LogPipe) -> None:
        for ended in log.read():
            self._reactor.unwatch(ended)

    # -- births --------------------------------------------------------------------------------------

    def _respawn_after(self, seconds: float) -> None:
        """Start what is missing in so many seconds; one such call is pending at a time."""
        if not self._respawn_is_due:
            self._respawn_is_due = True
            self._reactor.after(seconds, self._respawn_due)

    def _respawn_due(self) -> None:
        self._respawn_is_due = False
        self._respawn()

    def _respawn(self) -> None:
        """Start what is missing, now or when the backoff allows it."""
        if self._closing:
            return
        delay = self._backoff.delay(time.monotonic())
        if delay:
            self._respawn_after(delay)
        elif self._zygote is None:
            self._start_zygote()
        else:
            self._spawn_missing()

    def _spawn_held(self) -> None:
        """The zygote has dealt with an order: there is room for more."""
        if self._orders_are_held:
            self._orders_are_held = False
            self._respawn()

    def _spawn_missing(self) -> None:
        missing = self._scaler.wanted - len(self._workers) + len(self._retirement)
        if self._backoff.engaged:
            missing = 0 if self._starting else min(missing, 1)  # one try at a time
        room = _MOST_ORDERS - len(self._unborn)
        self._orders_are_held = missing > room
        for _ in range(min(missing, room)):
            if not self._spawn():
                break

    def _spawn(self) -> bool:
        assert self._zygote is not None
        number = next(self._numbers)
        try:
            worker = order_worker(self._zygote, number, self._label, self._config.concurrency)
        except BlockingIOError:  # its socket is full of orders
            self._orders_are_held = True  # it answers each that is there: see `_spawn_held`
            return False
        except OSError as error:  # out of descriptors; or the zygote is gone
            self._spawn_failed(error)
            return False
        self._zygote_watch.expect_news()
        self._workers[number] = worker
        self._starting.add(worker)
        self._unborn.add(worker)
        self._watch_log(worker.log)
        self._reactor.watch(worker.channel.response_fd, lambda: self._hear_starting(worker))
        self._reactor.after(self._start_timeout, lambda: self._check_started(number))
        return True

    def _spawn_failed(self, error: OSError) -> None:
        if self._started.is_set():
            logger.error("a worker can't be started, and is tried again: %s", error)
            self._respawn_after(0.5)
        else:
            self._start_failed(f"a worker can't be started: {error}")

    def _born(self, worker: Worker, pid: int, pidfd: int) -> None:
        worker.log.label = f"{self._label}worker {pid}"
        worker.log.pid = pid
        self.events.emit(WorkerStarted(pid))
        self.leases.adopt_pidfd(worker, pid, pidfd)
        self._unborn.discard(worker)
        self._reactor.watch(pidfd, lambda: self._note_exit(worker))
        if self._stopping:
            self.leases.kill(worker)
        if worker in self._ready_unborn:
            self._ready_unborn.discard(worker)
            self._ready(worker)

    def _hear_starting(self, worker: Worker) -> None:
        """The first frame of a worker: READY, or the report of what stopped it."""
        channel = worker.channel
        frames = channel.receive()
        if frames == []:
            return
        self._reactor.unwatch(channel.response_fd)
        ready = read_first_frame(worker, frames)
        if ready is not None:
            self.kind, worker.threads = ready.kind, ready.threads
            self._ready(worker)
        elif not frames or frames[0][0] != FAULT:
            self.leases.kill(worker)

    def _ready(self, worker: Worker) -> None:
        if worker.pid is None:
            self._ready_unborn.add(worker)  # it was quicker than the news of its birth
            return
        self._reactor.after(_SETTLED, lambda: self._check_settled(worker))
        self._starting.discard(worker)
        self.leases.add(worker)
        self.events.emit(WorkerReady(worker.pid, time.monotonic() - worker.ordered_at))
        self._spawn_missing()
        if not self._started.is_set() and self._all_ready:
            self._started.set()

    @property
    def _all_ready(self) -> bool:
        """Whether as many workers as are wanted are there, and all ready."""
        return len(self._workers) >= self._scaler.wanted and not self._starting

    def _check_settled(self, worker: Worker) -> None:
        if not worker.dead:
            self._backoff.succeeded()

    def _check_started(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is not None and not worker.ready:
            worker.failure = worker.failure or (
                f"it was not ready {self._start_timeout} s after its start: look at what its import, "
                f"or its lifespan's start-up, waits for, "
                f"or allow more time (start_timeout)"
            )
            if worker.pid is None and self._zygote is not None:
                # It was not even forked: the zygote hangs, in a preload's import perhaps.
                self._zygote_error = f"a worker {worker.failure.removeprefix('it ')}"
                self._zygote.kill()
            self.leases.kill(worker)

    def _start_failed(self, why: str) -> None:
        if not self._started.is_set():
            self._start_error = why
            self._closing = True
            self._scaler.end()
            self._retirement.end()
            self.leases.refuse(lambda: StartError(why))
            self._started.set()
            return
        if self._closing:
            return
        now = time.monotonic()
        self._backoff.failed(now)
        pause = self._backoff.delay(now)
        self._start_failures.add(why, pause)
        if self._backoff.engaged and not any(worker.ready for worker in self._workers.values()):
            first_line = why.splitlines()[0]
            self.leases.refuse(
                lambda: WorkersUnavailable(
                    f"no worker can be started at the moment; the log has all of it: {first_line}",
                    max(self._backoff.delay(time.monotonic()), 1.0),
                )
            )

    # -- ends ----------------------------------------------------------------------------------------

    def _on_worker_exit(self, worker: Worker, status: int | None) -> None:
        """A worker has ended: log its last words, tell its holder, and see to its successor."""
        del self._workers[worker.number]
        for kind in (self._starting, self._unborn, self._ready_unborn):
            kind.discard(worker)
        if not worker.ready and not worker.failure:
            read_report(worker)  # the news of its end may have overtaken it
        for fd in (*worker.pipe_ends(), worker.line.fd, worker.pidfd or -1):
            self._reactor.unwatch(fd)
        # Of a death in a job, or before the first one, somebody tells, with the last output.
        lanes = self.leases.lanes_of(worker)
        worker.log.close(told=not worker.was_leased or any(lane not in self._abandoned for lane in lanes))
        self.leases.mark_exited(worker, status)
        if not self._stopping:
            self.events.deaths += worker not in self._retirement or worker.casualties > 0
        self.events.emit(WorkerEnded(worker.pid, *describe_exit(status)[1:], worker.jobs))
        self._retirement.forget(worker)
        self._abandoned.worker_ended(worker)
        if self._stopping:
            self._stop_zygote_if_alone()
        elif self._closing:
            pass
        elif self._zygote is not None:
            if worker.was_leased:  # it was leased; its caller may not even have woken up
                self._backoff.succeeded()  # it did start, whatever its job did to it
            else:
                tail = worker.log.tail("")
                why = worker.failure or (quoted(tail) if tail else "it printed nothing")
                if worker.failure_says_all:
                    self._start_failed(why.lstrip())
                else:
                    self._start_failed(f"a worker {describe_exit(status)[0]} before its first job:\n{why}")
            self._respawn()

    def _take_left(self, lane: Lane, rest: Remainder) -> None:
        if self._closing:
            self.leases.discard(lane)
            return
        try:
            self._abandoned.take(lane, rest)
        except BaseException:
            self._abandoned.drop(lane)
            raise

    # -- the end of it all ---------------------------------------------------------------------------

    def _begin_stop(self, grace: float) -> None:
        self._closing = self._stopping = True
        self._scaler.end()
        self._retirement.end()
        self.watchdog.end()
        for worker in self._workers.values():
            if worker.ready and not worker.running:
                self._reactor.unwatch(worker.line.fd)
                worker.end_requests()
            else:
                self.leases.kill(worker)
        self._reactor.after(grace, self._kill_all)
        # A zygote that is stuck reports no deaths; when it is killed, its workers end with it.
        self._reactor.after(grace + _EXIT_LIMIT, self._kill_zygote)
        self._stop_zygote_if_alone()

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            self.leases.kill(worker)

    def _stop_zygote_if_alone(self) -> None:
        if self._workers:
            return
        if self._zygote is None:
            self._reactor.finish()
        else:
            self._zygote.end()
            self._reactor.after(_EXIT_LIMIT, self._kill_zygote)

    def _kill_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.kill()
