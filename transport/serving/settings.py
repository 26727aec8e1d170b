"""What `blastdoor serve` takes: from a TOML file, and from the command line, whose word counts.

A file has the same names as the command line's options, with an underscore for a hyphen. What stands at its top holds
for all mounts, unless a mount's own table says otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from runner.errors import ConfigurationError
from runner.model.durations import LONGEST
from runner.model.limits import Limits, parse_size
from runner.model.recycle import Recycle
from runner.model.retry import Retry
from runner.model.sandbox import Sandbox
from runner.pool import Pool
from runner.protocols import AnyPool
from runner.wire.messages import Kind
from transport.gateway.mounts import Mount, TrustedHeaders, plain_path
from transport.route import DEFAULT_ROOT, Route
from transport.serving.access_log import check_fields
from transport.serving.settings_parsing import parse_address, parse_bind, parse_mounts, parse_sandbox, parse_workers

QUEUE: Final = 100
"""How many requests wait for a worker at most, where nothing is said."""

QUEUE_TIMEOUT: Final = 10.0
"""How many seconds a request waits for a worker at most, where nothing is said."""

_LONGEST: Final = 86400.0
_MOST_FRONTS: Final = 256

FILES: Final = ("blastdoor.toml", "pyproject.toml")
"""Where the settings are looked for, in the working directory."""


class TrustedHeadersSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`transport.gateway.TrustedHeaders`, with the secret in a file of its own."""

    secret_file: str
    secret_header: str = "x-blastdoor-secret"
    key_id: str = "x-delegated-api-key-id"
    source: str = ""
    attribution: dict[str, str] = {}

    def made(self) -> TrustedHeaders:
        """With the secret, as it stands in its file now."""
        try:
            secret = Path(self.secret_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the secret of the trusted headers can't be read: {error}") from error
        return TrustedHeaders(
            secret=secret,
            secret_header=self.secret_header,
            key_id=self.key_id,
            source=self.source,
            attribution=self.attribution,
        )


class PoolSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings of one pool. What is not set is as at the top of the file, and else as `runner.Pool` has it."""

    kind: Kind | UnsetType = UNSET
    factory: bool | UnsetType = UNSET
    workers: int | str | UnsetType = UNSET
    concurrency: int | UnsetType = UNSET
    spares: int | UnsetType = UNSET
    queue: int | UnsetType = UNSET
    queue_timeout: float | UnsetType = UNSET
    per_provider: dict[str, int] | UnsetType = UNSET
    timeout: float | UnsetType = UNSET
    memory: int | str | UnsetType = UNSET
    cpu_seconds: float | UnsetType = UNSET
    open_files: int | UnsetType = UNSET
    sandbox: str | Sandbox | UnsetType = UNSET
    preload: bool | list[str] | UnsetType = UNSET
    app_dir: str | UnsetType = UNSET
    spool_uploads: int | str | UnsetType = UNSET
    set_env: dict[str, str] | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    recycle: Recycle | UnsetType = UNSET
    retry: Retry | UnsetType = UNSET
    grace: float | UnsetType = UNSET
    start_timeout: float | UnsetType = UNSET
    debug: bool | UnsetType = UNSET
    cluster: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        for name in ("timeout", "cpu_seconds"):
            value = getattr(self, name)
            if value is not UNSET and not 0 < value <= LONGEST:
                raise ConfigurationError(f"{name} is a time in seconds above zero, not {value!r}")

    def pool(self, app: str, root_path: str, label: str, drain: float | UnsetType = UNSET) -> AnyPool:
        """A pool with these settings, which is not started: on the cluster at `cluster`, where that is given.

        `drain` are the seconds that jobs have where their worker has to go.
        """
        limits = _given(
            memory=self.memory, wall_seconds=self.timeout, cpu_seconds=self.cpu_seconds, open_files=self.open_files
        )
        return _kind_of_pool(self.cluster)(
            app,
            path=[self._app_directory()],  # first, as `python -m` does; this process imports nothing from there
            root_path=root_path,
            workers=None if self.workers is UNSET else parse_workers(self.workers),
            queue=QUEUE if self.queue is UNSET else self.queue,
            queue_timeout=QUEUE_TIMEOUT if self.queue_timeout is UNSET else self.queue_timeout,
            limits=Limits(**limits),
            sandbox=None if self.sandbox is UNSET else parse_sandbox(self.sandbox),
            label=label,
            **_given(
                set_env=self.set_env,
                kind=self.kind,
                factory=self.factory,
                concurrency=self.concurrency,
                spares=self.spares,
                per_provider=self.per_provider,
                preload=self.preload,
                spool_uploads=self.spool_uploads,
                env=self.env,
                recycle=self.recycle,
                retry=self.retry,
                grace=self.grace,
                drain=drain,
                start_timeout=self.start_timeout,
                debug=self.debug,
            ),
        )

    def _app_directory(self) -> str:
        """Where the app is looked for first: absolute. ConfigurationError where there is no such directory."""
        directory = os.path.abspath(self.app_dir or ".")
        if not os.path.isdir(directory):
            raise ConfigurationError(f"app_dir: there is no directory {directory!r}")
        return directory


class MountSettings(PoolSettings, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One mount: the app, its pool, and for whom its requests act. With a `provider` requests go to its route."""

    app: str
    provider: str = ""
    root: str = DEFAULT_ROOT
    source: str = ""
    key_id: str = ""
    attribution: dict[str, str] = {}
    trusted_headers: TrustedHeadersSettings | None = None

    def mount(self, path: str, defaults: Mapping[str, Any], drain: float | UnsetType = UNSET) -> Mount:
        """The mount, with a pool that is not started. `drain` is as in `pool`."""
        route = Route(self.provider, self.source, self.root) if self.provider else None
        return Mount(
            self.pool_with(path, defaults, drain),
            route=route,
            source=self.source,
            key_id=self.key_id,
            attribution=self.attribution,
            trusted_headers=None if self.trusted_headers is None else self.trusted_headers.made(),
        )

    def pool_with(self, path: str, defaults: Mapping[str, Any], drain: float | UnsetType = UNSET) -> AnyPool:
        """A new pool for this mount, with what it does not say from `defaults`."""
        label = path
        if self.provider:
            path = Route(self.provider, self.source, self.root).mount
        try:
            return self.with_defaults(defaults).pool(self.app, "" if path == "/" else path, label, drain)
        except ConfigurationError as error:
            raise ConfigurationError(f"mount {label!r}: {error}") from error

    def with_defaults(self, defaults: Mapping[str, Any]) -> PoolSettings:
        """The settings of its pool. Variables that are added add to those of the defaults."""
        own = _given(**{name: getattr(self, name) for name in PoolSettings.__struct_fields__})
        if "set_env" in own:
            own["set_env"] = {**defaults.get("set_env", {}), **own["set_env"]}
        return PoolSettings(**{**defaults, **own})


class Settings(PoolSettings, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that is served, and where. `app` is short for a mount at "/"."""

    app: str = ""
    mounts: dict[str, MountSettings] = {}
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str = ""
    uds_mode: str = ""
    bind: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    admin: str = "127.0.0.1:9180"
    drain: float = 30.0
    reload: bool = False
    max_body: int | str | None = None
    body_timeout: float = 20.0
    send_timeout: float = 60.0
    connections: int = 1000
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    fronts: int | str = 1
    loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    chdir: str = ""
    env_file: str = ""
    pid: str = ""
    user: str = ""
    group: str = ""
    access_log: bool = True
    access_log_queries: bool = True
    access_log_fields: tuple[str, ...] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_config: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drain", "body_timeout", "send_timeout"):
            seconds = getattr(self, name)
            if not 0 <= seconds <= _LONGEST:
                raise ConfigurationError(f"{name} is a time in seconds, from 0 to {_LONGEST:g}, not {seconds!r}")
        if self.tls_key and not self.tls_cert:
            raise ConfigurationError("tls_key goes with tls_cert, the certificate and its chain")
        check_fields(self.access_log_fields)
        for address in self.bind:
            parse_bind(address)
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port is a number from 0 to 65535, not {self.port!r}")
        if self.uds_mode and re.fullmatch("0?[0-7]{3}", self.uds_mode) is None:
            raise ConfigurationError(f"uds_mode are permissions in octal digits, as in '660', not {self.uds_mode!r}")
        if self.fronts != "auto" and not (str(self.fronts).isdecimal() and 1 <= int(self.fronts) <= _MOST_FRONTS):
            raise ConfigurationError(f"fronts is a number from 1 to {_MOST_FRONTS}, or 'auto', not {self.fronts!r}")
        if self.connections < 1:
            raise ConfigurationError(f"connections is a number, 1 or more, not {self.connections!r}")

    @property
    def all_mounts(self) -> dict[str, MountSettings]:
        """The mounts by path. ConfigurationError where there is none."""
        mounts = dict(self.mounts)
        if self.app:
            if "/" in mounts:
                raise ConfigurationError("app is short for a mount at '/', and there is such a mount already")
            mounts["/"] = MountSettings(app=self.app)
        for path in mounts:
            plain_path(path)
        if not mounts:
            raise ConfigurationError(
                "there is nothing to serve: name an app, as in 'blastdoor serve shop:app', or mounts in blastdoor.toml"
            )
        return mounts

    @property
    def defaults(self) -> dict[str, Any]:
        """What the mounts' pools have in common."""
        return _given(**{name: getattr(self, name) for name in PoolSettings.__struct_fields__})

    @property
    def admin_address(self) -> tuple[str, int] | None:
        """Where the page of status is served; None for nowhere."""
        return None if self.admin in ("", "none") else parse_address(self.admin)

    @property
    def uds_permissions(self) -> int | None:
        """Who may connect to the unix socket; None for the umask's word."""
        return int(self.uds_mode, 8) if self.uds_mode else None

    @property
    def max_body_bytes(self) -> int | None:
        """The most bytes of a request's body."""
        return None if self.max_body is None else parse_size(self.max_body)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What variables say: BLASTDOOR_PORT and its like; PORT and WEB_CONCURRENCY as platforms set them.

    BLASTDOOR_APPS has the apps, separated by blanks; lists have commas. ConfigurationError for what makes no sense.
    """
    found: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        told = environ.get(f"BLASTDOOR_{name.upper()}", "") or environ.get(_USUAL.get(name, ""), "")
        if told and name not in _NOT_FROM_VARIABLES:
            found[name] = told.split(",") if name in _LISTS else told
    made = _made(found, Settings, "the environment: ", strict=False)
    settings = {name: getattr(made, name) for name in found}
    if apps := environ.get("BLASTDOOR_APPS", "").split():
        settings["mounts"] = parse_mounts(apps)
    return settings


def passed_over(environ: Mapping[str, str]) -> list[str]:
    """What to tell of variables that look like settings, and are none. They may be somebody else's.

    Those that Kubernetes sets for services, and Docker for links, are: of these nothing is told.
    """
    told = []
    known = [name for name in Settings.__struct_fields__ if name not in _NOT_FROM_VARIABLES]
    for variable, value in environ.items():
        name = variable.removeprefix("BLASTDOOR_").lower()
        if name == variable.lower() or name in known or name == "apps" or not value:
            continue
        if name.endswith("_name") or _OF_A_SERVICE.match(value):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.75)
        if name in _NOT_FROM_VARIABLES:
            told.append(f"{variable} is passed over: {name!r} is for a file, or the command line")
        elif near and near[0].count("_") == name.count("_") and len(name) > 3:
            told.append(f"{variable} is passed over: did you mean BLASTDOOR_{near[0].upper()}?")
    return told


_OF_A_SERVICE: Final = re.compile("(tcp|udp|sctp)://")
_LISTS: Final = frozenset({"preload", "trusted_proxies", "bind", "access_log_fields"})
_USUAL: Final = {"port": "PORT", "workers": "WEB_CONCURRENCY"}
_NOT_FROM_VARIABLES: Final = frozenset({"app", "mounts", "env", "set_env", "recycle", "per_provider", "retry"})


def load_settings(
    file: str | None, given: Mapping[str, Any], environ: Mapping[str, str] | None = None, directory: str = ""
) -> Settings:
    """The settings of a file, or of the first of FILES in this directory that has some, with what was `given` instead.

    Variables of `environ` stand between the two.

    Apps that are given take the place of all mounts of the file, and what is given of a pool holds for every mount.
    ConfigurationError names what is wrong, and where.
    """
    given = _with(from_environment(environ or {}), given)
    where, found = (file, _read(Path(directory, file))) if file is not None else _look_for(directory)
    check_keys(found, Settings, where)
    _with({}, found)
    if "mounts" in given:
        found.pop("app", None)
        found.pop("mounts", None)
    elif isinstance(mounts := found.get("mounts"), dict):
        pools = set(PoolSettings.__struct_fields__) & set(given)
        found["mounts"] = {path: _without(table, pools) for path, table in mounts.items()}
    mounts = {**(found.pop("mounts", None) or {}), **given.get("mounts", {})}
    made = {path: _made(table, MountSettings, f"{where}: mount {path!r}: ") for path, table in mounts.items()}
    settings = _made({**_with(found, given), "mounts": {}}, Settings, f"{where}: ")
    settings.mounts = made
    return settings


def _with(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, with those that count more: an address that is given stands in the place of all.

    ConfigurationError where these name addresses in both ways.
    """
    ways = [name for name in _ADDRESSES if name in given]
    if "bind" in ways and len(ways) > 1:
        raise ConfigurationError(f"bind names all addresses: leave out {', '.join(sorted({*ways} - {'bind'}))}")
    gone = () if not ways else ("uds", "bind", "host", "port") if "bind" in ways else ("bind",)
    return {**{name: value for name, value in before.items() if name not in gone}, **given}


_ADDRESSES: Final = ("bind", "host", "port", "uds")


def check_keys(table: object, kind: Any, where: str) -> None:
    """ConfigurationError for a key that means nothing, here or in a table within, with the near one that does."""
    if not isinstance(table, dict):
        return
    known = _keys_of(kind)
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where}: there is no {key!r}: {hint}")
        if key == "mounts":
            if not isinstance(value, dict):
                raise ConfigurationError(
                    f"{where}: mounts is a table of paths, each with a table such as app = 'shop:app'"
                )
            for path, mount in value.items():
                if not isinstance(mount, dict):
                    raise ConfigurationError(f"{where}: mount {path!r} is a table, as in {{ app = 'shop:app' }}")
                check_keys(mount, MountSettings, f"{where}: mount {path!r}")
        elif key in _TABLES:
            check_keys(value, _TABLES[key], f"{where}: {key}")
    if kind is Sandbox and "profile" not in table:
        raise ConfigurationError(f"{where}: a sandbox table says its profile, as in profile = 'default', or 'strict'")


_T = TypeVar("_T")
_TABLES: Final[dict[str, Any]] = {
    "sandbox": Sandbox,
    "recycle": Recycle,
    "retry": Retry,
    "trusted_headers": TrustedHeadersSettings,
}
_WORDS: Final = re.compile(r"Expected `(?P<wanted>.*)`, got `(?P<got>.*?)`")
_PLACE: Final = re.compile(r"(?P<words>.*?)(?: - at `\$\.?(?P<place>.*)`)?", re.DOTALL)


def _keys_of(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind.__struct_fields__)


def _made(table: Mapping[str, Any], kind: type[_T], where: str, *, strict: bool = True) -> _T:
    """A table as a struct. ConfigurationError says what is wrong, and in which key."""
    try:
        return msgspec.convert(table, kind, strict=strict)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}{error}") from error
    except msgspec.ValidationError as error:
        found = _PLACE.fullmatch(str(error))
        assert found is not None
        place, words = found["place"] or "", found["words"]
        if kinds := _WORDS.fullmatch(words):
            wanted = kinds["wanted"].replace(" | ", " or ").replace("null", "none").replace("object", "table")
            raise ConfigurationError(f"{where}{place or 'it'} takes {wanted}, not {kinds['got']}") from error
        if words.startswith("Object missing required field"):
            words = f"it has no {words.split('`')[1]!r}"
        raise ConfigurationError(f"{where}{place}{': ' if place else ''}{words}") from error


def _kind_of_pool(cluster: str | UnsetType) -> Callable[..., AnyPool]:
    """What makes a pool, here or on a cluster. ConfigurationError where Ray is not installed."""
    if cluster is UNSET or not cluster:
        return Pool
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it would print a C++ stack at each SIGTERM
    try:
        from runner.cluster import ClusterPool  # Ray is loaded where it is used
    except ImportError as error:
        raise ConfigurationError(str(error)) from error
    return functools.partial(ClusterPool, address=cluster)


def _look_for(directory: str) -> tuple[str, dict[str, Any]]:
    for name in FILES:
        if (path := Path(directory, name)).is_file() and (found := _read(path)):
            return name, found
    return "the command line", {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if path.name == "pyproject.toml":
        found: dict[str, Any] = content.get("tool", {}).get("blastdoor", {})
        return found
    return content


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not UNSET}


def _without(table: object, names: set[str]) -> object:
    return {name: value for name, value in table.items() if name not in names} if isinstance(table, dict) else table
