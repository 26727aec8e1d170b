"""What a worker's record knows of the job that holds it: a protocol (PEP 544), which the jobs fulfill."""

from __future__ import annotations

from typing import Protocol


class JobProtocol(Protocol):
    """A job that holds a worker."""

    method: str
    target: str
    job_id: str
    began: float

    @property
    def settled(self) -> bool:
        """Whether it holds the worker no more."""

    @property
    def over(self) -> bool:
        """Whether nothing is done for it any more: its worker is let go, or was forgotten, by an interrupt."""

    def close(self, cause: BaseException | None = None) -> None:
        """End it; from any thread."""

    def over_time(self, detail: str) -> None:
        """End it, which is over a time limit of the pool, with these words."""
