"""Workers that get no more jobs: those that are due to be replaced, and those that have a job which does not end.

All of it happens in the supervisor's thread, but for what the `Leases` call, which comes to it.
"""

from __future__ import annotations

from collections.abc import Callable

from .leases import Leases
from .reactor import Reactor
from .record import Worker


class Retirement:
    """Ends workers once their jobs have ended, or their time is up. `respawn` starts the successors.

    A worker that is told to end has `stop_timeout` seconds for it; the jobs of one that is condemned have `drain`.
    """

    def __init__(
        self, reactor: Reactor, leases: Leases, respawn: Callable[[], object], stop_timeout: float, drain: float
    ) -> None:
        self._reactor = reactor
        self._leases = leases
        self._respawn = respawn
        self._stop_timeout = stop_timeout
        self._drain = drain
        self._leaving: set[Worker] = set()
        self._condemned: set[Worker] = set()
        self._ended = False
        leases.retire = lambda worker: reactor.call(lambda: self.retire(worker))
        leases.condemn = lambda worker: reactor.call(lambda: self._condemn(worker))
        leases.left_idle = lambda worker: reactor.call(lambda: self._end_idle(worker))

    def __contains__(self, worker: object) -> bool:
        return worker in self._leaving

    def __len__(self) -> int:
        return len(self._leaving)

    def end(self) -> None:
        """The pool closes: all workers end otherwise."""
        self._ended = True

    def retire(self, worker: Worker) -> None:
        """Replace a worker that gets no more jobs: its successor is started first, then it is asked to end.

        Jobs that it has come to their ends before.
        """
        if worker.dead or self._ended:
            return
        self._leaving.add(worker)
        self._respawn()
        self._end_idle(worker)

    def forget(self, worker: Worker) -> None:
        """It is dead."""
        self._leaving.discard(worker)
        self._condemned.discard(worker)

    def _condemn(self, worker: Worker) -> None:
        """Replace a worker that has a job which does not end, or a broken lane: its other jobs have their time."""
        if worker.dead or self._ended or worker in self._condemned:
            return
        self._condemned.add(worker)
        self._reactor.after(self._drain, lambda: self._leases.kill(worker))
        self.retire(worker)

    def _end_idle(self, worker: Worker) -> None:
        """End a worker that gets no more jobs, once it has none."""
        if worker.running or worker.dead or worker.ending or worker not in self._leaving:
            return
        if worker in self._condemned:
            self._leases.kill(worker)
            return
        self._reactor.unwatch(worker.line.fd)  # there may have been no room in it for a lane
        worker.end_requests()
        self._reactor.after(self._stop_timeout, lambda: self._leases.kill(worker))
