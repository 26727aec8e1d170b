"""What the server writes to the log beside requests: its mounts, and errors of the event loop, not too many."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from runner.model.limits import Limits, parse_size
from runner.model.sandbox import Sandbox
from transport.serving.settings import PoolSettings
from transport.serving.settings_parsing import parse_sandbox

if TYPE_CHECKING:
    from transport.serving.settings import MountSettings, Settings

logger = logging.getLogger("blastdoor")


class LoopErrors:
    """Tells of errors in the event loop, no more than one of a kind each second: a loop that is out of descriptors has
    thousands (accept(2), EMFILE)."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, error = context.get("message", "an error"), context.get("exception")
        now = loop.time()
        kind = f"{message} {type(error).__name__}"
        if now < self._next.get(kind, 0.0) or len(self._next) > 100:
            return
        self._next[kind] = now + 1.0
        short = isinstance(error, OSError)
        with contextlib.suppress(Exception):  # a handler's: it would come here again
            logger.error("%s: %s", message, error, exc_info=None if short or error is None else error)


def describe(mount: MountSettings, settings: PoolSettings) -> str:
    """What holds for a mount, in a line."""
    sandbox = settings.sandbox if isinstance(settings.sandbox, Sandbox) else parse_sandbox(settings.sandbox or "none")
    limits = Limits() if sandbox is None else sandbox.fill_in(Limits())
    memory = settings.memory or limits.memory
    said = [
        mount.app,
        f"workers {settings.workers or os.cpu_count() or 1}{_at_once(settings)}",
        "no sandbox" if sandbox is None else f"sandbox {sandbox.profile}",
        "memory unlimited" if not memory else f"memory {parse_size(memory) >> 20} MiB",
        f"timeout {settings.timeout:g} s" if settings.timeout else "no timeout",
    ]
    return ", ".join(said)


_ASGI_HINT: Final = (
    "an ASGI app has as many requests at once as there are workers, streams too; the others wait, and get a 503 after "
    "queue_timeout. Where it streams, or mostly waits, let each worker have several at once, as in --concurrency 64"
)


def log_serving(settings: Settings, kinds: Mapping[str, str], where: str) -> None:
    """What is served, as what, and where."""
    defaults = settings.defaults
    for path, mount in settings.all_mounts.items():
        pool = mount.with_defaults(defaults)
        logger.info("%s: %s", path, describe(mount, pool))
        if kinds.get(path) == "asgi" and not _at_once(pool):
            logger.warning("%s: %s", path, _ASGI_HINT)
    apps = ", ".join(f"{path} {mount.app}" for path, mount in settings.all_mounts.items())
    logger.info("serving %s at %s", apps, where)


def _at_once(settings: PoolSettings) -> str:
    return f" of {settings.concurrency} jobs at once" if settings.concurrency and settings.concurrency > 1 else ""
