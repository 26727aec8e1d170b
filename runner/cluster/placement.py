"""Which node a job goes to: the least loaded of those that have room, for the caller that has waited longest.

No I/O, and nothing of Ray's: `scripts/simulate` runs it for a thousand nodes.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from ..errors import LeaseTimeout
from ..supervision.wait_queue import WaitQueue
from ..supervision.waiters import Caller

PATIENCE: Final = 0.03
"""Seconds that a job waits for a worker at its node, before it is placed anew."""


class Node:
    """What placement knows of one node: it runs up to `capacity` jobs at once, of which `running` are this host's.

    `others` are those of other hosts, as far as known. None are placed on one that drains, is paused or silent.
    """

    __slots__ = (
        "address",
        "capacity",
        "draining",
        "entry",
        "load",
        "name",
        "others",
        "paused_until",
        "running",
        "silent",
    )

    def __init__(self, name: str, address: str, capacity: int) -> None:
        self.name = name
        self.address = address
        self.capacity = capacity
        self.running = 0
        self.others = 0
        self.draining = False
        self.silent = False
        self.paused_until = 0.0
        self.entry = 0

    @property
    def open(self) -> bool:
        """Whether it takes one more job now."""
        return not self.draining and not self.silent and self.running < self.capacity

    def __lt__(self, other: Node) -> bool:
        return self.name < other.name


def too_late(timeout: float | None) -> LeaseTimeout:
    """What those get whom no node has taken within so many seconds."""
    return LeaseTimeout(
        f"no worker became free within {timeout} s, on any node: start the pool with more workers, or wait longer "
        f"(lease_timeout; the client's connect or pool timeout)"
    )


class Slot:
    """A place for one job on a node, until `Placement.give_back`."""

    __slots__ = ("node", "provider")

    def __init__(self, node: Node, provider: str) -> None:
        self.node = node
        self.provider = provider


class Placement(WaitQueue[Slot]):
    """The nodes of a cluster, as one host places its jobs on them.

    At most `queue` callers wait; of a provider at most what `per_provider` says run at once, wherever they run.
    """

    def __init__(
        self,
        queue: int | None = None,
        per_provider: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(queue)
        self._per_provider = per_provider or {}
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._nodes: dict[str, Node] = {}
        self._seats = 0
        # A heap of the open nodes by load, those of one load in no order: hosts that all know the same of the nodes
        # must not all go to the same one. An entry whose number is not its node's any more is passed over.
        self._heap: list[tuple[float, float, int, Node]] = []
        self._entries = itertools.count(1)

    # -- nodes -------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        """A node is ready for jobs."""
        with self._lock:
            if not self._closed:
                self._refusal = None
            self._nodes[node.name] = node
            self._rank(node)
            self._serve()

    def remove(self, node: Node) -> None:
        """A node is gone. Its slots are still given back by those who hold them."""
        with self._lock:
            if self._nodes.get(node.name) is node:
                del self._nodes[node.name]
            node.entry = 0

    def update(
        self,
        node: Node,
        *,
        others: int | None = None,
        silent: bool | None = None,
        draining: bool | None = None,
        paused_until: float | None = None,
    ) -> None:
        """Something is known of a node anew; None leaves it. `paused_until` is by the clock."""
        with self._lock:
            node.others = node.others if others is None else others
            node.silent = node.silent if silent is None else silent
            node.draining = node.draining if draining is None else draining
            node.paused_until = node.paused_until if paused_until is None else paused_until
            if self._nodes.get(node.name) is node:
                self._rank(node)
                self._serve()

    def nodes(self) -> list[Node]:
        """The nodes of this moment."""
        with self._lock:
            return list(self._nodes.values())

    def numbers(self) -> tuple[int, int]:
        """How many jobs have a slot, and how many callers wait for one."""
        with self._lock:
            return self._seats, len(self._waiters)

    @property
    def has_any(self) -> bool:
        """Whether there is a node that takes jobs, busy or not."""
        return any(not node.draining and not node.silent for node in list(self._nodes.values()))

    # -- slots -------------------------------------------------------------------------------------

    def give_back(self, slot: Slot) -> None:
        """A job is over, or was not begun."""
        with self._lock:
            slot.node.running -= 1
            self._seats -= 1
            if self._per_provider:
                self._running[slot.provider] -= 1
            if self._nodes.get(slot.node.name) is slot.node:
                self._rank(slot.node)
            self._serve()
            if self._closed and not self._seats:
                self._drained.notify_all()

    def full(self, slot: Slot) -> None:
        """No worker of its node was free for this slot: it is given back, and others are tried first for a while."""
        with self._lock:
            node = slot.node
            node.others = max(node.others, node.capacity - node.running + 1)
        self.give_back(slot)

    @property
    def _any_taken(self) -> bool:
        return self._seats > 0

    def _give_up(self, resource: Slot) -> None:
        self.give_back(resource)

    def _admits(self, provider: str) -> bool:
        limit = self._per_provider.get(provider) if self._per_provider else None
        return limit is None or self._running[provider] < limit

    def _take(self, provider: str, caller: Caller[Slot] | None = None) -> Slot | None:
        if not self._admits(provider) or (node := self._least_loaded()) is None:
            return None
        node.running += 1
        self._seats += 1
        if self._per_provider:
            self._running[provider] += 1
        self._rank(node)
        return Slot(node, provider)

    def _least_loaded(self) -> Node | None:
        heap = self._heap
        now = self._clock()
        paused: list[Node] = []
        found = None
        while heap:
            _, _, entry, node = heap[0]
            if entry != node.entry:
                heapq.heappop(heap)
            elif node.paused_until > now:
                heapq.heappop(heap)
                paused.append(node)
            else:
                found = node
                break
        for node in paused:
            self._rank(node)
        if found is None and paused:
            return min(paused, key=lambda node: node.paused_until)  # all are: the first to be tried again
        return found

    def _rank(self, node: Node) -> None:
        """Put a node where it belongs in the heap; out of it, where it takes no job now."""
        if not node.open:
            node.entry = 0
            return
        entry = node.entry = next(self._entries)
        load = (node.running + node.others) / node.capacity
        heapq.heappush(self._heap, (load, random.random(), entry, node))
        if len(self._heap) > 4 * len(self._nodes) + 64:
            self._heap = [entry for entry in self._heap if entry[2] == entry[3].entry]
            heapq.heapify(self._heap)

    def _serve(self) -> None:
        """There may be room: serve those who wait, in their order."""
        while self._waiters:
            if self._least_loaded() is None or (waiter := self._next_waiter()) is None:
                return
            slot = self._take(waiter.provider)
            assert slot is not None
            waiter.found = slot
            self._drop(waiter)
            if not self._tell(waiter):
                waiter.found, waiter.error = None, LeaseTimeout("the event loop of this caller has ended")
                self.give_back(slot)
                return
