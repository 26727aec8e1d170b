"""The access log: a record for each request that is over, and for what was no request."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final

from runner.errors import ConfigurationError
from runner.wire.headers import is_token
from runner.wire.printable import one_line
from transport.gateway.finished import RequestFinished

logger = logging.getLogger("blastdoor.access")

FIELDS: Final = (
    "client",
    "method",
    "target",
    "status",
    "sent",
    "seconds",
    "job_id",
    "mount",
    "request_id",
    "whole",
)
"""What a record can tell, beside the request's headers."""

_HEADER: Final = "header:"
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")


def check_fields(fields: Sequence[str]) -> None:
    """ConfigurationError for a field that there is none of."""
    for field in fields:
        if field not in FIELDS and not (field.startswith(_HEADER) and is_token(field.removeprefix(_HEADER))):
            raise ConfigurationError(
                f"access_log_fields are {', '.join(FIELDS)}, or a header such as header:user-agent, not {field!r}"
            )


class AccessLog:
    """Logs requests: with these fields alone, as name=value, or where there are none, in the usual line with all.

    Without `queries` targets are logged without their query strings.
    """

    def __init__(self, fields: Sequence[str] = (), *, queries: bool = True) -> None:
        self._fields = [(field, field.removeprefix(_HEADER).lower()) for field in fields]
        self._queries = queries

    def __call__(self, finished: RequestFinished) -> None:
        """A request is over."""
        if not logger.isEnabledFor(logging.INFO):
            return
        told = {name: getattr(finished, name) for name in FIELDS}
        told["seconds"] = round(finished.seconds, 6)
        if not self._queries:
            told["target"] = finished.target.partition("?")[0]
        if self._fields:
            self._log_fields(finished, told)
        else:
            self._log_line(finished, told)

    def _log_fields(self, finished: RequestFinished, told: dict[str, object]) -> None:
        chosen: dict[str, object] = {}
        for field, name in self._fields:
            chosen[field] = told[field] if field in told else _header(finished, name)
        line = " ".join(f"{field}={_value(value)}" for field, value in chosen.items())
        logger.info("%s", line, extra=chosen)

    def _log_line(self, finished: RequestFinished, told: dict[str, object]) -> None:
        logger.info(
            '%s "%s %s" %s %d %.1f ms%s%s',
            shown(finished.client) or "-",
            shown(finished.method),
            shown(str(told["target"])),
            finished.status or "-",
            finished.sent,
            finished.seconds * 1000,
            f" job {finished.job_id}" if finished.job_id else "",
            "" if finished.whole else " cut off",
            extra=told,
        )


def log_refused(client: str, status: int, reason: str) -> None:
    """What was no request, or none that is taken, stands in the access log too."""
    extra = {"client": client, "status": status, "reason": reason}
    logger.info('%s "-" %d refused: %s', shown(client) or "-", status, one_line(reason), extra=extra)


def shown(text: str) -> str:
    """A client's word in the access log: it can neither end its field nor drive a terminal."""
    return one_line(text).replace("\\", "\\\\").replace('"', '\\"') if not text.isalnum() else text


def _header(finished: RequestFinished, name: str) -> str:
    return ", ".join(value for known, value in finished.headers if known == name)


def _value(value: object) -> str:
    """A value as it stands in a line: quoted where it could be taken for more than one."""
    if isinstance(value, bool):
        return str(value).lower()
    text = "-" if value in (None, "") else str(value)
    return text if _PLAIN.fullmatch(text) else f'"{shown(text)}"'
