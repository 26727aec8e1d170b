"""A pool's settings: refused where they make no sense, when the pool is made; and the handler made portable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypedDict

from .errors import ConfigurationError
from .model.handler_spec import parse_handler_spec
from .model.limits import Limits
from .model.recycle import Recycle
from .model.sandbox import Profile, Sandbox
from .wire.messages import KINDS, Kind

PLAIN_ENVIRONMENT: Final = {"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"}
"""The environment of sandboxed workers, but for what `env` names, and the thread counts of numeric libraries."""


class PoolOptions(TypedDict, total=False):
    """The keyword arguments of `runner.Pool`, which `runner.cluster.ClusterPool` takes as well."""

    kind: Kind
    factory: bool
    workers: int | tuple[int, int] | None
    spares: int
    shrink_after: float
    queue: int | None
    queue_timeout: float | None
    per_provider: Mapping[str, int] | None
    overload: Literal["raise", "answer"]
    recycle: Recycle | None
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


def check_settings(kind: object, workers: object, env: Mapping[str, str] | None, root_path: object) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f"kind is one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigurationError(f"workers is a number of processes, 1 or more, not {workers!r}")
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in env.items())
    ):
        raise ConfigurationError("env is a mapping of str to str, or None to pass the host's environment on")
    for name, value in (env or {}).items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise ConfigurationError(f"env has a name that is none, or a NUL: {name!r}")
    if not isinstance(root_path, str) or (root_path and not root_path.startswith("/")):
        raise ConfigurationError(f"root_path is a path that begins with '/', or empty, not {root_path!r}")


def check_sandbox(sandbox: object) -> Sandbox | None:
    """A sandbox, or that of a profile by its name."""
    if sandbox is None or isinstance(sandbox, Sandbox):
        return sandbox
    if sandbox == "default" or sandbox == "strict":
        return Sandbox(profile=sandbox)
    raise ConfigurationError(f"sandbox is 'default', 'strict', or a runner.Sandbox, not {sandbox!r}")


def check_label(label: object) -> str:
    """A label, which may stand in a log and in a process title."""
    if not isinstance(label, str) or not label.isprintable() or len(label) > 200:
        raise ConfigurationError(f"label is a short printable text, not {label!r}")
    return label


def check_kinds(limits: object, recycle: object) -> None:
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigurationError(f"limits is a runner.Limits, as in Limits(memory='1GiB'), not {limits!r}")
    if recycle is not None and not isinstance(recycle, Recycle):
        raise ConfigurationError(f"recycle is a runner.Recycle, as in Recycle(after_jobs=1000), not {recycle!r}")


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


def check_admission(
    least: int, most: int, spares: object, queue: object, per_provider: Mapping[str, int] | None, overload: object
) -> None:
    if least > most:
        raise ConfigurationError(f"workers=({least}, {most}): the first is the least number, the second the most")
    for name, number in (("spares", spares), ("queue", queue)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
            raise ConfigurationError(f"{name} is a number, zero or more, not {number!r}")
    for provider, limit in (per_provider or {}).items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigurationError(f"per_provider[{provider!r}] is a number of jobs, 1 or more, not {limit!r}")
    if overload not in ("raise", "answer"):
        raise ConfigurationError(f"overload is 'raise' or 'answer', not {overload!r}")


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
