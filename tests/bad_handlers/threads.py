"""Starts a thread when it is imported."""

import threading
import time
from typing import Any

threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def app(request: Any, response: Any) -> bytes:
    return b"threaded"
