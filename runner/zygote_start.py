"""How a zygote is started: its program, its first input, and the cap on what it says. Used by both ends."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import msgspec

from runner.messages import ZygoteConfig

_BOOTSTRAP: Final = """
import sys
paths = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
sys.path[:] = paths.decode('utf-8', 'surrogateescape').split('\\0')
del paths
from runner.zygote import main
main()
"""

MAX_MESSAGE: Final = 128 * 1024
"""The cap on a control message, in bytes; the socket keeps message boundaries (SOCK_SEQPACKET, unix(7))."""


def program(control_fd: int) -> list[str]:
    """The command of a zygote: this interpreter with this one's flags, told its control socket's descriptor."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", _BOOTSTRAP, str(control_fd)]


def preamble(sys_path: list[str], config: ZygoteConfig) -> bytes:
    """What a new zygote reads from its standard input: the host's `sys.path`, then its configuration."""
    paths = "\0".join(sys_path).encode("utf-8", "surrogateescape")
    return b"%d\n%b%b" % (len(paths), paths, msgspec.msgpack.encode(config))
