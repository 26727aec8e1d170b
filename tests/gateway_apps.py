"""Handlers that only make sense behind the gateway."""

from __future__ import annotations

import time

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
