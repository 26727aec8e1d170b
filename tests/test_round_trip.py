"""runner.jobs: how each job of the table in ARCHITECTURE.md settles, on a lane whose far ends the test holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from runner import (
    BlastdoorError,
    HandlerRaised,
    Job,
    JobClosed,
    JobTimedOut,
    LeaseTimeout,
    Limits,
    WorkerDied,
    WorkerMisbehaved,
)
from runner.events import JobAnswered, JobEnded, JobStarted
from runner.wire.frames import (
    BODY,
    BUSY,
    END,
    HEAD,
    REQUEST,
    STOP,
)
from runner.wire.messages import ResponseHead
from tests.lane import END_FRAME, HEAD_200, RAISED, Lane, lane
from tests.waiting import wait_until


@pytest.fixture(name="lane")
def _lane() -> Iterator[Lane]:
    with lane() as made:
        yield made


def ended(lane: Lane) -> JobEnded:
    (found,) = [event for event in lane.seen if isinstance(event, JobEnded)]
    return found


def read_to_the_end(job: Job, raised: list[type[BaseException]]) -> None:
    try:
        b"".join(job)
    except JobClosed as error:
        raised.append(type(error))


def test_an_end_gives_the_worker_back(lane: Lane) -> None:
    """W1, T9: before the caller has read the last piece."""
    lane.say(HEAD_200, (BODY, b"ab"), END_FRAME)
    job = lane.open()
    assert job.settled
    assert lane.states == (1, 0)
    assert b"".join(job) == b"ab"
    assert job.finished
    assert [type(event) for event in lane.seen] == [JobStarted, JobEnded]
    assert ended(lane).outcome == "ok"


def test_a_small_request(lane: Lane) -> None:
    """T4: head, body and end, in this order, and nothing else."""
    lane.say(HEAD_200, END_FRAME)
    lane.open("POST", b"body")
    assert [(kind, job) for kind, job, _ in lane.heard()] == [(REQUEST, 1), (BODY, 1), (END, 1)]


def test_a_fault_after_the_head(lane: Lane) -> None:
    """F1: the worker lives, and is given back; the reader gets the handler's error."""
    lane.say(HEAD_200, (BODY, b"ab"))
    job = lane.open()
    assert job.read() == b"ab"
    lane.say(RAISED)
    with pytest.raises(HandlerRaised):
        job.read()
    assert lane.states == (1, 0)
    assert ended(lane).outcome == "raised"
    assert any(isinstance(event, JobAnswered) for event in lane.seen)


def test_background_work_is_adopted(lane: Lane) -> None:
    """H6: an END that says busy: the response is whole, the worker is the supervisor's until IDLE."""
    lane.say(HEAD_200, (END, bytes((BUSY,))))
    assert b"".join(lane.open()) == b""
    ((left, remainder),) = lane.adopted
    assert left is lane.lane
    assert remainder.exchange.background
    assert lane.states == (0, 1)
    lane.leases.discard(left)


def test_a_body_that_is_complete_waits_for_no_end(lane: Lane) -> None:
    """H6: all its bytes are there, and no END comes: whatever follows is background work."""
    lane.say((HEAD, ResponseHead(200, [("content-length", "2")])), (BODY, b"ab"))
    job = lane.open()
    assert b"".join(job) == b"ab"
    assert job.finished
    assert len(lane.adopted) == 1
    lane.leases.discard(lane.lane)


@pytest.mark.parametrize("taken", [False, True])
def test_a_death_before_the_head(lane: Lane, taken: bool) -> None:
    """W8, F3: where all that was written is unread in the pipe another worker may have it; else it died in the job."""
    raised: list[BaseException] = []

    def open_job() -> None:
        try:
            lane.open()
        except BlastdoorError as error:
            raised.append(error)

    opener = threading.Thread(target=open_job)
    opener.start()
    wait_until(lambda: lane.worker.channel.unread() > 0)
    if taken:
        assert [kind for kind, _, _ in lane.heard()] == [REQUEST]
    lane.die(-9)
    opener.join()
    # There is no other worker here, so that a request that was not taken waits for one in vain.
    assert [type(error) for error in raised] == [WorkerDied if taken else LeaseTimeout]


