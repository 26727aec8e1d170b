"""A handler that says how many jobs its process runs at this moment."""

from __future__ import annotations

import os
import time
from typing import Any

running = 0


def app(request: Any, response: Any) -> bytes:
    global running
    running += 1
    time.sleep(0.002)
    answer = f"{os.getpid()} {running}".encode()
    running -= 1
    return answer
