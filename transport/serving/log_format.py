"""Log records as JSON, one a line, with all that they carry."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_encode = msgspec.json.Encoder(enc_hook=str).encode


_mounts: dict[str, str] = {}


def know_mount(job_prefix: str, mount: str) -> Callable[[], object]:
    """What is told of jobs whose ids begin so is told of this mount; gives what ends that."""
    if job_prefix:
        _mounts[job_prefix] = mount
    return lambda: _mounts.pop(job_prefix, None)


def _mount_of(record: logging.LogRecord) -> str:
    return _mounts.get(getattr(record, "job_id", "").partition("-")[0], "")


def log_to_stderr(level: str, how: str) -> None:
    """Have all that is logged go to standard error, as text or as objects."""
    number = getattr(logging, level.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(how))
    logging.basicConfig(level=number, handlers=[handler])
    logging.getLogger("watchfiles").setLevel(max(number, logging.WARNING))


class TextFormatter(logging.Formatter):
    """Time, level and message, with the mount that it is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's line."""
        mount = _mount_of(record) if record.name == "blastdoor" else ""
        return f"{record.asctime} {record.levelname} {mount}{': ' if mount else ''}{record.message}"

    def usesTime(self) -> bool:  # noqa: N802
        """Always."""
        return True


class JSONFormatter(logging.Formatter):
    """A record as an object: time (RFC 3339, UTC), level, logger, message, and each attribute given with it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record on one line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {
            name: value for name, value in vars(record).items() if name not in _STANDARD and value not in ("", None)
        }
        if mount := _mount_of(record):
            told.setdefault("mount", mount)
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = record.stack_info
        return _encode(told).decode(errors="replace")


def make_formatter(kind: str) -> logging.Formatter:
    """How records are written: "text" or "json"."""
    return JSONFormatter() if kind == "json" else TextFormatter()
