"""Workers whose lines are full, or broken: what could not be said is said once there is room.

All of it happens in the supervisor's thread, but for what the `Leases` call, which comes to it.
"""

from __future__ import annotations

import errno
import logging
import selectors
from typing import Final

from .leases import Leases
from .reactor import Reactor
from .record import Worker

logger = logging.getLogger("blastdoor")

_PAUSE: Final = 0.5
"""Seconds until a lane is tried again that could not be opened."""

_BROKEN: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class LineWatch:
    """Tries again, when that makes sense, what a worker's line had no room for."""

    def __init__(self, reactor: Reactor, leases: Leases) -> None:
        self._reactor = reactor
        self._leases = leases
        leases.no_lane = lambda worker, error: reactor.call(lambda: self._lane_failed(worker, error))

    def await_room(self, worker: Worker) -> None:
        """Send the rest once there is room; lanes may be opened again then."""
        if not self._reactor.watches(worker.line.fd):
            self._reactor.watch(worker.line.fd, lambda: self._room(worker), selectors.EVENT_WRITE)

    def _room(self, worker: Worker) -> None:
        if not worker.line.flush() or worker.line.flushed:
            self._reactor.unwatch(worker.line.fd)
            if worker.blocked:
                self._leases.unblock(worker)

    def _lane_failed(self, worker: Worker, error: OSError) -> None:
        """No lane of this worker can be opened, for this reason."""
        if worker.dead or worker.line.fd < 0:
            return
        if isinstance(error, BlockingIOError):
            self.await_room(worker)
        elif isinstance(error, ConnectionRefusedError):
            words = "worker %s takes no more than %d jobs at once: it has no descriptors, or no thread, for more"
            logger.error(words, worker.pid, worker.most_lanes)
        elif error.errno in _BROKEN:
            logger.error("worker %s has closed its line: it gets no more jobs", worker.pid)
            self._leases.expel(worker)
        else:
            logger.error("no more lanes can be opened to worker %s at the moment: %s", worker.pid, error)
            self._reactor.after(_PAUSE, lambda: self._leases.unblock(worker))
