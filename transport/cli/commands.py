"""The commands, their options and their exit codes. What they do is in the rooms beside this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from runner.errors import BlastdoorError, ConfigurationError, InvalidRequest
from runner.wire.messages import Kind
from runner.wire.printable import printable
from transport.errors import MissingIdentity, TargetEscapes
from transport.route import DEFAULT_ROOT

OK: Final = 0
FAULT: Final = 1
USAGE: Final = 2
"""Exit codes: it worked; the handler or its worker failed; what was asked for makes no sense."""


class _PlainFlags:
    """Shows no type for options that take no value, those of typer's own included."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc] # of a command
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    pass


class _Group(_PlainFlags, TyperGroup):
    pass


app = typer.Typer(
    name="blastdoor",
    cls=_Group,
    help="Run request handlers in worker processes that may crash without hurting you.",
    epilog="Exit codes: 0 it worked; 1 the handler or its worker failed; 2 what was asked for makes no sense.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _option(words: str, metavar: str | None = None, *names: str, least: float | None = None) -> Any:
    return typer.Option(*names, help=words, metavar=metavar, min=least, show_default=False)


Handler = Annotated[
    str, typer.Argument(help="Import string of the handler, such as `shop:app`.", metavar="APP", show_default=False)
]
HowCalled = Annotated[Kind | None, _option("How the app is called. [default: auto]")]
Factory = Annotated[bool | None, _option("The app is what calling APP gives.", "", "--factory")]
Seconds = Annotated[float | None, _option("Seconds that a job may take.", "SECONDS", least=0)]
Memory = Annotated[str | None, _option("Memory of a worker, such as 512MiB.", "SIZE")]
Profile = Annotated[Literal["none", "default", "strict"] | None, _option("What the app may reach. [default: none]")]


def _say_version(asked: bool) -> None:
    if asked:
        print(f"blastdoor {version('blastdoor')}")
        raise typer.Exit


LogFormat = Literal["text", "json"]
Loop = Literal["auto", "asyncio", "uvloop"]
LogLevel = Literal["debug", "info", "warning", "error"]


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, metavar="", help="Show the version and exit."),
    ] = False,
) -> None:
    pass


