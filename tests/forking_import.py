"""A module whose import forks, and whose child returns."""

import os
from typing import Any

IS_CHILD = os.fork() == 0


def app(request: Any, response: Any) -> bytes:
    return b"child" if IS_CHILD else b"parent"
