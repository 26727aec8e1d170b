"""Kills the worker for the first requests that it begins."""

from __future__ import annotations

import mmap
import os
import signal
import time
from typing import Any


def app(request: Any, response: Any) -> bytes:
    body: bytes = request.body.read()
    with open(os.environ["BLASTDOOR_TEST_TRIES"], "ab", buffering=0) as tries:
        tries.write(b".")
        begun = tries.tell()
    if request.query == "head":
        response.write(b"begun")
    if request.query == "memory":
        block = mmap.mmap(-1, 200 << 20)
        block.write(b"x" * len(block))
        time.sleep(60)
    if request.query == "late":
        time.sleep(1.5)
    if begun <= int(os.environ["BLASTDOOR_TEST_DEATHS"]):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return f"{request.method} ".encode() + body
