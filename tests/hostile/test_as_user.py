"""The sandbox as root gives it, and as an ordinary user gives it, have different foundations: both are tried."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests are run by an ordinary user as it is")
def test_the_sandbox_of_an_ordinary_user() -> None:
    """S: all that tests/test_sandbox.py shows holds for a host without root's rights."""
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, "-m", "tests.hostile.as_user"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
