"""Births and deaths: one thread per pool that keeps the wanted number of workers alive.

It stands beside the lane, never on it. It waits in one selector for: the zygote's control socket (births,
exits), the response pipes of workers that start (READY) or that were left by their callers (the end of
the job, within the grace time), the log pipes, and orders from other threads. Each watched descriptor has
a method of its own; timers are a heap of callbacks.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from runner.brake import RestartBrake
from runner.channel import Channel, make_pipe
from runner.errors import StartError, WorkersUnavailable
from runner.exchange import ResponseExchange
from runner.frames import FAULT, READY
from runner.leases import Leases, Worker
from runner.logs import LogPipe
from runner.messages import Born, Died, Failed, FaultReport, Ready, Spawn, ZygoteConfig, describe_exit
from runner.zygote_start import MAX_MESSAGE, preamble, program

logger = logging.getLogger("blastdoor")

_encode = msgspec.msgpack.Encoder().encode
_decode_news = msgspec.msgpack.Decoder(Born | Died | Failed).decode
_decode_ready = msgspec.msgpack.Decoder(Ready).decode
_decode_report = msgspec.msgpack.Decoder(FaultReport).decode

EXIT_LIMIT: Final = 1.0
"""Seconds that idle workers, and then the zygote, have to exit by themselves when a pool closes."""


class Supervisor:
    """Starts workers, hands the ready ones to `leases`, notes their ends, and starts new ones."""

    def __init__(
        self,
        leases: Leases,
        config: ZygoteConfig,
        workers: int,
        env: Mapping[str, str] | None,
        grace: float,
        start_timeout: float,
    ) -> None:
        self.leases = leases
        self._config = config
        self._wanted = workers
        self._env = env
        self._grace = grace
        self._start_timeout = start_timeout
        self._brake = RestartBrake()
        self._workers: dict[int, Worker] = {}
        self._numbers = itertools.count(1)
        self._selector = selectors.DefaultSelector()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._take_orders)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_log: LogPipe | None = None
        self._zygote_fd = -1
        self._control: socket.socket | None = None
        self._started = threading.Event()
        self._start_error = ""
        self._preload_error = ""
        self._closing = False
        self._finished = False
        self._adopted: dict[Worker, Callable[[], None]] = {}
        # Reentrant, since `adopt` may be called by a finaliser that runs in the middle of anything.
        self._inbox_lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="blastdoor-supervisor", daemon=True)

    # -- called from other threads -------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers and return once all are ready. StartError, with nothing left behind, if one is not."""
        self._order(self._start_zygote)
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:
            self.stop(0)
            raise
        if self._start_error:
            self.stop(0)
            raise StartError(self._start_error)

    def adopt(self, worker: Worker, exchange: ResponseExchange) -> None:
        """Take over a worker whose caller has left it in the middle of its job.

        It goes back to work if its response ends within the grace time, else it is discarded.
        """
        if not self._order(lambda: self._await_end(worker, exchange)):
            self.leases.discard(worker)

    def stop(self, grace: float) -> None:
        """End all workers, the held ones too, and then the zygote and this thread. `leases` is closed by now.

        Workers have `grace` seconds to exit before they are killed.
        """
        self._order(lambda: self._begin_stop(grace))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def live_workers(self) -> list[Worker]:
        """The workers that have been started and have not been seen to end."""
        return list(self._workers.values())

    def forget(self) -> None:
        """In a forked child: close the inherited descriptors, and leave the processes alone."""
        self._finished = True
        for worker in self._workers.values():
            worker.channel.close()
            if worker.pidfd is not None:
                os.close(worker.pidfd)
                worker.pidfd = None
            os.close(worker.log.fd)
            worker.log.fd = -1
        if self._zygote is not None:
            self._zygote.returncode = 0  # not ours to wait for
            os.close(self._zygote_fd)
        if self._zygote_log is not None and self._zygote_log.fd >= 0:
            os.close(self._zygote_log.fd)
            self._zygote_log.fd = -1
        if self._control is not None:
            self._control.close()
        self._selector.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def _order(self, order: Callable[[], None]) -> bool:
        """Have this thread call `order`; False where it has ended."""
        with self._inbox_lock:
            if self._wake_fd < 0:
                return False
            self._inbox.append(order)
            os.eventfd_write(self._wake_fd, 1)
            return True

    # -- the loop ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._finished:
            try:
                self._step()
            except Exception:
                logger.exception("the supervisor met an error; it goes on")
        with self._inbox_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        while self._inbox:
            self._inbox.popleft()()
        self._selector.close()
        self._started.set()

    def _step(self) -> None:
        timeout = max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None
        for key, _ in self._selector.select(timeout):
            # An earlier callback of this round may have ended the watch on this one.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _take_orders(self) -> None:
        os.eventfd_read(self._wake_fd)
        while self._inbox:
            self._inbox.popleft()()

    def _after(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), callback))

    def _watch(self, fd: int, callback: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        self._selector.register(fd, events, callback)

    def _unwatch(self, fd: int) -> None:
        if fd >= 0 and fd in self._selector.get_map():
            self._selector.unregister(fd)

    # -- the zygote ----------------------------------------------------------------------------------

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log_read, log_write = make_pipe()
        try:
            zygote = subprocess.Popen(
                program(theirs.fileno()),
                stdin=subprocess.PIPE,
                stdout=log_write,
                stderr=log_write,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=None if self._env is None else dict(self._env),
            )
        except OSError as error:
            ours.close()
            os.close(log_read)
            self._no_start(f"the zygote process can't be started: {error}")
            return
        finally:
            theirs.close()
            os.close(log_write)
        self._zygote = zygote
        self._control = ours
        self._zygote_log = LogPipe(log_read, f"zygote {zygote.pid}")
        self._zygote_fd = os.pidfd_open(zygote.pid)
        self._watch(self._zygote_log.fd, self._read_zygote_log)
        self._watch(self._zygote_fd, self._zygote_ended)
        self._watch(ours.fileno(), self._hear_zygote)
        ours.setblocking(False)
        assert zygote.stdin is not None
        try:
            with zygote.stdin as stdin:
                stdin.write(preamble(sys.path, self._config))
        except BrokenPipeError:
            pass  # it has ended already, which is seen at once
        self._spawn_missing()

    def _read_zygote_log(self) -> None:
        log = self._zygote_log
        assert log is not None
        if not log.read():
            self._unwatch(log.fd)

    def _hear_zygote(self) -> None:
        assert self._control is not None
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 1)
        except (BlockingIOError, ConnectionResetError):
            data = b""
        if not data:
            self._unwatch(self._control.fileno())
            return
        news = _decode_news(data)
        if isinstance(news, Born):
            self._born(news, fds[0])
        elif isinstance(news, Died):
            self._bury(self._workers[news.worker], news.status)
        else:
            self._preload_error = news.traceback

    def _zygote_ended(self) -> None:
        """The zygote is gone, and by its death signal all workers with it."""
        zygote, log, control = self._zygote, self._zygote_log, self._control
        assert zygote is not None
        assert log is not None
        assert control is not None
        while control.fileno() in self._selector.get_map():
            self._hear_zygote()
        status = zygote.wait()
        self._unwatch(self._zygote_fd)
        self._unwatch(log.fd)
        os.close(self._zygote_fd)
        log.close()
        control.close()
        self._zygote = self._zygote_log = self._control = None
        for worker in list(self._workers.values()):
            self.leases.kill(worker)
            self._bury(worker, -signal.SIGKILL)
        if self._closing:
            self._finished = True
            return
        why = f"the zygote process {describe_exit(status)[0]}"
        if self._preload_error:
            why = f"the handler can't be preloaded:\n{self._preload_error}"
        elif output := log.tail(""):
            why = f"{why}:\n{output}"
        self._start_failed(why)
        self._respawn()

    # -- births --------------------------------------------------------------------------------------

    def _respawn(self) -> None:
        """Start what is missing, now or when the brake allows it."""
        delay = self._brake.delay(time.monotonic())
        if delay:
            self._after(delay, self._respawn)
        elif self._closing:
            pass
        elif self._zygote is None:
            self._start_zygote()
        else:
            self._spawn_missing()

    def _spawn_missing(self) -> None:
        missing = self._wanted - len(self._workers)
        if self._brake.engaged:
            starting = any(not worker.ready for worker in self._workers.values())
            missing = 0 if starting else min(missing, 1)  # one try at a time
        for _ in range(missing):
            self._spawn()

    def _spawn(self) -> None:
        assert self._control is not None
        number = next(self._numbers)
        fds: list[int] = []
        try:
            for _ in range(3):
                fds += make_pipe()
            request_read, request_write, response_read, response_write, log_read, log_write = fds
            socket.send_fds(self._control, [_encode(Spawn(number))], [request_read, response_write, log_write])
            channel = Channel(request_write, response_read)
        except OSError as error:  # out of descriptors, or the zygote is gone or stuck
            logger.error("worker %d can't be started, and is tried again: %s", number, error)
            for fd in fds:
                os.close(fd)
            self._after(0.2, self._respawn)
            return
        for fd in (request_read, response_write, log_write):
            os.close(fd)
        worker = Worker(number, channel, LogPipe(log_read, f"worker {number} (starting)"))
        self._workers[number] = worker
        self._watch(worker.log.fd, lambda: self._read_log(worker))
        self._watch(response_read, lambda: self._hear_starting(worker))
        self._after(self._start_timeout, lambda: self._check_started(number))

    def _born(self, news: Born, pidfd: int) -> None:
        worker = self._workers[news.worker]
        worker.pid = news.pid
        worker.pidfd = pidfd
        worker.log.label = f"worker {news.pid}"
        if self._closing:
            self.leases.kill(worker)

    def _hear_starting(self, worker: Worker) -> None:
        """The first frame of a worker: READY, or the report of what stopped it."""
        channel = worker.channel
        frames = channel.receive()
        if frames == []:
            return
        self._unwatch(channel.response_fd)
        kind, _, payload = frames[0] if frames else (0, 0, b"")
        try:
            if kind == READY and frames is not None and len(frames) == 1 and channel.clean:
                _decode_ready(payload)
                self._ready(worker)
                return
            if kind == FAULT:
                worker.failure = _decode_report(payload).traceback
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            worker.failure = f"its first frame does not hold up: {error}"
        else:
            if frames is not None and kind != FAULT:
                worker.failure = "its first frame was not READY: something in its start wrote to its response pipe"
        self.leases.kill(worker)

    def _ready(self, worker: Worker) -> None:
        self._brake.succeeded()
        self.leases.add(worker)
        if not self._started.is_set() and all(worker.ready for worker in self._workers.values()):
            self._started.set()
        self._spawn_missing()

    def _check_started(self, number: int) -> None:
        worker = self._workers.get(number)
        if worker is not None and not worker.ready:
            worker.failure = (
                f"it was not ready {self._start_timeout} s after its start: look at what its import waits for, "
                f"or allow more time (start_timeout)"
            )
            self.leases.kill(worker)

    # -- ends ----------------------------------------------------------------------------------------

    def _bury(self, worker: Worker, status: int | None) -> None:
        """A worker has ended: log its last words, tell its holder, and see to its successor."""
        del self._workers[worker.number]
        for fd in (worker.channel.response_fd, worker.channel.request_fd, worker.log.fd):
            self._unwatch(fd)
        worker.log.close()
        self.leases.bury(worker, status)
        if (settle := self._adopted.get(worker)) is not None:
            settle()
        if self._closing:
            self._stop_zygote_if_alone()
        elif self._zygote is not None:
            if worker.jobs == 0:
                why = worker.failure or worker.log.tail("") or "it printed nothing"
                self._start_failed(f"a worker {describe_exit(status)[0]} before its first job:\n{why}")
            self._respawn()

    def _start_failed(self, why: str) -> None:
        if not self._started.is_set():
            self._no_start(why)
            return
        now = time.monotonic()
        self._brake.failed(now)
        pause = self._brake.delay(now)
        logger.error("%s%s", why, f"\nnext try in {pause:.1f} s" if pause else "")
        if self._brake.engaged and not any(worker.ready for worker in self._workers.values()):
            first_line = why.splitlines()[0]
            self.leases.refuse(
                lambda: WorkersUnavailable(
                    f"no worker can be started at the moment: {first_line} The log has all of it.",
                    max(self._brake.delay(time.monotonic()), 1.0),
                )
            )

    def _no_start(self, why: str) -> None:
        self._start_error = self._start_error or why
        self._closing = True
        self._started.set()

    # -- workers that were left by their callers -----------------------------------------------------

    def _await_end(self, worker: Worker, exchange: ResponseExchange) -> None:
        """Wait, for the grace time, until the left worker has ended its response and taken what was sent to it."""
        channel = worker.channel

        def settle(healthy: bool = False) -> None:
            if self._adopted.pop(worker, None) is not None:
                self._unwatch(channel.response_fd)
                self._unwatch(channel.request_fd)
                (self.leases.give_back if healthy else self.leases.discard)(worker)

        def look() -> None:
            try:
                channel.flush()
            except BrokenPipeError:
                channel.drop_outgoing()
            frames = channel.receive() if exchange.open else []
            if frames is None:
                settle()
                return
            exchange.receive(frames)
            exchange.body.clear()
            if exchange.violation:
                settle()
            elif channel.flushed:
                self._unwatch(channel.request_fd)
                if not exchange.open:
                    settle(healthy=channel.clean)

        self._adopted[worker] = settle
        if worker.dead or self._closing:
            settle()
            return
        self._watch(channel.response_fd, look)
        if not channel.flushed:
            self._watch(channel.request_fd, look, selectors.EVENT_WRITE)
        self._after(self._grace, settle)
        look()

    def _read_log(self, worker: Worker) -> None:
        if not worker.log.read():
            self._unwatch(worker.log.fd)

    # -- the end of it all ---------------------------------------------------------------------------

    def _begin_stop(self, grace: float) -> None:
        self._closing = True
        for worker in self._workers.values():
            if worker.ready and not self.leases.is_leased(worker):
                worker.channel.end_requests()
            else:
                self.leases.kill(worker)
        self._after(grace, self._kill_all)
        self._stop_zygote_if_alone()

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            self.leases.kill(worker)

    def _stop_zygote_if_alone(self) -> None:
        if self._workers:
            return
        if self._zygote is None:
            self._finished = True
        elif self._control is not None:
            # Closing the socket is the order to end: the zygote kills what is left of its descendants and exits.
            self._control.shutdown(socket.SHUT_RDWR)
            self._after(EXIT_LIMIT, self._kill_zygote)

    def _kill_zygote(self) -> None:
        if self._zygote is not None:
            signal.pidfd_send_signal(self._zygote_fd, signal.SIGKILL)
