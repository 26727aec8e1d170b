"""What may come next from a worker: one job's response as a state table, with no I/O.

A worker's frames are hostile input. `ResponseExchange` takes the frames of one job and keeps what is
known: the head once it came, the body bytes not yet read, and how the response ended. Any frame that
the table does not allow, that carries another job's number, or whose content does not hold up, is a
violation: the driver kills the worker.

The body is held to what HTTP says of its head (RFC 9110, 6.4.1 and 8.6): none after HEAD, 204 and 304,
and no more and no less than an announced Content-Length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import IntEnum, auto

import msgspec

from .frames import (
    BODY,
    BUSY,
    END,
    FAULT,
    HEAD,
    IDLE,
    INVALID,
    PRINTED,
    Frame,
)
from .headers import check_headers, check_phrase, content_length
from .messages import FaultReport, Header, ResponseHead
from .printable import clean_report


class State(IntEnum):
    """Where a job's response stands."""

    HEAD_EXPECTED = auto()
    BODY_EXPECTED = auto()
    IDLE_EXPECTED = auto()
    TAIL_EXPECTED = auto()
    ENDED = auto()
    FAULTED = auto()
    BROKEN = auto()


NEXT: dict[State, dict[int, State]] = {
    State.HEAD_EXPECTED: {HEAD: State.BODY_EXPECTED, FAULT: State.FAULTED},
    State.BODY_EXPECTED: {BODY: State.BODY_EXPECTED, END: State.ENDED, FAULT: State.FAULTED},
    State.IDLE_EXPECTED: {IDLE: State.ENDED, FAULT: State.FAULTED},
    State.TAIL_EXPECTED: {BODY: State.TAIL_EXPECTED, END: State.ENDED, FAULT: State.FAULTED},
    State.ENDED: {},
    State.FAULTED: {},
    State.BROKEN: {},
}

_decode_head = msgspec.msgpack.Decoder(ResponseHead).decode
_decode_report = msgspec.msgpack.Decoder(FaultReport).decode


def _passed_on(headers: list[Header], status: int, length: int | None) -> list[Header]:
    """The headers that leave the pipe.

    The pipe has its own framing: RFC 9112, 7 makes Transfer-Encoding a matter of each hop. RFC 9110, 8.6 allows a 204
    no Content-Length. Others have it once, in one form: readers down the line may differ in `05` (RFC 9110, 8.6).
    """
    lengths = hops = 0
    same = True
    for name, value in headers:
        size = len(name)
        if size == 14:
            if name.lower() == "content-length":
                lengths += 1
                same = value == str(length)
        elif size == 17 and name.lower() == "transfer-encoding":
            hops += 1
    if not hops and (not lengths or (lengths == 1 and same and status != 204)):
        return headers
    plain = [pair for pair in headers if pair[0].lower() not in ("transfer-encoding", "content-length")]
    if status == 204 or length is None:
        return plain
    return (
        [*plain, ("content-length", str(length))]
        if lengths != 1 or not same
        else [pair for pair in headers if pair[0].lower() != "transfer-encoding"]
    )


