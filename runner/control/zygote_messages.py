"""What a pool and its zygote tell each other, as typed data: the configuration, orders and news.

msgspec structs, checked field by field on decoding. Nothing here is ever pickled.
"""

from __future__ import annotations

import signal
from typing import Final

import msgspec

from ..model.limits import Limits
from ..model.sandbox import Sandbox
from ..wire.messages import Kind

MAX_MESSAGE: Final = 128 * 1024
"""The cap on a control message, in bytes; the socket keeps message boundaries (SOCK_SEQPACKET, unix(7))."""


class ZygoteConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a zygote is told once, on its standard input. The handler is an import string, or a dill pickle.

    `grace` is the pool's grace time in seconds, which the workers have a share of for asking before they insist.
    `modules` are imported in the zygote, once for all workers. `path` are the directories that the pool's owner wants
    the app looked for in; and once a zygote is told, the whole `sys.path` of its workers, of which one with a sandbox
    takes only what is trusted. `taken` are names of this project's that the app has modules of its own for.
    `spool_uploads` is the most bytes of a body without a length that a WSGI app's worker takes before it calls it.
    `concurrency` is how many lanes a worker may have. `cpu_seconds_asked` says that the pool's owner has set that
    limit; else it may be a sandbox's, and holds where there are threads. `within` is told once a zygote is: the pools
    that it lies within, its own the last, as `nested_pools` has it.
    """

    handler: str
    pickle: bytes | None
    kind: Kind
    preload: bool
    modules: tuple[str, ...]
    path: list[str]
    root_path: str
    limits: Limits
    grace: float
    sandbox: Sandbox | None
    label: str = ""
    factory: bool = False
    debug: bool = False
    taken: list[str] = []
    spool_uploads: int | None = None
    concurrency: int = 1
    cpu_seconds_asked: bool = False
    within: list[str] = []

    @property
    def by_name(self) -> bool:
        """Whether the handler is imported, not sent by value."""
        return self.pickle is None


class Spawn(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Host to zygote, with a worker's ends: request pipe, response pipe, stdout, stderr, line."""

    worker: int


class Born(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host, with the worker's pidfd."""

    worker: int
    pid: int


class Died(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: a worker was reaped. `status` is its exit code, or minus the signal that ended it, if known."""

    worker: int
    status: int | None


class Stopped(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: a worker was stopped, as by SIGSTOP."""

    worker: int


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: it can't do what it is for, and why."""

    why: str


class MissingLayers(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: layers of the sandbox that this machine can't give, and that it was told to go without."""

    layers: list[str]


class Noted(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Zygote to host: what whoever started the pool should know."""

    lines: list[str]


News = Born | Died | Stopped | Failed | MissingLayers | Noted
"""What a zygote tells its host."""


def describe_exit(status: int | None) -> tuple[str, int | None, str | None]:
    """A sentence part, the exit code and the signal's name for an exit status as `Died` carries it."""
    if status is None:
        return "ended, and its exit status is not known", None, None
    if status >= 0:
        return f"exited with code {status}", status, None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}", None, name
