"""What every opened job is to its reader: iteration and a context manager. The bases of all jobs, the cluster's too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Self


class BaseJob:
    """A job that a thread reads. Iterate for the body: each piece as it comes."""

    __slots__ = ()

    @abstractmethod
    def read(self) -> bytes: ...

    @abstractmethod
    def close(self, cause: BaseException | None = None) -> None: ...

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read():
            yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


class BaseAsyncJob:
    """A job that a task reads. Iterate for the body: each piece as it comes."""

    __slots__ = ()

    @abstractmethod
    async def read(self) -> bytes: ...

    @abstractmethod
    def close(self, cause: BaseException | None = None) -> None: ...

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self.read():
            return piece
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)
