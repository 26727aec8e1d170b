"""What a loaded handler is to its worker: an adapter that is called with one job after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ...wire.messages import HandlerKind
    from ..async_pipes import AsyncRequest, AsyncResponse
    from ..pipes import IncomingRequest, OutgoingResponse


class Adapter(ABC):
    """A handler that is called as a function."""

    kind: ClassVar[HandlerKind]

    @abstractmethod
    def __call__(self, request: IncomingRequest, response: OutgoingResponse) -> None:
        """Run one job. What it raises is the job's fault."""


class AsyncAdapter(ABC):
    """A handler that is called as a coroutine, on the worker's event loop.

    `asks_first` says that it hears that its caller has left without having its task cancelled.
    """

    kind: ClassVar[HandlerKind]
    asks_first: ClassVar[bool] = False

    async def start(self) -> None:  # noqa: B027 - not every handler has something to do here
        """Get ready for the first job."""

    async def stop(self) -> None:  # noqa: B027
        """There are no more jobs."""

    @abstractmethod
    async def __call__(self, request: AsyncRequest, response: AsyncResponse) -> None:
        """Run one job. What it raises is the job's fault."""
