"""Runs the tests of the sandbox as an ordinary user, where they are run by root."""

from __future__ import annotations

import os
import sys

import pytest

from tests.hostile.driver import become_user

if __name__ == "__main__":
    become_user()
    os.environ["HOME"] = "/tmp"
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_sandbox.py", *sys.argv[1:]]))
