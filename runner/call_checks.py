"""What every pool checks and completes of a call: the request, its body's length, its timeouts."""

from __future__ import annotations

import logging
import math

from .model.durations import check_seconds
from .model.request import Body, Request

logger = logging.getLogger("blastdoor")


def sized_body(request: Request) -> Body:
    """A request's body, held to the length that its headers announce. InvalidLength for another."""
    if request.body is None or not request.headers:
        return request.body
    from .jobs.body_length import held_to_length  # loaded where it is used

    return held_to_length(request.body, request.headers)


def check_request(request: object) -> None:
    """TypeError for what is no request."""
    if type(request) is not Request and not isinstance(request, Request):
        raise TypeError(f"a pool opens a Request, as in pool.open(Request('GET', '/')), not {request!r}")


def check_timeouts(lease: float | None, read: float | None, write: float | None) -> None:
    """ConfigurationError for what is no time in seconds. Infinity is for ever, as None is."""
    if lease is not None:
        check_seconds("lease_timeout", lease, endless=True)
    if read is not None:
        check_seconds("read_timeout", read, endless=True)
    if write is not None:
        check_seconds("write_timeout", write, endless=True)


def tell_of_dropped(request: Request, job_id: str) -> None:
    """Say which headers a WSGI app is not given. One short line: it is the client's doing, not the worker's."""
    names = [name for name, _ in request.headers if "_" in name]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        which = ", ".join(repr(name[:40]) for name in names[:3])
        logger.info(
            "job %s: headers that hold an underscore are dropped: %s%s", job_id, which, more, extra={"job_id": job_id}
        )


def endless(timeout: float | None) -> float | None:
    """A timeout in seconds, infinity as None."""
    return None if timeout == math.inf else timeout
