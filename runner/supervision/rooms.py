"""Which worker gets the next job: the one with the fewest, at a cost that does not grow with their number."""

from __future__ import annotations

from .record import Worker


class Rooms:
    """The workers that may get a job now, in rooms by how many they have. Guarded by the lock of the `Leases`.

    Of one room the worker that came last is next: it is warm, and those that are not needed stay idle. `idle` is the
    first room, `serving` are all workers that are not about to go. A signal's handler may raise between any two
    instructions: what is left then, `holds` finds.
    """

    __slots__ = ("_lowest", "_rooms", "idle", "serving")

    def __init__(self) -> None:
        self.idle: dict[Worker, None] = {}
        self.serving: set[Worker] = set()
        self._rooms = [self.idle]
        self._lowest = 0

    def __bool__(self) -> bool:
        return any(self._rooms)

    def holds(self, worker: Worker) -> bool:
        """Whether this worker may get a job."""
        return worker.room >= 0 and worker in self._rooms[worker.room]

    def next(self) -> Worker | None:
        """The worker that gets the next job."""
        rooms = self._rooms
        while self._lowest < len(rooms):
            if room := rooms[self._lowest]:
                return next(reversed(room))
            self._lowest += 1
        return None

    def place(self, worker: Worker) -> None:
        """Put a worker where it belongs by its jobs and its state."""
        rooms = self._rooms
        if worker.room >= 0:
            rooms[worker.room].pop(worker, None)
        if not worker.in_service:
            self.serving.discard(worker)
            worker.room = -1
            return
        if not (worker.free or worker.has_room):
            worker.room = -1
            return
        running = worker.running
        while len(rooms) <= running:
            rooms.append({})
        # In this order: an interrupt in between leaves it where `holds` finds that it is not offered.
        self._lowest = min(self._lowest, running)
        worker.room = running
        rooms[running][worker] = None