# Long by its options: their declarations are the help that users read.
@app.command(cls=_Command)
def serve(
    apps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH=]APP...",
            help="Apps, each with its mount: `shop:app`, or `/openai=app1:app /tools=app2:app`. "
            "Without any those of the configuration file.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, _option("TOML file; else blastdoor.toml, or [tool.blastdoor] in pyproject.toml.", "FILE")
    ] = None,
    workers: Annotated[str | None, _option("How many, or least:most. [default: one per core]", "N[:N]")] = None,
    concurrency: Annotated[int | None, _option("Jobs at once in each worker. [default: 1]", "N", least=1)] = None,
    cluster: Annotated[
        str | None, _option("Address of the Ray cluster that the workers are on, or auto.", "ADDRESS")
    ] = None,
    spares: Annotated[int | None, _option("Warm workers beyond the demand.", "N", least=0)] = None,
    timeout: Seconds = None,
    memory: Memory = None,
    cpu_seconds: Annotated[float | None, _option("Processor time that a job may take.", "SECONDS", least=0)] = None,
    sandbox: Profile = None,
    queue: Annotated[int | None, _option("Requests that wait at most. [default: 100]", "N", least=0)] = None,
    queue_timeout: Annotated[float | None, _option("How long they wait. [default: 10]", "SECONDS", least=0)] = None,
    per_provider: Annotated[
        list[str] | None, _option("Jobs of a provider that run at once at most. Repeatable.", "NAME=N")
    ] = None,
    retry: Annotated[
        int | None, _option("Do GET and HEAD so often again if their worker dies unanswered.", "N", least=0)
    ] = None,
    max_requests: Annotated[int | None, _option("Replace a worker after so many requests.", "N", least=1)] = None,
    max_requests_jitter: Annotated[
        int | None, _option("Up to so many more, by chance. [default: a tenth]", "N", least=0)
    ] = None,
    max_rss: Annotated[str | None, _option("Replace a worker above this memory, such as 300MiB.", "SIZE")] = None,
    max_age: Annotated[float | None, _option("Replace a worker that is so old.", "SECONDS", least=0)] = None,
    app_dir: Annotated[str | None, _option("Where the app is. [default: the working directory]", "DIR")] = None,
    chdir: Annotated[str | None, _option("Directory to work in.", "DIR")] = None,
    env_file: Annotated[str | None, _option("File with variables for the workers.", "FILE")] = None,
    pid: Annotated[str | None, _option("File for the server's pid.", "FILE")] = None,
    user: Annotated[str | None, _option("User to be after binding, for a start as root.", "USER")] = None,
    group: Annotated[str | None, _option("Group to be in. [default: the user's own]", "GROUP")] = None,
    preload: Annotated[list[str] | None, _option("To import once for all workers. Repeatable.", "MODULE")] = None,
    env: Annotated[
        list[str] | None, _option("Variable that the workers see, and no others. Repeatable.", "NAME[=VALUE]")
    ] = None,
    set_env: Annotated[
        list[str] | None, _option("Variable that the workers see as well. Repeatable.", "NAME[=VALUE]")
    ] = None,
    kind: HowCalled = None,
    factory: Factory = None,
    host: Annotated[str | None, _option("Address to listen at. [default: 127.0.0.1]", "HOST")] = None,
    port: Annotated[int | None, _option("Port to listen at, 0 for any. [default: 8000]", "PORT", least=0)] = None,
    uds: Annotated[str | None, _option("Unix socket to listen at instead.", "PATH")] = None,
    uds_mode: Annotated[str | None, _option("Its permissions, such as 660. [default: by the umask]", "MODE")] = None,
    bind: Annotated[
        list[str] | None, _option("HOST:PORT or unix:PATH to listen at. Repeatable.", "ADDRESS", "--bind", "-b")
    ] = None,
    tls_cert: Annotated[str | None, _option("Certificate for HTTPS, with its chain, as PEM.", "FILE")] = None,
    tls_key: Annotated[str | None, _option("Its key. [default: in the same file]", "FILE")] = None,
    admin: Annotated[
        str | None, _option("Where status and metrics are, or none. [default: 127.0.0.1:9180]", "HOST:PORT")
    ] = None,
    drain: Annotated[
        float | None, _option("Time for requests under way at the end. [default: 30]", "SECONDS", least=0)
    ] = None,
    max_body: Annotated[str | None, _option("Largest request body, such as 10MiB.", "SIZE")] = None,
    spool_uploads: Annotated[
        str | None, _option("WSGI: uploads of unknown length come whole, up to this, such as 64MiB.", "SIZE")
    ] = None,
    connections: Annotated[int | None, _option("Connections at most. [default: 1000]", "N", least=1)] = None,
    reload: Annotated[
        bool | None, _option("For development: reload when a Python file changes.", "", "--reload")
    ] = None,
    debug: Annotated[bool | None, _option("For development: tell clients the tracebacks.", "", "--debug")] = None,
    fronts: Annotated[
        str | None, _option("Processes that take requests, or auto: one for 8 cores. [default: 1]", "N")
    ] = None,
    loop: Annotated[Loop | None, _option("The event loop. [default: auto: uvloop if it is there]")] = None,
    access_log: Annotated[bool | None, _option("Log each request. [default: yes]", "")] = None,
    access_log_queries: Annotated[bool | None, _option("With query strings. [default: yes]", "")] = None,
    access_log_fields: Annotated[
        str | None, _option("What of a request, such as client,target,status,header:user-agent.", "FIELD,...")
    ] = None,
    log_level: Annotated[LogLevel | None, _option("What is logged. [default: info]")] = None,
    log_format: Annotated[LogFormat | None, _option("How: text, or an object a line. [default: text]")] = None,
    log_config: Annotated[str | None, _option("TOML or JSON file for logging's dictConfig instead.", "FILE")] = None,
) -> None:
    """Serve apps over HTTP, each request in a worker process.

    SIGTERM drains and ends, SIGHUP reloads the handlers without dropping a request. Settings come from variables too
    (BLASTDOOR_PORT and so on; PORT, WEB_CONCURRENCY), which count more than the file and less than options.
    """
    from transport.cli.serve import serve_until_stopped

    # typer's own record of the parameters has what click made of them: an empty list for what was not given.
    given = {name: value for name, value in locals().items() if name not in ("apps", "config", "serve_until_stopped")}
    with _explained():
        serve_until_stopped(apps or [], config, {name: value for name, value in given.items() if value is not None})


