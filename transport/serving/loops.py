"""Which event loop serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runner.errors import ConfigurationError
from runner.extras import missing


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop: with "auto" uvloop's where it is installed; None for asyncio's own.

    ConfigurationError where uvloop is asked for and not installed.
    """
    if name == "asyncio":
        return None
    try:
        import uvloop
    except ModuleNotFoundError as error:
        if name == "uvloop":
            raise ConfigurationError(missing("this event loop", "uvloop", "serve")) from error
        return None
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return make
