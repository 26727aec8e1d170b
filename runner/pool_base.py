"""What every pool is to whoever holds it: started and closed by hand or as a context manager, and subscribed to.

The base of `runner.Pool` and of `runner.cluster.ClusterPool`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from .events import Batch, Events, JobTime, Subscriber


class Startable:
    """A pool's life: a context manager, also an async one, that ends also where it is dropped."""

    _events: Events
    _forked: bool

    @abstractmethod
    def start(self) -> Self: ...

    @abstractmethod
    def close(self, drain: float | None = None) -> None: ...

    @property
    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether there is anything to be closed."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        from .supervision.waiters import in_thread

        try:
            await in_thread(self.start)
        except BaseException:
            await in_thread(lambda: self.close(drain=0))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, drain: float | None = None) -> None:
        """As `close`, without blocking the event loop, and not to be interrupted."""
        from .supervision.waiters import in_thread

        await in_thread(lambda: self.close(drain))

    def __del__(self) -> None:
        if self._has_begun and not self._forked:
            try:
                warnings.warn(
                    "a pool was dropped without being closed: use it in a with block, or call close()",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            finally:
                self.close(drain=0)

    def subscribe(self, subscriber: Subscriber, *, healthy: bool = True) -> Callable[[], None]:
        """Have `subscriber` called with each event of `runner.events`, where it happens; gives what ends that.

        Without `healthy` it hears of jobs only where they end badly, which costs the others nothing.
        """
        return self._events.subscribe(subscriber, healthy=healthy)

    def note_times(self, batch: Batch[JobTime]) -> Callable[[], None]:
        """Have the times of all jobs noted in a batch, which costs them little; gives what ends that."""
        return self._events.note_times(batch)
