"""Has the kernel reap its children, when it is imported."""

import os
import signal
from typing import Any

signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def app(request: Any, response: Any) -> bytes:
    if request.path == "/die":
        os._exit(1)
    return b"alive"
