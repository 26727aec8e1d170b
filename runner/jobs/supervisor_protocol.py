"""What jobs know of the pool that their workers are of: a protocol (PEP 544), which its `Supervisor` fulfills.

For the types only: no call of a request's way goes through more than it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..events import Events
    from ..model.limits import Limits
    from ..supervision.abandoned_jobs import Remainder
    from ..supervision.leases import Leases
    from ..supervision.record import Lane


class SupervisorProtocol(Protocol):
    """Whoever has the workers, and takes back those that their jobs leave."""

    limits: Limits
    events: Events
    leases: Leases

    @property
    def in_forked_child(self) -> bool:
        """Whether this is a forked child, where the workers are the parent's."""

    def look_for_lost(self) -> None:
        """A job is about to lease a lane: have those looked for that an interrupted one has left with nobody."""

    def look_after_jobs(self) -> None:
        """A lane is leased for a job: have the job held to the pool's limits."""

    def adopt(self, lane: Lane, remainder: Remainder) -> None:
        """A job has left this lane in the middle of its response, or to its background work: see to it."""
