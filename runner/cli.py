"""The `blastdoor` command: try a handler from a terminal, isolated as it would be in an application."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from runner.errors import BlastdoorError, ConfigurationError, InvalidRequest
from runner.messages import KINDS, Header
from runner.pool import Pool
from runner.request import Body, Request

OK, FAULT, USAGE = 0, 1, 2
"""Exit codes: it worked; the handler or its worker failed; what was asked for makes no sense."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "doctor":
        from runner.sandbox.doctor import examine  # loaded where it is used

        return examine()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the handler is looked for here too
    try:
        with Pool(options.handler, kind=options.kind, workers=1) as pool:
            if options.command == "check":
                print(f"{options.handler}: loaded, and ready for requests")
                return OK
            return _call(pool, options)
    except (ConfigurationError, InvalidRequest) as error:
        print(f"blastdoor: {error}", file=sys.stderr)
        return USAGE
    except BlastdoorError as error:
        print(f"blastdoor: {error}", file=sys.stderr)
        return FAULT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blastdoor", description="Run request handlers in worker processes that may crash without hurting you."
    )
    parser.add_argument("--version", action="version", version=f"blastdoor {version('blastdoor')}")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="load a handler in a worker, and say whether it can be called")
    commands.add_parser("doctor", help="what this machine can enforce of a sandbox, and what each profile would give")
    call = commands.add_parser("call", help="one round trip; the body is printed as it comes")
    for command in (check, call):
        command.add_argument("handler", help="import string, package.module:attribute")
        command.add_argument("--kind", choices=KINDS, default="auto", help="how the handler is called (default: auto)")
    call.add_argument("method", help="such as GET")
    call.add_argument("target", help="path and query, such as /v1/models?limit=3")
    call.add_argument("-d", "--data", default=None, help="the request body; @FILE sends a file, @- standard input")
    call.add_argument("-H", "--header", action="append", default=[], help="such as 'content-type: text/plain'")
    call.add_argument("--timeout", type=float, default=None, help="seconds without any progress (default: no limit)")
    return parser


def _call(pool: Pool, options: argparse.Namespace) -> int:
    request = Request(options.method, options.target, [_header(text) for text in options.header], _body(options.data))
    with pool.open(request, read_timeout=options.timeout) as job:
        print(f"HTTP/1.1 {job.head.status} {job.head.reason}", file=sys.stderr)
        for name, value in job.head.headers:
            print(f"{name}: {value}", file=sys.stderr)
        print(file=sys.stderr, flush=True)
        for piece in job:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    return OK


def _header(text: str) -> Header:
    name, colon, value = text.partition(":")
    if not colon:
        raise InvalidRequest(f"header {text!r} has no colon: write it as 'name: value'")
    return name.strip(), value.strip()


def _body(data: str | None) -> Body:
    if data is None or not data.startswith("@"):
        return data
    try:
        return sys.stdin.buffer if data == "@-" else open(data[1:], "rb")
    except OSError as error:
        raise InvalidRequest(f"the body can't be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
