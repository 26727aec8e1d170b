"""How many workers there should be: by the demand, within the bounds that the pool was given."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from ..errors import StartError
from ..platform import descriptors
from .leases import Leases
from .reactor import Reactor
from .record import Worker

_PER_WORKER: Final = 8
"""Descriptors of a worker: request, response, wake-up, epoll, stdout, stderr, line, pidfd."""

_PER_LANE: Final = 4
"""Descriptors of each further lane: request, response, wake-up, epoll."""

_SHORTEST_LOOK: Final = 0.02


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers there are: from `least` to `most` by demand, and `spares` that are warm beyond that.

    Each runs up to `concurrency` jobs at once. A worker that has been idle for `shrink_after` seconds goes, where there
    are more than the least; of workers with several jobs each, which are spread, the one with the fewest goes once the
    others have had room for all of them for so long.
    """

    least: int
    most: int
    spares: int = 0
    shrink_after: float = 10.0
    concurrency: int = 1

    @property
    def look_after(self) -> float:
        """Seconds between two looks for a worker that may go."""
        return max(self.shrink_after / 4, _SHORTEST_LOOK)

    def make_room(self, owner: object) -> None:
        """Have room for the descriptors of all that there may be. StartError, with how many there is room for.

        It is the owner's, until `descriptors.release`.
        """
        workers = self.most + self.spares
        wanted = workers * _PER_WORKER + self.most * (self.concurrency - 1) * _PER_LANE
        room = descriptors.make_room(wanted, owner)
        if room >= wanted:
            return
        descriptors.release(owner)
        if self.concurrency == 1:
            what, there = f"{workers} worker{'s' if workers > 1 else ''}", f"{max(room // _PER_WORKER, 0)}"
        else:
            lanes = max(room // self.most - _PER_WORKER, 0) // _PER_LANE + 1
            what, there = f"{workers} workers of {self.concurrency} jobs each", f"{lanes} jobs in each"
        raise StartError(
            f"the limit of open files has no room for {what}: there is room for {there}. "
            f"Raise its hard limit (ulimit -Hn, LimitNOFILE= in systemd), or start the pool with fewer"
        )

    @property
    def most_jobs(self) -> int:
        """How many jobs may run at once."""
        return self.most * self.concurrency

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the demand."""
        return self.most > self.least


class Scaler:
    """Follows the demand. `wanted` is how many workers there should be now.

    It calls `grow` when that has grown, and `retire` with each worker that is not needed any more; all in the
    supervisor's thread.
    """

    def __init__(
        self,
        size: Size,
        leases: Leases,
        reactor: Reactor,
        grow: Callable[[], object],
        retire: Callable[[Worker], object],
    ) -> None:
        self.wanted = self._least = size.least + size.spares
        self._size = size
        self._leases = leases
        self._reactor = reactor
        self._grow_pool = grow
        self._retire = retire
        self._growth_is_due = False
        self._needed_at = 0.0
        self._ended = False
        if size.elastic:
            leases.on_saturated = self._on_saturated

    def end(self) -> None:
        """The pool closes: the number changes no more."""
        self._ended = True

    def _on_saturated(self) -> None:
        if not self._growth_is_due:
            self._growth_is_due = True
            self._reactor.call(self._grow)

    def _grow(self) -> None:
        """Have as many workers as jobs that run and callers that wait, and the spares, within bounds."""
        self._growth_is_due = False
        size = self._size
        numbers = self._leases.numbers()
        needed = -(-(numbers.running + numbers.waiting) // size.concurrency)
        wanted = min(max(needed, size.least), size.most) + size.spares
        if wanted > self.wanted and not self._ended:
            self.wanted = wanted
            self._needed_at = time.monotonic()
            self._grow_pool()
            self._reactor.after(size.look_after, self._shrink)

    def _shrink(self) -> None:
        """Let go of a worker that has been idle for long; look again until as few are left as there should be."""
        if self._ended:
            return
        least = self._least
        while self.wanted > least and (worker := self._surplus()) is not None:
            self.wanted -= 1
            self._retire(worker)
        if self.wanted > least:
            self._reactor.after(self._size.look_after, self._shrink)

    def _surplus(self) -> Worker | None:
        """A worker that is not needed any more, taken out of service."""
        size = self._size
        idle = self._leases.withdraw_idle(size.shrink_after)
        if idle is not None or size.concurrency == 1:
            return idle
        enough = (self.wanted - size.spares - 1) * size.concurrency
        now = time.monotonic()
        if self._leases.numbers().running > enough:
            self._needed_at = now
        elif now - self._needed_at >= size.shrink_after:
            self._needed_at = now  # one at a time
            return self._leases.withdraw_surplus(enough)
        return None
