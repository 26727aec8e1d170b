"""runner.wire.exchange: what may come next, to the last branch."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runner.jobs.failures import response_failure
from runner.wire.exchange import NEXT, ResponseExchange, State
from runner.wire.frames import (
    BODY,
    BUSY,
    END,
    FAULT,
    HEAD,
    IDLE,
    INVALID,
    PRINTED,
    READY,
    Frame,
)
from runner.wire.messages import FaultReport, ResponseHead

encode = msgspec.msgpack.encode


def head(status: int = 200, headers: list[tuple[str, str]] | None = None, job: int = 1) -> Frame:
    return HEAD, job, encode(ResponseHead(status, headers or []))


def body(data: bytes, job: int = 1) -> Frame:
    return BODY, job, data


END_FRAME: Frame = (END, 1, b"")
BUSY_FRAME: Frame = (END, 1, bytes((BUSY,)))
REPORT: Frame = (FAULT, 1, encode(FaultReport("raised", "ValueError", "boom", "trace")))


def after(*frames: Frame, method: str = "GET") -> ResponseExchange:
    exchange = ResponseExchange(1, method)
    exchange.receive(frames)
    return exchange


def test_a_whole_response() -> None:
    """T9: a head, a body and an end; the exchange is over then."""
    exchange = after(head(201, [("x", "1")]), body(b"a"), body(b"b"), END_FRAME)
    assert exchange.state is State.ENDED
    assert exchange.head == ResponseHead(201, [("x", "1")])
    assert list(exchange.body) == [b"a", b"b"]
    assert not exchange.open
    assert not exchange.violation


def test_every_frame_in_every_state() -> None:
    """F6: the table is complete: what it does not allow is a violation, and the response stays as it was."""
    reach = {
        State.HEAD_EXPECTED: [],
        State.BODY_EXPECTED: [head()],
        State.IDLE_EXPECTED: [head(), BUSY_FRAME],
        State.TAIL_EXPECTED: None,
        State.ENDED: [head(), END_FRAME],
        State.FAULTED: [REPORT],
        State.BROKEN: [(READY, 1, b"")],
    }
    frames = {
        HEAD: head(),
        BODY: body(b"x"),
        END: END_FRAME,
        FAULT: REPORT,
        IDLE: (IDLE, 1, b""),
        READY: (READY, 1, b""),
    }
    for state, (kind, frame) in itertools.product(State, frames.items()):
        known = reach[state]
        exchange = ResponseExchange.of_tail(1) if known is None else after(*known)
        assert exchange.state is state
        exchange.receive([frame])
        if kind in NEXT[state]:
            assert exchange.state is NEXT[state][kind]
            assert not exchange.violation
        else:
            assert exchange.violation
            assert exchange.state is (State.BROKEN if NEXT[state] else state)


def test_headers_of_the_hop_are_dropped() -> None:
    """H5: Transfer-Encoding always, and the Content-Length of a 204 (RFC 9110, 8.6)."""
    headers = [("Content-Length", "0"), ("transfer-Encoding", "chunked"), ("x", "1")]
    for status, kept in ((204, headers[2:]), (200, [headers[0], headers[2]])):
        exchange = after(head(status, headers))
        assert exchange.head is not None
        assert exchange.head.headers == kept


def test_background_work() -> None:
    """H3: the response is whole at an END that says BUSY; IDLE, or a fault of the work alone, ends the rest."""
    exchange = after(head(), body(b"a"), BUSY_FRAME)
    assert (exchange.open, exchange.background, exchange.whole, exchange.unfinished) == (False, True, True, True)
    assert response_failure(exchange, "job") is None
    rest = ResponseExchange.of_background(1)
    rest.receive([(IDLE, 1, bytes((PRINTED,)))])
    assert (rest.unfinished, rest.printed, rest.violation) == (False, True, "")
    exchange.receive([REPORT])
    assert exchange.report is not None
    assert response_failure(exchange, "job") is None
    exchange.receive([body(b"more")])
    assert exchange.violation


def test_background_work_of_another_job() -> None:
    """F6: an IDLE where none is due, or of another job, is a violation."""
    assert after(head(), (IDLE, 1, b"")).state is State.BROKEN
    assert after(head(), BUSY_FRAME, (IDLE, 2, b"")).state is State.BROKEN
    assert after(head(), BUSY_FRAME, END_FRAME).state is State.BROKEN


def test_a_frame_of_another_job() -> None:
    """C5: a late frame of one job is never taken for the next one's."""
    assert after(head(job=2)).state is State.BROKEN
    exchange = after(head(), body(b"secret", job=7))
    assert exchange.state is State.BROKEN
    assert not exchange.body


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        encode([200]),
        encode(["200", []]),
        encode([99, []]),
        encode([100, []]),
        encode([1000, []]),
        encode([200.5, []]),
        encode([200, [["a"]]]),
        encode([200, [["a", 1]]]),
        encode([200, [["a b", "c"]]]),
        encode([200, [["", "c"]]]),
        encode([200, [["a", "b\r\nset-cookie: c"]]]),
        encode([200, [["a\n", "b"]]]),
        encode([200, [["a", "\0"]]]),
        encode([200, [["a", "\u20ac"]]]),
        encode([200, [["content-length", "-1"]]]),
        encode([200, [["content-length", "1e3"]]]),
        encode([200, [["content-length", "1"], ["Content-Length", "2"]]]),
        b"\x92\xcc\xc8\x91\x92\xa1a\xa1\xff",
    ],
)
def test_a_head_that_does_not_hold_up(payload: bytes) -> None:
    """F6: a head that is no head, or could not stand in HTTP, is a violation."""
    exchange = after((HEAD, 1, payload))
    assert exchange.state is State.BROKEN
    assert exchange.head is None
    assert "head" in exchange.violation


