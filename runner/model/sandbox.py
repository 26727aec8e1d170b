"""A sandbox as a user describes it: what the handler's code is granted; everything else it has not."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypedDict, Unpack

from ..errors import ConfigurationError
from .durations import check_seconds
from .limits import Limits, parse_size
from .paths import check_paths

_HOST: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")

Profile = Literal["default", "strict"]
Require = Literal["all", "available"]


class SandboxOptions(TypedDict, total=False):
    """The keyword arguments of `Sandbox.default` and `Sandbox.strict`."""

    path: Iterable[str | os.PathLike[str]]
    readable: Iterable[str | os.PathLike[str]]
    writable: Iterable[str | os.PathLike[str]]
    connect: Iterable[int]
    connect_hosts: Iterable[str]
    processes: bool
    scratch: int | str | None
    memory: int | str | None
    cpu_seconds: float | None
    open_files: int
    threads: int
    background_seconds: float | None
    require: Require
    protect_host: bool


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What the workers of a pool may reach. Made by `Sandbox.default` or `Sandbox.strict`.

    The interpreter, its packages and the app's own directory can be read, and a private scratch directory, which is
    also HOME and TMPDIR, written; nothing of the host's environment is there but what the pool's `env` names.

    `path` are directories that the handler's modules are looked for in, before the host's `sys.path`: for code that the
    host itself must never import. Of a handler's package only that is granted, of what lies beside it nothing; a single
    module's folder is granted whole. `readable` and `writable` are further paths, each with all below it.

    `connect` are the TCP ports that may be connected to, on any host. `connect_hosts` are hosts by name with a port,
    such as "api.openai.com:443", and nothing else: a proxy of the pool's own leads there, whose URL stands in
    HTTPS_PROXY. With neither there is no network at all.

    `processes` says whether the handler may start processes, and execute what it can read. `scratch` is the size of the
    scratch directory, None for none.
    `memory`, `cpu_seconds` and `open_files` hold where the pool's `limits` say nothing, `threads` bounds how many
    threads and processes a worker has. `background_seconds` is how long a job may go on after its response.

    `require="all"` refuses to start where the machine can't give a layer of the profile; "available" goes without it,
    and says so in the log. `protect_host` makes the host process undumpable (prctl(2)), which keeps others of its user
    from its memory and environment, and a debugger as well.

    Raises ConfigurationError for what makes no sense.
    """

    profile: Profile = "default"
    path: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    connect: tuple[int, ...] = ()
    connect_hosts: tuple[str, ...] = ()
    processes: bool = False
    scratch: int | str | None = "64MiB"
    memory: int | str | None = "1GiB"
    cpu_seconds: float | None = 60.0
    open_files: int = 256
    threads: int = 64
    background_seconds: float | None = 60.0
    require: Require = "all"
    protect_host: bool = True

    @classmethod
    def default(cls, **settings: Unpack[SandboxOptions]) -> Sandbox:
        """For code that may be hostile, at nearly no cost: workers are warm, and serve one job after the other."""
        return cls(profile="default", **settings)  # type: ignore[arg-type] # paths and ports are made tuples

    @classmethod
    def strict(cls, **settings: Unpack[SandboxOptions]) -> Sandbox:
        """`default`, namespaces of its own, an allow-list of system calls, and a new worker for each job."""
        return cls(profile="strict", **settings)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.profile not in ("default", "strict"):
            raise ConfigurationError(f"a sandbox is 'default' or 'strict', not {self.profile!r}")
        if self.require not in ("all", "available"):
            raise ConfigurationError(f"require is 'all' or 'available', not {self.require!r}")
        for name in ("path", "readable", "writable"):
            paths = check_paths(name, getattr(self, name))
            for path in paths:
                if path in ("/", "/tmp"):
                    raise ConfigurationError(
                        f"{name}: {path!r} would grant what is others': name what the handler needs"
                    )
            object.__setattr__(self, name, paths)
        object.__setattr__(self, "connect", tuple(self.connect))
        for port in self.connect:
            if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
                raise ConfigurationError(f"connect are TCP ports, from 1 to 65535, not {port!r}")
        given: object = self.connect_hosts
        if isinstance(given, str):
            raise ConfigurationError(f"connect_hosts is a list of hosts, as in [{given!r}]")
        hosts = []
        for entry in self.connect_hosts:
            try:
                host, port = parse_host(entry)
            except (ValueError, AttributeError):
                raise ConfigurationError(
                    f"connect_hosts are hosts by name, with a port, such as 'api.openai.com:443', not {entry!r}"
                ) from None
            hosts.append(f"{host}:{port}")
        object.__setattr__(self, "connect_hosts", tuple(hosts))
        if hosts and self.connect:
            raise ConfigurationError("connect opens ports on any host: leave it out, or leave out connect_hosts")
        if self.scratch is not None:
            object.__setattr__(self, "scratch", parse_size(self.scratch))
            if parse_size(self.scratch) < 1 << 16:
                raise ConfigurationError("scratch is the size of a directory, 64 KiB or more, or None")
        check_seconds("background_seconds", self.background_seconds, optional=True)
        for name in ("open_files", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 16:
                raise ConfigurationError(f"{name} of a sandbox is a number, 16 or more, not {value!r}")

    @property
    def has_network(self) -> bool:
        """Whether its workers may make sockets at all."""
        return bool(self.connect or self.connect_hosts)

    @property
    def strictly(self) -> bool:
        """Whether this is the strict profile."""
        return self.profile == "strict"

    @property
    def scratch_bytes(self) -> int | None:
        """The size of the scratch directory in bytes."""
        return None if self.scratch is None else parse_size(self.scratch)

    def for_lanes(self, lanes: int) -> Sandbox:
        """The same, with a thread for each further lane of a worker beside the handler's own."""
        return dataclasses.replace(self, threads=self.threads + lanes - 1)

    def fill_in(self, limits: Limits) -> Limits:
        """The limits of a pool, with the sandbox's own where these say nothing."""
        return dataclasses.replace(
            limits,
            memory=self.memory if limits.memory is None else limits.memory,
            cpu_seconds=self.cpu_seconds if limits.cpu_seconds is None else limits.cpu_seconds,
            open_files=self.open_files if limits.open_files is None else limits.open_files,
        )


def parse_host(text: str) -> tuple[str, int]:
    """A host's name in small letters, without a dot at its end, and a port, of "name:port". ValueError for another.

    An address is no name, in none of the forms that inet_aton(3) takes: these end in a number.
    """
    host, _, port = text.rpartition(":")
    host = host.lower().removesuffix(".")
    last = host.rpartition(".")[2]
    if len(host) > 253 or _HOST.fullmatch(host) is None or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last) is not None:
        raise ValueError(f"{text!r} names no host")
    if _PORT.fullmatch(port) is None or int(port) > 65535:
        raise ValueError(f"{text!r} has no port")
    return host, int(port)
