"""A handler whose import opens a file, to be preloaded."""

from __future__ import annotations

import json
import os
from typing import Any

file = open(__file__, "rb")  # noqa: SIM115
imported_by = os.getpid()


def app(request: Any, response: Any) -> bytes:
    read = os.pread(file.fileno(), 20, 0).decode()
    descriptors = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    with open(__file__) as again:
        expected = again.read(20)
    return json.dumps(
        {
            "read": read,
            "expected": expected,
            "descriptors": descriptors,
            "imported_by": imported_by,
            "pid": os.getpid(),
        }
    ).encode()
