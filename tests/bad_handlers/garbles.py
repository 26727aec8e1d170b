"""Writes to its response pipe while it is imported."""

import os
from typing import Any

os.write(4, b"garbage")


def app(request: Any, response: Any) -> bytes:
    return b""
