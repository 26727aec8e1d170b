"""A request body that whoever has it pushes, piece by piece, as it comes to him: the front's, from its clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..model.request import Upload


class PushedUpload(Upload):
    """A request body that is pushed. All of it in the event loop's thread.

    `wake` is called when there is something to pull, `starved` when there is nothing, and more is wanted. `waiting` is
    how many bytes were pushed and not pulled.
    """

    __slots__ = ("_ended", "_pieces", "_starved", "waiting", "wake")

    def __init__(self, starved: Callable[[], object]) -> None:
        super().__init__(None)
        self.wake: Callable[[], object] = lambda: None
        self._starved = starved
        self.waiting = 0
        self._next = bytes  # there may be more to pull, until the end was pulled
        self._pieces: deque[bytes] = deque()
        self._ended = False

    def push(self, piece: bytes) -> None:
        """A piece has come."""
        if not self._closed:
            self._pieces.append(piece)
            self.waiting += len(piece)
            self.wake()

    def end(self) -> None:
        """The body has come to its end."""
        self._ended = True
        if not self._closed:
            self.wake()

    def on_ready(self, wake: Callable[[], object]) -> None:
        """Have `wake` called when there is something to pull."""
        self.wake = wake

    @property
    def ready(self) -> bool:
        """Whether `pull` has something to give now."""
        return self._rest is not None or bool(self._pieces) or self._ended

    def pull(self) -> bytes | memoryview:
        """The next piece, which has to be `ready`."""
        rest = self._rest
        self.pulled = True
        if rest is None:
            if not self._pieces:
                self._closed = True
                self._next = None
                return b""
            piece = self._cut(self._pieces.popleft())
        else:
            piece = self._cut(rest)
        self.waiting -= len(piece)
        return piece

    def starve(self) -> None:
        """Whoever pulls wants more."""
        if not self._ended and not self._closed:
            self._starved()

    def unpulled(self) -> list[bytes]:
        """What was pushed, where nothing was pulled: for another upload."""
        return list(self._pieces)

    def close(self) -> None:
        """Take no more."""
        self._pieces.clear()
        self.waiting = 0
        super().close()
