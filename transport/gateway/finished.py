"""How a request at a gateway ended: what logs and metrics are told."""

from __future__ import annotations

import msgspec

from runner.wire.messages import Header

RequestTime = tuple[str, str, int | None, int, bool, float, float]
"""Of a request that is over: mount, method, status, bytes sent, whether the answer was whole, its seconds, and when it
ended, on the clock of `time.monotonic`."""


class RequestFinished(msgspec.Struct, frozen=True):
    """A request at the gateway is over: what was asked, by whom, what was sent of the answer, in how many seconds.

    `status` is None where the client had gone before there was one; `whole` tells whether all of the answer was sent.
    `target`, `headers` (with names in small letters) and `request_id` (X-Request-ID) are the client's words.
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
    headers: list[Header] = []
