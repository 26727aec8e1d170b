"""Where log records go, and how they look: as text, or as JSON, one a line, with all that they carry."""

from __future__ import annotations

import logging
import logging.config
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from runner.errors import ConfigurationError
from runner.wire.printable import one_line

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


def set_up_logging(level: str, how: str, config: str = "") -> None:
    """Have all that is logged go where a file says, in the form of dictConfig; else to standard error, as text or JSON.

    ConfigurationError where the file makes no sense. In it `disable_existing_loggers` is false where it is not set.
    """
    if config:
        _configure(config)
        return
    number = getattr(logging, level.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(how))
    logging.basicConfig(level=number, handlers=[handler])
    logging.getLogger("watchfiles").setLevel(max(number, logging.WARNING))


def _configure(file: str) -> None:
    try:
        text = Path(file).read_text(encoding="utf-8")
        told = tomllib.loads(text) if file.endswith(".toml") else msgspec.json.decode(text)
        if not isinstance(told, dict):
            raise ValueError("it is no table")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **told})
    except Exception as error:  # whatever a handler's class raises
        why = error if error.__cause__ is None else f"{error}: {error.__cause__}"
        raise ConfigurationError(f"log_config {file!r}: {one_line(str(why))}") from error


class TextFormatter(logging.Formatter):
    """Time, level and message, with the mount and the request that it is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's line."""
        mount = _mount_of(record) if record.name == "blastdoor" else ""
        request = getattr(record, "request_id", "") if record.name != "blastdoor.access" else ""
        about = f"{mount}{': ' if mount else ''}{f'request {request}: ' if request else ''}"
        return f"{record.asctime} {record.levelname} {about}{record.message}"

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