class ResponseExchange:
    """The response of job number `job` to a request with this method, as far as it has come.

    `violation` says what the worker did wrong: in the state BROKEN, or after the end of a response that is
    whole. `report` is set when the state is FAULTED. `printed` tells that the handler has printed something, `whole`
    that the response came to its end, whatever became of the background work after it, `surplus` that its body was
    longer than its Content-Length, and was cut off there.
    """

    __slots__ = (
        "_left",
        "_method",
        "body",
        "head",
        "job",
        "printed",
        "report",
        "state",
        "surplus",
        "violation",
        "whole",
    )

    def __init__(self, job: int, method: str) -> None:
        self.job = job
        self._method = method
        self._left: int | None = None
        self.surplus = False
        self.state = State.HEAD_EXPECTED
        self.head: ResponseHead | None = None
        self.body: deque[bytes] = deque()
        self.report: FaultReport | None = None
        self.printed = False
        self.violation = ""
        self.whole = False

    @classmethod
    def of_background(cls, job: int) -> ResponseExchange:
        """What is still to come of a job whose response is whole: the end of its background work."""
        exchange = cls(job, "")
        exchange.state = State.IDLE_EXPECTED
        exchange.whole = True
        return exchange

    @classmethod
    def of_end(cls, job: int) -> ResponseExchange:
        """Nothing more is to come of a job's response: only the rest of its request is to be sent."""
        exchange = cls(job, "")
        exchange.state = State.ENDED
        exchange.whole = True
        return exchange

    @classmethod
    def of_tail(cls, job: int) -> ResponseExchange:
        """What is still to come of a job whose body is complete: whatever there is, its end."""
        exchange = cls(job, "HEAD")  # further bytes are nobody's
        exchange.state = State.TAIL_EXPECTED
        exchange.whole = True
        return exchange

    def conclude(self) -> None:
        """The body is complete: what is still to come is no part of the response."""
        self.state = State.ENDED
        self.whole = True

    @property
    def complete(self) -> bool:
        """Whether the body has all the bytes that its head tells of, and the worker has not ended it yet."""
        return self.state is State.BODY_EXPECTED and (self._left == 0 or self._bodyless)

    @property
    def open(self) -> bool:
        """Whether more of the response may come."""
        return self.state is State.HEAD_EXPECTED or self.state is State.BODY_EXPECTED

    @property
    def awaits_head(self) -> bool:
        """Whether the head is still to come."""
        return self.state is State.HEAD_EXPECTED

    @property
    def unfinished(self) -> bool:
        """Whether more frames may come: of the response, or at the end of the background work."""
        return bool(NEXT[self.state])

    @property
    def background(self) -> bool:
        """Whether the response is whole, and the worker is not done with the job."""
        return self.state is State.IDLE_EXPECTED or self.state is State.TAIL_EXPECTED

    @property
    def sound(self) -> bool:
        """Whether it has ended as it should, in every respect, and nothing is to be seen to but what follows."""
        return (
            self.state is State.ENDED
            and self.whole
            and not (self._left or self.violation or self.surplus or self.printed)
            and self.report is None
        )

    @property
    def missing(self) -> int:
        """How many bytes the body that has come lies short of its Content-Length."""
        return 0 if self._bodyless else self._left or 0

    @property
    def _bodyless(self) -> bool:
        return self._method == "HEAD" or (self.head is not None and self.head.status in (204, 304))

    def receive(self, frames: Iterable[Frame]) -> None:
        """Take the next frames. Never raises: a violation ends in the state BROKEN."""
        for kind, job, payload in frames:
            moves = NEXT[self.state]
            if not moves:
                self.violation = "frames after the end of the response"
                return
            if kind == INVALID:
                self._break(payload.decode())
                return
            state = moves.get(kind)
            if state is None:
                self._break(f"frame of kind {kind} where none such may come (state {self.state.name})")
                return
            if job != self.job:
                self._break(f"frame of job number {job} in the middle of job number {self.job}")
                return
            if kind == BODY:
                self._receive_body(payload)
            elif kind in (END, IDLE):
                flags = payload[0] if payload else 0
                self.whole = True
                self.printed |= bool(flags & PRINTED)
                if kind == END and flags & BUSY:
                    state = State.IDLE_EXPECTED
            elif kind == HEAD:
                if not self._receive_head(payload):
                    return
            elif kind == FAULT:
                self.whole |= self.complete  # what failed is no part of the response
                if not self._receive_report(payload):
                    return
            self.state = state

    def _receive_head(self, payload: bytes) -> bool:
        try:
            head = _decode_head(payload)
            if head.phrase is not None:
                check_phrase(head.phrase)
            headers = head.headers
            check_headers(headers)
            self._left = length = content_length(headers)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
            self._break(f"response head that does not hold up: {error}")
            return False
        passed_on = _passed_on(headers, head.status, length)
        self.head = head if passed_on is headers else ResponseHead(head.status, passed_on, head.phrase)
        return True

    def _receive_body(self, data: bytes) -> None:
        if self._bodyless:
            return
        if self._left is not None:
            if len(data) > self._left:
                self.surplus = True
                data = data[: self._left]
            self._left -= len(data)
        if data:
            self.body.append(data)

    def _receive_report(self, payload: bytes) -> bool:
        try:
            report = _decode_report(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._break(f"fault report that does not hold up: {error}")
            return False
        if report.kind == "aborted" and self.head is None and not self.background:
            self._break("a response that was cut off before its head")
            return False
        self.report = clean_report(report)
        self.printed |= report.printed
        return True

    def _break(self, why: str) -> None:
        self.state = State.BROKEN
        self.violation = why
