"""A pool's options as groups, each checked where it is defined; and the handler made portable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, TypedDict

import msgspec

from .control.zygote_messages import ZygoteConfig
from .errors import ConfigurationError
from .model.durations import check_seconds
from .model.handler_spec import parse_handler_spec
from .model.limits import Limits, parse_size, share_cores
from .model.paths import check_paths
from .model.recycle import Recycle
from .model.retry import Retry
from .model.sandbox import Profile, Sandbox
from .supervision.leases import Admission
from .supervision.scaling import Size
from .wire.messages import KINDS, Kind

PLAIN_ENVIRONMENT: Final = {"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"}
"""The environment of sandboxed workers, but for what `env` names, and the thread counts of numeric libraries."""


MOST_LANES: Final = 4096
"""The most jobs that a worker may run at once."""


class PoolOptions(TypedDict, total=False):
    """The keyword arguments of `runner.Pool`, which `runner.cluster.ClusterPool` takes as well."""

    kind: Kind
    factory: bool
    workers: int | tuple[int, int] | None
    concurrency: int
    spares: int
    shrink_after: float
    queue: int | None
    queue_timeout: float | None
    per_provider: Mapping[str, int] | None
    overload: Literal["raise", "answer"]
    recycle: Recycle | None
    retry: Retry | None
    preload: bool | Sequence[str]
    env: Mapping[str, str] | None
    set_env: Mapping[str, str] | None
    path: Sequence[str]
    root_path: str
    spool_uploads: int | str | None
    limits: Limits | None
    sandbox: Sandbox | Profile | None
    grace: float
    drain: float
    start_timeout: float
    stop_timeout: float
    debug: bool
    label: str


class Queueing(msgspec.Struct, frozen=True, kw_only=True):
    """Who may wait for a worker, for how long (seconds), and what those get who may not. Checked when it is made."""

    queue: int | None = None
    queue_timeout: float | None = None
    per_provider: Mapping[str, int] = {}
    overload: Literal["raise", "answer"] = "raise"

    def __post_init__(self) -> None:
        if self.queue is not None:
            _check_number("queue", self.queue)
        check_seconds("queue_timeout", self.queue_timeout, optional=True, endless=True)
        for provider, limit in self.per_provider.items():
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise ConfigurationError(f"per_provider[{provider!r}] is a number of jobs, 1 or more, not {limit!r}")
        if self.overload not in ("raise", "answer"):
            raise ConfigurationError(f"overload is 'raise' or 'answer', not {self.overload!r}")

    def admission(self, size: Size) -> Admission:
        """What the leases of a pool of this size are told."""
        lanes = size.concurrency > 1
        jobs = size.most_jobs if size.spares or lanes else None
        leaving = size.most if lanes else None
        return Admission(jobs=jobs, leaving=leaving, queue=self.queue, per_provider=self.per_provider)


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """How long a pool waits for what, in seconds. Checked when it is made."""

    grace: float
    drain: float
    start_timeout: float
    stop_timeout: float

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            check_seconds(name, getattr(self, name))


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The environment variables of the workers: `env`, None for the host's, and `set_env` beside it.

    Checked when it is made.
    """

    env: Mapping[str, str] | None = None
    set_env: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        for env in (self.env, self.set_env):
            if env is not None and not (
                isinstance(env, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in env.items())
            ):
                raise ConfigurationError("env is a mapping of str to str, or None to pass the host's environment on")
            for name, value in (env or {}).items():
                if not name or "=" in name or "\0" in name or "\0" in value:
                    raise ConfigurationError(f"env has a name that is none, or a NUL: {name!r}")
        # What the caller does to its mapping later changes no pool.
        msgspec.structs.force_setattr(self, "env", None if self.env is None else dict(self.env))
        msgspec.structs.force_setattr(self, "set_env", dict(self.set_env))

    def of_workers(self, config: ZygoteConfig, most: int) -> dict[str, str]:
        """What up to so many workers of this configuration get, as the host's environment is now."""
        env, sandbox = self.env, config.sandbox
        if env is None or sandbox is not None:
            found = dict(os.environ) if sandbox is None else {**PLAIN_ENVIRONMENT, **(env or {})}
            share_cores(found, most, config.limits, preload=config.preload or bool(config.modules))
            env = found
        return {**env, **self.set_env}


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool itself goes by. What its zygote and workers go by is in their `ZygoteConfig`."""

    size: Size
    queueing: Queueing
    times: Times
    environment: Environment
    recycle: Recycle | None
    retry: Retry | None


def size_of(workers: int | tuple[int, int] | None, spares: int, shrink_after: float, concurrency: int = 1) -> Size:
    """The size of a pool from its options. ConfigurationError where it makes no sense."""
    if workers is None:
        workers = os.cpu_count() or 1
    least, most = workers if isinstance(workers, tuple) and len(workers) == 2 else (workers, workers)
    for number in (least, most):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigurationError(f"workers is a number of processes, 1 or more, not {number!r}")
    if least > most:
        raise ConfigurationError(f"workers=({least}, {most}): the first is the least number, the second the most")
    _check_number("spares", spares)
    check_seconds("shrink_after", shrink_after)
    return Size(least=least, most=most, spares=spares, shrink_after=shrink_after, concurrency=concurrency)


def _check_number(name: str, number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigurationError(f"{name} is a number, zero or more, not {number!r}")


def zygote_config(
    handler: object,
    *,
    kind: Kind,
    factory: bool,
    preload: bool | Sequence[str],
    path: Sequence[str],
    root_path: str,
    spool_uploads: int | str | None,
    limits: Limits | None,
    sandbox: Sandbox | Profile | None,
    grace: float,
    debug: bool,
    label: str,
    concurrency: int,
) -> ZygoteConfig:
    """What a pool's zygote and workers go by. ConfigurationError for what makes no sense."""
    if kind not in KINDS:
        raise ConfigurationError(f"kind is one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    if not isinstance(root_path, str) or (root_path and not root_path.startswith("/")):
        raise ConfigurationError(f"root_path is a path that begins with '/', or empty, not {root_path!r}")
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigurationError(f"limits is a runner.Limits, as in Limits(memory='1GiB'), not {limits!r}")
    sandbox = check_sandbox(sandbox)
    check_preload(preload, sandbox)
    limits = limits or Limits()
    check_concurrency(concurrency, kind, limits, sandbox)
    name, pickle = portable(handler)
    return ZygoteConfig(
        handler=name,
        pickle=pickle,
        kind=kind,
        factory=factory,
        debug=debug,
        label=check_label(label),
        preload=preload is True,
        path=list(check_paths("path", path)),
        modules=() if isinstance(preload, bool) else tuple(preload),
        root_path=root_path,
        limits=limits if sandbox is None else sandbox.for_lanes(concurrency).fill_in(limits),
        grace=grace,
        concurrency=concurrency,
        cpu_seconds_asked=limits.cpu_seconds is not None,
        sandbox=None if sandbox is None else sandbox.for_lanes(concurrency),
        spool_uploads=None if spool_uploads is None else parse_size(spool_uploads),
    )


def recycling(recycle: Recycle | None, sandbox: Sandbox | None) -> Recycle | None:
    """When workers are replaced: as told, and after each job of a strict sandbox."""
    if recycle is not None and not isinstance(recycle, Recycle):
        raise ConfigurationError(f"recycle is a runner.Recycle, as in Recycle(after_jobs=1000), not {recycle!r}")
    if sandbox is not None and sandbox.strictly:
        return replace(recycle or Recycle(), after_jobs=1)
    return recycle


def check_retry(retry: object) -> Retry | None:
    """Which requests are done again."""
    if retry is not None and not isinstance(retry, Retry):
        raise ConfigurationError(f"retry is a runner.Retry, as in Retry(deaths=1, methods={{'GET'}}), not {retry!r}")
    return retry


def check_sandbox(sandbox: object) -> Sandbox | None:
    """A sandbox, or that of a profile by its name."""
    if sandbox is None or isinstance(sandbox, Sandbox):
        return sandbox
    if sandbox == "default" or sandbox == "strict":
        return Sandbox(profile=sandbox)
    raise ConfigurationError(f"sandbox is 'default', 'strict', or a runner.Sandbox, not {sandbox!r}")


def check_concurrency(concurrency: object, kind: Kind, limits: Limits, sandbox: Sandbox | None) -> None:
    """How many jobs a worker runs at once, and whether that goes together with what else is asked for."""
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or not 1 <= concurrency <= MOST_LANES:
        raise ConfigurationError(f"concurrency is a number of jobs, from 1 to {MOST_LANES}, not {concurrency!r}")
    if concurrency == 1:
        return
    if sandbox is not None and sandbox.strictly:
        raise ConfigurationError(
            "the strict sandbox runs each job in a worker of its own: leave concurrency at 1, or take Sandbox.default()"
        )
    if kind == "asgi" and limits.cpu_seconds is not None:
        raise ConfigurationError(
            "cpu_seconds is a limit of each job, and the jobs of an ASGI app share one thread: "
            "leave it out (wall_seconds holds for each), or leave concurrency at 1"
        )


def check_label(label: object) -> str:
    """A label, which may stand in a log and in a process title."""
    if not isinstance(label, str) or not label.isprintable() or len(label) > 200:
        raise ConfigurationError(f"label is a short printable text, not {label!r}")
    return label


def check_preload(preload: object, sandbox: Sandbox | None) -> None:
    if isinstance(preload, bool):
        if preload and sandbox is not None:
            raise ConfigurationError(
                "preload=True would import the handler outside its sandbox: "
                "give a list of trusted modules that it needs, such as preload=['flask']"
            )
        return
    if isinstance(preload, str) or not all(isinstance(name, str) and name for name in preload):  # type: ignore[attr-defined]
        raise ConfigurationError(f"preload is True, False, or a list of modules' names, not {preload!r}")


def portable(handler: object) -> tuple[str, bytes | None]:
    """The handler as it is sent to the workers: its import string, or its name and its pickle by value."""
    if isinstance(handler, str):
        parse_handler_spec(handler)
        return handler, None
    if not callable(handler):
        raise ConfigurationError(
            f"the handler is a {type(handler).__name__}: give an import string such as 'package.module:attribute', "
            f"or a callable"
        )
    import dill

    try:
        pickle: bytes = dill.dumps(handler, recurse=True)
    except Exception as error:  # a pickle can fail with anything that a __reduce__ raises
        raise ConfigurationError(
            f"the handler can't be sent to the workers by value ({type(error).__name__}: {error}): "
            f"put it in a module and give its import string, 'package.module:attribute'"
        ) from error
    return getattr(handler, "__qualname__", type(handler).__qualname__), pickle
