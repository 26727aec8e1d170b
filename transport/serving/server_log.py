"""What the server writes to the log: requests, refusals, mounts, and errors of the event loop that say nothing."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from runner.model.limits import Limits, parse_size
from runner.model.sandbox import Sandbox
from runner.wire.printable import one_line
from transport.gateway import RequestFinished
from transport.serving.settings import PoolSettings
from transport.serving.settings_parsing import parse_sandbox

if TYPE_CHECKING:
    from transport.serving.settings import MountSettings, Settings

logger = logging.getLogger("blastdoor")


access_logger = logging.getLogger("blastdoor.access")


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
        logger.error("%s: %s", message, error, exc_info=None if short or error is None else error)


def shown(text: str) -> str:
    """A client's word in the access log: it can neither end its field nor drive a terminal."""
    return one_line(text).replace("\\", "\\\\").replace('"', '\\"') if not text.isalnum() else text


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


def log_refused(client: str, status: int, reason: str) -> None:
    """What was no request, or none that is taken, stands in the access log too."""
    extra = {"client": client, "status": status, "reason": reason}
    access_logger.info('%s "-" %d refused: %s', shown(client) or "-", status, one_line(reason), extra=extra)


def log_access(answered: RequestFinished, *, queries: bool = True) -> None:
    asked = answered.target if queries else answered.target.partition("?")[0]
    target = shown(asked)
    access_logger.info(
        '%s "%s %s" %s %d %.1f ms%s%s',
        shown(answered.client) or "-",
        shown(answered.method),
        target,
        answered.status or "-",
        answered.sent,
        answered.seconds * 1000,
        f" job {answered.job_id}" if answered.job_id else "",
        "" if answered.whole else " cut off",
        extra={
            "job_id": answered.job_id,
            "mount": answered.mount,
            "request_id": answered.request_id,
            "client": answered.client,
            "method": answered.method,
            "target": asked,
            "status": answered.status,
            "sent": answered.sent,
            "seconds": round(answered.seconds, 6),
            "whole": answered.whole,
        },
    )


def _at_once(settings: PoolSettings) -> str:
    return f" of {settings.concurrency} jobs at once" if settings.concurrency and settings.concurrency > 1 else ""