def test_a_death_after_the_head(lane: Lane) -> None:
    """F3: the reader is told how the worker ended, again and again."""
    lane.say(HEAD_200)
    job = lane.open()
    lane.heard()
    lane.die(-11)
    for _ in range(3):
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            job.read()
    assert ended(lane).outcome == "died"
    assert lane.states == (0, 0)


@pytest.mark.parametrize("frame", [(200, b""), (BODY, b"before its head")], ids=["unknown", "body"])
def test_a_violation_discards_the_worker(lane: Lane, frame: tuple[int, bytes]) -> None:
    """I10: what breaks the protocol is never given back."""
    lane.say(frame)
    with pytest.raises(WorkerMisbehaved):
        lane.open()
    assert lane.states == (0, 0)
    assert ended(lane).outcome == "protocol"


def test_a_frame_of_another_job(lane: Lane) -> None:
    """I3: late bytes of one job never reach the next."""
    lane.say(HEAD_200, END_FRAME)
    lane.open()
    lane.say(HEAD_200, (BODY, b"late"))
    with pytest.raises(WorkerMisbehaved):
        lane.open()
    assert lane.states == (0, 0)


def test_close_in_the_middle_leaves_it_to_the_supervisor(lane: Lane) -> None:
    """C1: at once, with what is still to come; reading on says so."""
    lane.say(HEAD_200, (BODY, b"a"))
    job = lane.open()
    job.close()
    ((_, remainder),) = lane.adopted
    assert remainder.exchange.open
    assert not remainder.timed_out
    with pytest.raises(JobClosed):
        job.read()
    assert ended(lane).outcome == "left"
    lane.leases.discard(lane.lane)


def test_an_upload_that_is_left_is_stopped(lane: Lane) -> None:
    """T7: the response came first: the rest of the body is not sent, and STOP says that it was cut."""
    pieces = iter([b"x" * 70_000] * 50)
    lane.say(HEAD_200, END_FRAME)
    job = lane.open("POST", pieces)
    assert job.settled
    assert lane.heard()[-1][0] == STOP
    assert lane.states == (1, 0)
    assert next(pieces)  # a plain iterator can't be closed, and most of it was never asked for


def test_a_response_before_the_upload_is_the_reader_s(lane: Lane) -> None:
    """T7, H6: the supervisor has the rest of the upload to send, and no say in the body that came."""
    opened: list[Job] = []
    opener = threading.Thread(target=lambda: opened.append(lane.open("POST", b"x" * 3_000_000)))
    opener.start()
    seen = -1
    while lane.worker.channel.flushed or lane.worker.channel.unread() > seen:  # until the pipe is full
        seen = lane.worker.channel.unread()
        time.sleep(0.01)
    lane.say(HEAD_200, (BODY, b"all of it"), END_FRAME)
    opener.join()
    (job,) = opened
    ((left, remainder),) = lane.adopted
    assert not remainder.exchange.unfinished
    remainder.exchange.body.clear()  # as the supervisor does with what nobody reads
    assert b"".join(job) == b"all of it"
    lane.leases.discard(left)


def test_a_source_that_raises(lane: Lane) -> None:
    """T7: the caller gets its own exception, the worker a STOP."""

    def source() -> Iterator[bytes]:
        yield b"one"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lane.open("POST", source())
    assert [kind for kind, _, _ in lane.heard()] == [REQUEST, BODY, STOP]
    assert len(lane.adopted) == 1
    lane.leases.discard(lane.lane)


def test_over_its_wall_time() -> None:
    """F5: a waiting reader sees it by itself; the supervisor gets the words for the log."""
    with lane(Limits(wall_seconds=0.05)) as slow:
        slow.say(HEAD_200)
        job = slow.open()
        with pytest.raises(JobTimedOut):
            job.read()
        ((_, remainder),) = slow.adopted
        assert "0.05 s" in remainder.timed_out
        slow.leases.discard(slow.lane)


def test_close_wakes_the_thread_that_reads(lane: Lane) -> None:
    """C2: only that thread settles, and exactly once; 300 times, the close at any moment of the read."""
    for number in range(1, 301):
        lane.say(HEAD_200, job=number)
        job = lane.open()
        raised: list[type[BaseException]] = []
        reader = threading.Thread(target=read_to_the_end, args=(job, raised))
        reader.start()
        job.close()
        reader.join()
        assert raised == [JobClosed]
        assert len(lane.adopted) == number
        lane.heard()
        lane.leases.give_back(lane.lane)
    assert lane.states == (1, 0)
