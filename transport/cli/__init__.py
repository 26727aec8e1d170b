"""The `blastdoor` command. It needs typer, which the extra `cli` brings."""

from __future__ import annotations

import sys

from runner.extras import missing


def main() -> None:
    """Run the command that the terminal's user has typed."""
    try:
        from transport.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(f"blastdoor: {missing('the command', 'typer', 'serve')}", file=sys.stderr)
        sys.exit(2)
    app()
