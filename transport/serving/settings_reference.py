"""The reference of all keys of `blastdoor.toml`, from the code: `scripts/reference` writes it to `docs/settings.md`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET

from runner.model.recycle import Recycle
from runner.model.retry import Retry
from runner.model.sandbox import Sandbox
from transport.serving.settings import MountSettings, PoolSettings, Settings, TrustedHeadersSettings

WORDS: Final = {
    "secret_file": "File with the secret that the front sends.",
    "secret_header": "Header that the secret comes in.",
    "kind": "How the app is called; auto finds out.",
    "factory": "Whether the app is what calling `app` gives.",
    "workers": "Worker processes: a number, or least:most, such as 2:16. Default: one per core.",
    "concurrency": "Jobs that a worker runs at once: for apps that are async, or wait. Default: 1.",
    "spares": "Warm workers beyond the demand.",
    "queue": "Requests that wait for a worker at most. Default: 100.",
    "queue_timeout": "Seconds that a request waits for a worker at most. Default: 10.",
    "per_provider": "Jobs of a provider that run at once at most: a table of numbers.",
    "timeout": "Seconds that a job may take; then 504.",
    "memory": "Memory of a worker with all that it has started, such as 512MiB.",
    "cpu_seconds": "Processor time that a job may take, in seconds.",
    "open_files": "Open files of a worker.",
    "sandbox": "What the app may reach: none, default, strict, or a table with a profile.",
    "preload": "true: import the app once for all workers; or a list of modules to import once.",
    "app_dir": "Directory that the app is looked for in first. Default: the working directory.",
    "spool_uploads": "WSGI: bodies of unknown length come as a whole with a length, up to this size, such as 64MiB.",
    "env": "The workers' environment, and nothing else. Default: this process's.",
    "set_env": "Variables to add to the workers' environment.",
    "recycle": "When a worker is replaced: a table.",
    "retry": "Which requests are done again where their worker dies before it answers: a table.",
    "deaths": "How often a request is done again.",
    "methods": "The methods of requests that are done again.",
    "grace": "Seconds that a handler has to end once its client has left.",
    "start_timeout": "Seconds that a worker has to start.",
    "debug": "For development: tell clients the tracebacks.",
    "cluster": "Address of the Ray cluster that the workers are on, or auto.",
    "app": "Import string of the app, such as shop:app. At the top of a file it is short for a mount at /.",
    "provider": "Send its requests to this provider's route.",
    "root": "Root of the providers' routes.",
    "source": "Where its requests come from, for logs and metrics; of trusted headers: the header with that.",
    "key_id": "Id of the API key that its requests act for; of trusted headers: the header with that id.",
    "attribution": "Further values that its handlers are told; of trusted headers: the headers with them.",
    "trusted_headers": "Headers of a front that tell whom a request acts for: a table.",
    "mounts": "A table of apps by their path.",
    "host": "Address to listen at.",
    "port": "Port to listen at, 0 for any.",
    "uds": "Unix socket to listen at instead.",
    "uds_mode": "Its permissions, such as 660. Default: by the umask.",
    "bind": "Addresses to listen at instead: HOST:PORT, or unix:PATH.",
    "tls_cert": "PEM file with the certificate and its chain, for HTTPS; SIGHUP reads it again.",
    "tls_key": "PEM file with its key. Default: the certificate's file.",
    "admin": "Address of status and metrics, or none.",
    "drain": "Seconds for requests under way at the end.",
    "reload": "For development: reload when a Python file changes.",
    "max_body": "Largest request body, such as 10MiB.",
    "body_timeout": "Seconds that a client may be waited for while it sends its body.",
    "send_timeout": "Seconds that a client may take nothing of its answer.",
    "connections": "Connections at most.",
    "trusted_proxies": "Addresses or networks of proxies whose X-Forwarded headers are believed, or *.",
    "fronts": "Processes that take requests, each with its part of the workers: a number, or auto: one for 8 cores.",
    "loop": "The event loop: asyncio, uvloop, or auto, which is uvloop where it is installed.",
    "chdir": "Directory to work in; a configuration file is looked for before.",
    "env_file": "File with variables for the workers (python-dotenv); what the environment has counts more.",
    "pid": "File for the server's pid; it goes when the server does.",
    "user": "User, by name or number, to be once the addresses are bound: for a start as root.",
    "group": "Group, by name or number. Default: the user's own.",
    "access_log": "Log each request.",
    "access_log_queries": "Log the query strings of requests.",
    "access_log_fields": "What is logged of a request, as name=value: fields, or headers such as header:user-agent.",
    "log_level": "What is logged.",
    "log_config": "TOML or JSON file for logging's dictConfig, which says all of logging.",
    "log_format": "How: text, or a JSON object a line.",
    "profile": "default or strict; it has to be said.",
    "path": "Directories that the app is looked for in first.",
    "readable": "Further paths that it may read.",
    "writable": "Further paths that it may write.",
    "connect": "TCP ports that it may connect to, on any host.",
    "connect_hosts": "Hosts by name that it may connect to, with a port, such as api.openai.com:443, by a proxy.",
    "processes": "Whether it may start processes.",
    "scratch": "Size of its scratch directory.",
    "threads": "Threads and processes of a worker at most.",
    "background_seconds": "Seconds that a job may go on after its response.",
    "require": "all: refuse to start where a layer can't be had; available: go without.",
    "protect_host": "Whether others are kept from this process's memory and environment.",
    "after_jobs": "After so many jobs.",
    "jitter": "Each worker's own number is up to this fraction larger.",
    "above_rss": "Above this resident memory, such as 300MiB.",
    "after_seconds": "After so many seconds.",
}
"""What each key means."""

_HEAD: Final = """# Settings

