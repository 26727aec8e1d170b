"""An LLM-like provider as a native handler: it streams tokens, and fails in every way on request.

The last segment of the path chooses: `completions` streams tokens as server-sent events; `segfault`,
`exit` and `raise` fail as they say.
"""

from __future__ import annotations

import ctypes
import json
import os
import time

from runner import HandlerRequest, HandlerResponse

TEXT = "A segfault in a worker is a 500 for its caller and nothing at all for the host ."
PAUSE = 0.08
"""Seconds between two tokens."""


def handler(request: HandlerRequest, response: HandlerResponse) -> None:
    """Answer one request."""
    name = request.path.rpartition("/")[2]
    if name == "segfault":
        ctypes.string_at(0)
    if name == "exit":
        os._exit(3)
    if name == "raise":
        raise LookupError("no such model")
    response.headers["content-type"] = "text/event-stream"
    response.write_header(200)
    for number, token in enumerate(TEXT.split()):
        time.sleep(PAUSE if number else 0)
        event = {"index": number, "token": token, "key": request.context.delegated_api_key_id}
        response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    response.write(b"data: [DONE]\n\n")
