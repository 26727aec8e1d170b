"""Which request, by its client's X-Request-ID, a log record is about."""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

from runner.wire.printable import one_line

_LONGEST: Final = 200
_ENDED: Final = 1000
"""How many ids are kept of jobs that have ended: what a worker has printed may be read later."""


class RequestIds(logging.Filter):
    """Gives log records that have a job's id that of the request as well; a filter for loggers."""

    def __init__(self) -> None:
        super().__init__()
        self._ids: dict[str, str] = {}
        self._ended: deque[str] = deque()

    def begin(self, job_id: str, request_id: str) -> None:
        """This job answers this request. The id is the client's word: it is shortened, and made fit to be shown."""
        self._ids[job_id] = one_line(request_id[:_LONGEST])

    def end(self, job_id: str) -> None:
        """The job has ended."""
        if job_id in self._ids:
            self._ended.append(job_id)
            if len(self._ended) > _ENDED:
                self._ids.pop(self._ended.popleft(), None)

    def filter(self, record: logging.LogRecord) -> bool:
        """Add what is known; every record passes."""
        job_id = getattr(record, "job_id", "")
        if job_id and (request_id := self._ids.get(job_id)):
            record.request_id = request_id
        return True
