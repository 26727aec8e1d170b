"""What an agent has to tell its hosts: log records and events, kept until each host has heard them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Final

from .messages import LogEntry, encode_event

_MOST_NEWS: Final = 2000
_MOST_TOLD: Final = 4 * 1024 * 1024
"""Bytes, about, that are told at once."""

_LONGEST: Final = 256 * 1024
"""Characters of a record."""

logger = logging.getLogger("blastdoor")


class AgentOutbox(logging.Handler):
    """What an agent logs, and what happens to its workers, kept for its hosts to fetch; the oldest go first."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[tuple[int, LogEntry | bytes]] = deque(maxlen=_MOST_NEWS)
        self._number = 0
        self._mutex = threading.RLock()
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        extra = {
            name: str(value)
            for name in ("job_id", "provider", "source", "worker")
            if (value := getattr(record, name, None)) is not None
        }
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{logging.Formatter().formatException(record.exc_info)}"
        self._note(LogEntry(record.levelno, message[:_LONGEST], extra))

    def note_event(self, event: object) -> None:
        """An event of the pool."""
        data = encode_event(event)
        if data is not None:
            self._note(data)

    def since(self, seen: int) -> tuple[list[LogEntry], list[bytes], int]:
        """The records and events after number `seen`, and the number of the latest."""
        kept: list[LogEntry | bytes] = []
        room = _MOST_TOLD
        with self._mutex:
            latest = self._number
            for number, what in self._kept:
                if number > seen:
                    room -= len(what) if isinstance(what, bytes) else 4 * len(what.message) + 200
                    if room < 0 and kept:
                        latest = number - 1  # the rest is told next time
                        break
                    kept.append(what)
        records = [what for what in kept if isinstance(what, LogEntry)]
        return records, [what for what in kept if isinstance(what, bytes)], latest

    def _note(self, what: LogEntry | bytes) -> None:
        with self._mutex:
            self._number += 1
            self._kept.append((self._number, what))
