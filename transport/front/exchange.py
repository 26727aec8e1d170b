"""One request of a connection and its answer: what comes of its body, and what is written.

`Exchange` knows HTTP; what answers it is a subclass's: `pool_exchange` has pools answer, `pages` functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from runner.wire.messages import ResponseHead
from transport.front.heads import CONTINUE, Framing, head_bytes

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

    from transport.gateway.router import Asked


class ConnectionProtocol(Protocol):
    """What an exchange knows of its connection."""

    loop: AbstractEventLoop
    write: Callable[[bytes], None]

    def on_answered(self, exchange: Exchange) -> None:
        """The answer was written."""

    def break_off(self) -> None:
        """The answer under way comes to no end, and is not to look as if it did."""

    def update_reading(self) -> None:
        """What has come of a body was taken, or not: read on, or do not."""


class Exchange(ABC):
    """A request and its answer, on their connection. It is begun once those before it are answered.

    `whole` tells that all of the request has come, `started` that the answer's head was written, `complete` that all of
    the answer was, `over` that nothing is done for it any more. `expects` tells that the client waits to be told to go
    on (RFC 9110, 10.1.1).
    """

    # Most of it stays as it is here: what each request need not set is not set.
    keep_alive = http_1_0 = expects = False
    begun = whole = started = complete = over = False
    framing = Framing.NONE
    status: int | None = None
    sent = 0

    def __init__(self, connection: ConnectionProtocol, asked: Asked) -> None:
        self.connection = connection
        self.asked = asked

    # -- what comes ----------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """Answer. What has come of the body until then is there already."""

    @abstractmethod
    def take_body(self, data: bytes) -> None:
        """A piece of the request's body has come."""

    @abstractmethod
    def take_body_end(self) -> None:
        """All of the request has come; `whole` is set already."""

    @property
    @abstractmethod
    def backlog(self) -> int:
        """How many bytes of the body have come and are not taken yet."""

    @abstractmethod
    def abandon(self) -> None:
        """Nobody waits for the answer, or for the rest of it: nothing is written any more."""

    def hold(self) -> None:  # noqa: B027 - what needs no holding does nothing
        """The client takes no more at the moment: write nothing that can wait."""

    def go_on(self) -> None:  # noqa: B027
        """The client has taken all."""

    # -- what is written -----------------------------------------------------------------------------

    def ask_for_body(self) -> None:
        """The body is wanted: tell a client that waits for that."""
        if self.expects and not self.started:
            self.expects = False
            self.connection.write(CONTINUE)

    def answer(self, head: ResponseHead, data: bytes, *, ended: bool) -> None:
        """The head, and what there is of the body; all of it, where it is `ended`.

        A client that was not told to go on may or may not send its body: its connection ends after the answer.
        """
        self.started = True
        self.status = head.status
        keep_alive = self.keep_alive and not self.expects
        head_only = self.asked.method == "HEAD"
        written, self.framing, self.keep_alive = head_bytes(
            head, head_only=head_only, chunks=not self.http_1_0, keep_alive=keep_alive
        )
        self._write_body(data, ended=ended, before=written)

    def go_on_with(self, data: bytes, *, ended: bool) -> None:
        """More of the body; the last of it, where it is `ended`."""
        self._write_body(data, ended=ended)

    def _write_body(self, data: bytes, *, ended: bool, before: bytes = b"") -> None:
        framing = self.framing
        if framing is Framing.NONE:
            data = before
        elif framing is Framing.CHUNKED:
            size = len(data)
            self.sent += size
            if not ended:
                data = b"%b%x\r\n%b\r\n" % (before, size, data) if size else before
            elif size:
                data = b"%b%x\r\n%b\r\n0\r\n\r\n" % (before, size, data)
            else:
                data = before + b"0\r\n\r\n"
        else:
            self.sent += len(data)
            data = before + data if before else data
        self.complete = ended
        if data:
            self.connection.write(data)
        if ended:
            self.end()
            self.connection.on_answered(self)

    def end(self) -> None:
        """The exchange is over: the answer was written, or nobody waits for it."""
        if not self.over:
            self.over = True
            self.finish()

    def finish(self) -> None:  # noqa: B027
        """It is over. Called once."""
