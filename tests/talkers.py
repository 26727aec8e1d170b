"""A handler that says something on each of its streams."""

import os
import sys
from typing import Any


def app(request: Any, response: Any) -> bytes:
    print("said on stdout")
    print("said on stderr", file=sys.stderr)
    os.write(2, b"said past Python\n")
    return b""