Every key of `blastdoor.toml`, or of `[tool.blastdoor]` in `pyproject.toml`. This page is made from the code
(`scripts/reference`). Keys of pools stand at the top of the file, for all mounts, or in a mount's own table, which
counts more. Variables count more than the file: `BLASTDOOR_` and the key in capitals, for all that is no table; `PORT`
and `WEB_CONCURRENCY`. Options of the command line count most: most keys have one, the same name with hyphens, which
`blastdoor serve --help` shows.
"""

_TABLES: Final[tuple[tuple[str, Any, frozenset[str]], ...]] = (
    ("The server", Settings, frozenset(PoolSettings.__struct_fields__)),
    ("Pools, at the top or in a mount", PoolSettings, frozenset()),
    ('Mounts: `[mounts."/path"]`', MountSettings, frozenset(PoolSettings.__struct_fields__)),
    ("`trusted_headers`", TrustedHeadersSettings, frozenset()),
    ("`sandbox`", Sandbox, frozenset()),
    ("`recycle`", Recycle, frozenset()),
    ("`retry`", Retry, frozenset()),
)


def reference() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for title, kind, left_out in _TABLES:
        parts.append(f"\n## {title}\n\n| key | takes | default | |\n| --- | --- | --- | --- |\n")
        parts += [
            f"| `{name}` | {takes} | {default} | {WORDS[name]} |\n"
            for name, takes, default in _keys(kind)
            if name not in left_out
        ]
    return "".join(parts)


def _keys(kind: Any) -> Iterator[tuple[str, str, str]]:
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    else:
        defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    for name, default in defaults.items():
        said = default not in (UNSET, msgspec.NODEFAULT, dataclasses.MISSING, None, "", ())
        yield name, " or ".join(dict.fromkeys(_kinds(hints[name]))), f"`{_shown(default)}`" if said else ""


def _shown(default: Any) -> str:
    """A default, as TOML would have it."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, frozenset):
        return json.dumps(sorted(default))  # a set has no order of its own
    return str(default)


_PLAIN: Final[dict[Any, str]] = {int: "number", float: "number", str: "text", bool: "true or false"}


def _kinds(hint: Any) -> Iterator[str]:
    """What may be given, in words."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif origin is Literal:
        yield from (f"`{value}`" for value in get_args(hint))
    elif origin in (list, tuple, Collection):
        yield "list"
    elif origin is dict or hint in (Sandbox, Recycle, Retry, TrustedHeadersSettings):
        yield "table"
    elif hint in _PLAIN:
        yield _PLAIN[hint]