@pytest.mark.parametrize("payload", [b"", b"\xc1", encode(["other", "", "", ""]), encode(["raised", 1])])
def test_a_report_that_does_not_hold_up(payload: bytes) -> None:
    """F6: so is a fault report that is none."""
    assert after((FAULT, 1, payload)).state is State.BROKEN


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_no_body_where_none_may_be(method: str, status: int) -> None:
    """H5: HEAD, 204 and 304 carry no body, whatever the worker sends, and lack none that they announce."""
    exchange = after(head(status, [("content-length", "5")]), body(b"hello"), END_FRAME, method=method)
    assert not exchange.body
    assert exchange.missing == 0
    assert exchange.state is State.ENDED


def test_a_short_body_is_missed_and_a_long_one_cut() -> None:
    """H5: the body is held to its Content-Length; what is too much is cut, and told of."""
    short = after(head(headers=[("content-length", "5")]), body(b"abc"), END_FRAME)
    assert short.missing == 2
    long = after(head(headers=[("content-length", "5")]), body(b"abc"), body(b"defg"), body(b"h"), END_FRAME)
    assert b"".join(long.body) == b"abcde"
    assert long.missing == 0
    assert long.surplus
    assert not short.surplus


def test_transfer_encoding_is_dropped() -> None:
    """H5: the handler's Transfer-Encoding is its own hop's."""
    exchange = after(head(headers=[("Transfer-Encoding", "chunked"), ("x", "1")]))
    assert exchange.head == ResponseHead(200, [("x", "1")])


any_frame = st.tuples(
    st.sampled_from([HEAD, BODY, END, FAULT, READY, INVALID, 77]),
    st.sampled_from([1, 1, 1, 2]),
    st.one_of(st.binary(max_size=50), st.just(head()[2]), st.just(REPORT[2])),
)


@settings(max_examples=300)
@given(st.lists(any_frame, max_size=10))
def test_no_order_of_frames_does_harm(frames: list[Frame]) -> None:
    """I14: whatever the frames, nothing raises, no body comes without a head, and an end is final."""
    exchange = ResponseExchange(1, "GET")
    ended = False
    for frame in frames:
        before = len(exchange.body)
        exchange.receive([(frame[0], frame[1], frame[2].decode("latin-1").encode())])
        assert not (ended and len(exchange.body) > before)
        ended = ended or not exchange.open
    assert exchange.head is not None or not exchange.body


class AnyWorker(RuleBasedStateMachine):
    """F6, I14: whatever comes in whatever order, the exchange knows as much as a plain model of it, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.exchange = ResponseExchange(1, "GET")
        self.announced: int | None = None
        self.got = b""
        self.read = b""
        self.step = "head"

    def take(self, kind: int, payload: bytes = b"", job: int = 1) -> bool:
        """Give it a frame; whether that was allowed, as far as kinds and numbers go."""
        allowed = {"head": {HEAD, FAULT}, "body": {BODY, END, FAULT}, "background": {IDLE, FAULT}}.get(self.step, set())
        self.exchange.receive([(kind, job, payload)])
        if kind in allowed and job == 1:
            return True
        if allowed:
            self.step = "broken"
        assert self.exchange.violation
        return False

    @rule(length=st.none() | st.integers(0, 20), job=st.sampled_from((1, 1, 1, 2)))
    def send_head(self, length: int | None, job: int) -> None:
        headers = [] if length is None else [("Content-Length", str(length))]
        if self.take(HEAD, head(200, headers)[2], job):
            self.step, self.announced = "body", length

    @rule(data=st.binary(min_size=1, max_size=10), job=st.sampled_from((1, 1, 1, 2)))
    def send_body(self, data: bytes, job: int) -> None:
        if self.take(BODY, data, job):
            self.got = (self.got + data)[: self.announced]

    @rule(flags=st.sampled_from((b"", b"\1", b"\2", b"\3", b"\xff")))
    def send_end(self, flags: bytes) -> None:
        if self.take(END, flags):
            self.step = "background" if flags and flags[0] & BUSY else "ended"

    @rule()
    def send_idle(self) -> None:
        if self.take(IDLE):
            self.step = "ended"

    @rule(kind=st.sampled_from(("raised", "memory", "cancelled", "aborted")))
    def send_fault(self, kind: str) -> None:
        before = self.step
        if self.take(FAULT, encode([kind, "", "", "", False])):
            self.step = "broken" if before == "head" and kind == "aborted" else "faulted"

    @rule()
    def read_on(self) -> None:
        while self.exchange.body:
            self.read += self.exchange.body.popleft()

    @invariant()
    def agrees(self) -> None:
        state = {
            "head": State.HEAD_EXPECTED,
            "body": State.BODY_EXPECTED,
            "background": State.IDLE_EXPECTED,
            "ended": State.ENDED,
            "faulted": State.FAULTED,
            "broken": State.BROKEN,
        }[self.step]
        assert self.exchange.state is state
        assert self.read + b"".join(self.exchange.body) == self.got
        if self.announced is not None and self.exchange.head is not None:
            assert self.exchange.missing == self.announced - len(self.got)


TestAnyWorker = AnyWorker.TestCase
TestAnyWorker.settings = settings(max_examples=300, stateful_step_count=20, deadline=None)
