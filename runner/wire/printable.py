"""What workers say, made fit to be shown: it must not drive a terminal, nor look like what others have said.

Text is cleaned once, where it enters the host. Log records that quote it have its lines indented, so that none of them
looks like a record of its own.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from .messages import FaultReport

_CONTROLS: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
_NOT_IN_NAMES: Final = re.compile(r"[^\w.<>]")
_INDENT: Final = "    "


def printable(text: str) -> str:
    """The text with control characters shown, not sent on; line breaks and tabs stay."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """The text with control characters shown, and line breaks and tabs as well."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def quoted(text: str) -> str:
    """Lines that somebody else has said, for the inside of a log record."""
    return _INDENT + printable(text).rstrip("\n").replace("\n", "\n" + _INDENT)


def clean_report(report: FaultReport) -> FaultReport:
    """A worker's report as it may be shown: the exception's name holds nothing but a name's characters."""
    return msgspec.structs.replace(
        report,
        exception=_NOT_IN_NAMES.sub("?", report.exception),
        message=printable(report.message),
        traceback=printable(report.traceback),
    )
