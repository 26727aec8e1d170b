"""Handlers that only make sense behind the gateway."""

from __future__ import annotations

import time
from pathlib import Path

from runner import HandlerRequest, HandlerResponse


def connection_headers(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Headers that would be the client's connection's."""
    response.headers["connection"] = "close, x-named"
    response.headers["x-named"] = "1"
    response.headers["keep-alive"] = "timeout=5"
    response.headers["upgrade"] = "h2c"
    response.headers["x-kept"] = "1"
    return b"hello"


def hostile_words(request: HandlerRequest, response: HandlerResponse) -> None:
    """Says what would do harm as markup; or, at /wait, nothing for ever."""
    if request.path == "/wait":
        response.write_header(200)
        time.sleep(3600)
    raise ValueError("<img src=x onerror=\"document.title='taken'\"></pre><script>document.title='taken'</script>")


def by_and_by(request: HandlerRequest, response: HandlerResponse) -> None:
    """At /slow fifty bytes of known length, ten at a time, each once the file of its number is there."""
    if request.path != "/slow":
        response.write(b"hello")
        return
    response.headers["content-length"] = "50"
    for number in range(5):
        while number and not Path(request.query, str(number)).exists():
            time.sleep(0.002)
        response.write(b"%d" % number * 10)


def not_modified(request: HandlerRequest, response: HandlerResponse) -> None:
    """Tells how long the body is that it does not send (RFC 9110, 8.6)."""
    response.headers["content-length"] = "123"
    response.write_header(304)
