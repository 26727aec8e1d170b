"""What the gateway and its server tell each other: the connection below a request, and how the request ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

if TYPE_CHECKING:
    pass


EXTENSION: Final = "blastdoor.connection"
"""Under this key of a scope's extensions the server of our own has a `Connection`."""


class Connection(Protocol):
    """What the server of our own does for a request beyond ASGI."""

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once the connection is lost. ASGI tells that only to who receives."""

    def whole_body(self) -> int | None:
        """How many bytes the request's body has, where all of it has come; else None."""

    def break_off(self) -> None:
        """What was begun of the answer comes to no end."""


class RequestFinished(msgspec.Struct, frozen=True):
    """A request at the gateway is over: what was asked, by whom, what was sent of the answer, in how many seconds.

    `status` is None where the client had gone before there was one; `whole` tells whether all of the answer was sent.
    `target` and `request_id` (the client's X-Request-ID) are the client's words.
    """

    mount: str
    method: str
    target: str
    client: str
    status: int | None
    sent: int
    whole: bool
    seconds: float
    job_id: str
    request_id: str


class BrokenOff(Exception):
    """Raised to the ASGI server so that it breaks the connection off: the answer has failed after its head."""