@app.command(cls=_Command)
def call(
    handler: Handler,
    method: Annotated[str, typer.Argument(help="Such as POST. [default: GET]", show_default=False)] = "GET",
    target: Annotated[
        str, typer.Argument(help="Path and query, such as /v1/models?limit=3. [default: /]", show_default=False)
    ] = "",
    data: Annotated[
        str | None, _option("The body; @FILE sends a file, @- standard input.", "DATA", "-d", "--data")
    ] = None,
    header: Annotated[
        list[str] | None, _option("Such as 'content-type: text/plain'. Repeatable.", "HEADER", "-H", "--header")
    ] = None,
    provider: Annotated[str, _option("Send it to this provider's mount, as a TransportFactory does.", "NAME")] = "",
    key: Annotated[str, _option("Id of the API key that it acts for, with --provider.", "ID")] = "",
    source: Annotated[str, _option("Where it comes from, for logs.", "NAME")] = "",
    root: Annotated[str, _option("Providers' root. [default: /api/v2/aibridge]", "PATH")] = DEFAULT_ROOT,
    root_path: Annotated[
        str, _option("The path that a web app lies under. [default: its provider's mount]", "PATH")
    ] = "",
    timeout: Seconds = None,
    memory: Memory = None,
    sandbox: Profile = None,
    kind: HowCalled = None,
    factory: Factory = None,
) -> None:
    """Do one round trip: head and log on stderr, the body on stdout as it comes."""
    from transport.cli.call import call_once

    if not target:
        method, target = ("GET", method) if method.startswith("/") else (method, "/")
    with _explained():
        call_once(
            handler,
            method,
            target,
            data,
            header or [],
            _route(provider, key, source, root),
            {
                "timeout": timeout,
                "kind": kind or "auto",
                "factory": bool(factory),
                "root_path": root_path,
                "memory": memory,
                "sandbox": sandbox or "none",
            },
        )


@app.command(cls=_Command)
def check(
    handler: Handler,
    kind: HowCalled = None,
    factory: Factory = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show all frames of what fails.", metavar="")] = False,
) -> None:
    """Load a handler in a worker, and say whether it can be called."""
    from transport.cli.call import check_handler

    with _explained():
        check_handler(handler, {"kind": kind or "auto", "factory": bool(factory), "debug": debug})


@app.command(cls=_Command)
def doctor() -> None:
    """Say what this machine can enforce of a sandbox, and what each profile would give."""
    from runner.sandbox.doctor import examine

    raise typer.Exit(examine())


@app.command(cls=_Command)
def top(
    url: Annotated[str, typer.Argument(help="The admin address of a `blastdoor serve`.")] = "http://127.0.0.1:9180",
    once: Annotated[bool, typer.Option("--once", help="Print it once and exit.", metavar="")] = False,
) -> None:
    """Watch a server's workers, requests and faults. In a pipe they are printed once."""
    from transport.cli.top import watch

    raise typer.Exit(watch(url, once=once or not sys.stdout.isatty()))


def _route(provider: str, key: str, source: str, root: str) -> tuple[Any, str] | None:
    from transport.route import Route

    if not provider:
        if key:
            raise typer.BadParameter("--key goes with --provider")
        return None
    with _explained():
        return Route(provider, source, root), key


@contextmanager
def _explained() -> Iterator[None]:
    """Errors as words on stderr and an exit code."""
    try:
        yield
    except (ConfigurationError, InvalidRequest, MissingIdentity, TargetEscapes) as error:
        print(f"blastdoor: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(USAGE) from error
    except BlastdoorError as error:
        print(f"blastdoor: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(FAULT) from error
