"""What attacks may leave: the hosts under attack are processes of their own, which last for the module."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """W11: no child, descriptor or thread of this process; what the hosts have started is asked for by a test."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), psutil.Process().children()
    yield
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count(), psutil.Process().children()) == before
