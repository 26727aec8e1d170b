"""A request's body at its agent: pieces that the host feeds, taken by the job as its worker takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..model.request import Upload


class FedUpload(Upload):
    """A body whose pieces come from another thread, one at a time: `feed` returns when its piece is taken."""

    __slots__ = ("_changed", "_slot", "_wake")

    def __init__(self) -> None:
        super().__init__(None)
        self._next = bytes  # there may be more to pull, until the end was pulled
        self._changed = threading.Condition()
        self._slot: bytes | None = None
        self._wake: Callable[[], object] = lambda: None

    def on_ready(self, wake: Callable[[], object]) -> None:
        """Have `wake` called when a piece has come."""
        self._wake = wake

    @property
    def ready(self) -> bool:
        """Whether a piece is there to be pulled."""
        return self._slot is not None

    def feed(self, piece: bytes) -> bool:
        """Give the next piece, b"" for the end; whether more is wanted, once it was taken."""
        with self._changed:
            if self._closed:
                return False
            self._slot = piece
        self._wake()
        with self._changed:
            while self._slot is piece and not self._closed:
                self._changed.wait()
            return self._slot is not piece

    def pull(self) -> bytes:
        """The piece that is there. It is `ready`, and at most PIECE bytes, as the host sends them."""
        with self._changed:
            piece, self._slot = self._slot, None
            assert piece is not None
            self.pulled = True
            if not piece:
                self._closed = True
                self._next = None
            self._changed.notify_all()
            return piece

    def close(self) -> None:
        """Take no more: whoever feeds is told so."""
        with self._changed:
            super().close()
            self._changed.notify_all()
