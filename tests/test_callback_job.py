"""runner.jobs.callback_job: a round trip by the callbacks of a loop, on a lane whose far ends the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from runner import (
    HandlerRaised,
    JobClosed,
    JobTimedOut,
    LeaseTimeout,
    Limits,
    Pool,
    PoolClosed,
    Request,
    WorkerDied,
    WorkerMisbehaved,
)
from runner.events import JobEnded, JobRefused
from runner.jobs.callback_dispatch import CallbackDispatch
from runner.jobs.poller import Poller
from runner.jobs.pushed_upload import PushedUpload
from runner.model.request import Upload
from runner.wire.frames import BODY, BUSY, END, HEAD, REQUEST, STOP
from runner.wire.messages import JobContext, ResponseHead
from tests.lane import END_FRAME, HEAD_200, RAISED, Lane
from tests.processes import kill


class Told:
    """What a listener was told. `over` is set by the end, or by a failure."""

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.body = b""
        self.pieces = 0
        self.error: BaseException | None = None
        self.ended = False
        self.over = asyncio.Event()
        self.something = asyncio.Event()

    def on_head(self, head: ResponseHead, data: bytes, *, ended: bool) -> None:
        assert self.head is None
        self.head = head
        self._take(data, ended=ended)

    def on_body(self, data: bytes, *, ended: bool) -> None:
        assert self.head is not None
        assert not self.over.is_set()
        self._take(data, ended=ended)

    def on_failure(self, error: BaseException) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()
        self.something.set()

    def _take(self, data: bytes, *, ended: bool) -> None:
        self.body += data
        self.pieces += 1
        self.ended = ended
        self.something.set()
        if ended:
            self.over.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.over.wait(), 20)

    async def wait_for_more(self) -> None:
        self.something.clear()
        await asyncio.wait_for(self.something.wait(), 20)


async def some_turns() -> None:
    """Let the loop look at what is ready: what would be told wrongly is told by then."""
    for _ in range(10):
        await asyncio.sleep(0)


class Calls:
    """Calls by callbacks on a lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.poller = Poller(asyncio.get_running_loop())
        self._number = 0

    def call(
        self, method: str = "GET", body: bytes | None = None, upload: Upload | None = None, timeout: float | None = 1.0
    ) -> tuple[CallbackDispatch, Told]:
        self._number += 1
        told = Told()
        call = CallbackDispatch(
            Request(method, "/path", body=body),
            upload or Upload(body),
            JobContext(),
            f"job-{self._number}",
            timeout,
            self.poller,
            told,
            self.lane,
            lambda: None,
        )
        call.begin()
        return call, told

    def ended(self) -> JobEnded:
        (found,) = [event for event in self.lane.seen if isinstance(event, JobEnded)]
        return found


@asynccontextmanager
async def calls(limits: Limits | None = None) -> AsyncIterator[Calls]:
    lane = Lane(limits)
    made = Calls(lane)
    try:
        yield made
    finally:
        made.poller.close()
        lane.close()


async def turns(condition: Callable[[], bool]) -> None:
    """Let the loop run until this holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_a_response_that_is_there_at_once() -> None:
    """W1: head, body and end are told together, and the worker is free by then."""

    async def test() -> None:
        async with calls() as made:
            call, told = made.call("POST", b"body")
            made.lane.say(HEAD_200, (BODY, b"ab"), END_FRAME)
            await told.wait()
            assert (told.body, told.pieces, told.ended) == (b"ab", 1, True)
            assert made.lane.states == (1, 0)
            assert [kind for kind, _, _ in made.lane.heard()] == [REQUEST, BODY, END]
            assert made.ended().outcome == "ok"
            call.leave()  # nothing happens

    run(test)


def test_pieces_as_they_come() -> None:
    """T10: each is told at once; a fault after them is a failure."""

    async def test() -> None:
        async with calls() as made:
            _, told = made.call()
            made.lane.say(HEAD_200)
            await told.wait_for_more()
            for number in range(3):
                made.lane.say((BODY, b"%d" % number))
                await told.wait_for_more()
            assert (told.body, told.pieces) == (b"012", 4)
            made.lane.say((BODY, b"3"), RAISED)
            await told.wait()
            assert told.body == b"0123"
            assert isinstance(told.error, HandlerRaised)
            assert made.lane.states == (1, 0)

    run(test)


@pytest.mark.parametrize(
    ("frames", "error", "states"),
    [
        ([RAISED], HandlerRaised, (1, 0)),
        ([(200, b"")], WorkerMisbehaved, (0, 0)),
        ([(BODY, b"before its head")], WorkerMisbehaved, (0, 0)),
    ],
)
def test_what_is_no_response(frames: list[Any], error: type[BaseException], states: tuple[int, int]) -> None:
    """F1, I10: told as a failure; a worker that breaks the protocol is not given back."""

    async def test() -> None:
        async with calls() as made:
            _, told = made.call()
            made.lane.say(*frames)
            await told.wait()
            assert isinstance(told.error, error)
            assert told.head is None
            assert made.lane.states == states

    run(test)


@pytest.mark.parametrize("when", ["not taken", "taken", "after the head", "after the body"])
def test_deaths(when: str) -> None:
    """W8, F3: a request that was not taken waits for another worker; else the listener is told of the death."""

    async def test() -> None:
        async with calls() as made:
            made.lane.say()
            _, told = made.call(timeout=0.05)
            if when != "not taken":
                await turns(lambda: bool(made.lane.heard()))
            if when == "after the head":
                made.lane.say(HEAD_200, (BODY, b"a"))
                await told.wait_for_more()
            if when == "after the body":
                made.lane.say((HEAD, ResponseHead(200, [("content-length", "1")])), (BODY, b"a"))
                await told.wait_for_more()
            made.lane.die(-11)
            await told.wait()
            if when == "after the body":
                assert told.error is None
                assert told.ended
            else:
                assert isinstance(told.error, LeaseTimeout if when == "not taken" else WorkerDied)
            if made.lane.adopted:  # the end of a whole body was waited for, for a moment
                made.lane.leases.discard(made.lane.lane)
            assert made.lane.states == (0, 0)
            if when == "not taken":
                assert any(isinstance(event, JobRefused) for event in made.lane.seen)

    run(test)


def test_background_work_and_a_tail() -> None:
    """H6: a worker that goes on after its response is the supervisor's."""

    async def test() -> None:
        async with calls() as made:
            _, told = made.call()
            made.lane.say(HEAD_200, (END, bytes((BUSY,))))
            await told.wait()
            assert told.ended
            assert made.lane.adopted[-1][1].exchange.background
            made.lane.leases.give_back(made.lane.lane)
            _, told = made.call()
            made.lane.say((HEAD, ResponseHead(200, [("content-length", "2")])), (BODY, b"ab"), job=2)
            await told.wait()
            assert (told.body, told.ended) == (b"ab", True)
            assert len(made.lane.adopted) == 2
            made.lane.leases.discard(made.lane.lane)

    run(test)


def test_leaving() -> None:
    """C1: before the head and after it: the worker is the supervisor's at once, and nothing more is told."""

    async def test() -> None:
        async with calls() as made:
            for number, head in enumerate((False, True), 1):
                call, told = made.call()
                if head:
                    made.lane.say(HEAD_200, job=number)
                    await told.wait_for_more()
                call.leave()
                assert len(made.lane.adopted) == number
                made.lane.say(HEAD_200, END_FRAME, job=number)
                await some_turns()
                assert not told.over.is_set()
                made.lane.worker.channel.receive()
                made.lane.leases.give_back(made.lane.lane)

    run(test)


def test_a_close_from_another_thread() -> None:
    """C2: it wakes the loop, which settles the job once, 300 times at any moment."""

    async def test() -> None:
        async with calls() as made:
            for number in range(1, 301):
                call, told = made.call()
                job = call._job
                assert job is not None
                closer = threading.Thread(target=job.close, args=(PoolClosed("the end"),))
                closer.start()
                if number % 2:
                    made.lane.say(HEAD_200, job=number)
                await told.wait()
                closer.join()
                assert isinstance(told.error, JobClosed)
                assert len(made.lane.adopted) == number
                made.lane.heard()
                made.lane.worker.channel.receive()
                made.lane.leases.give_back(made.lane.lane)
                call.leave()
            assert made.lane.states == (1, 0)

    run(test)


def test_waiting_for_a_worker() -> None:
    """W5: first come, first served; each request is sent as the worker comes free; one that leaves gets none."""

    async def test() -> None:
        async with calls() as made:
            first, second, third, fourth = (made.call(timeout=10.0) for _ in range(4))
            assert made.lane.leases.numbers().waiting == 3
            second[0].leave()
            made.lane.say(HEAD_200, END_FRAME)
            await first[1].wait()
            assert [job for _, job, _ in made.lane.heard()] == [1, 2]
            made.lane.say(HEAD_200, END_FRAME, job=2)
            await third[1].wait()
            made.lane.say(HEAD_200, END_FRAME, job=3)
            await fourth[1].wait()
            assert not second[1].over.is_set()
            assert made.lane.states == (1, 0)

    run(test)


def test_waiting_in_vain() -> None:
    """F7: for so long and no longer; and a pool that closes refuses those that wait."""

    async def test() -> None:
        async with calls() as made:
            first, _ = made.call()
            _, told = made.call(timeout=0.02)
            await told.wait()
            assert isinstance(told.error, LeaseTimeout)
            _, waiting = made.call(timeout=10.0)
            made.lane.leases.close(lambda: PoolClosed("closed"))
            await waiting.wait()
            assert isinstance(waiting.error, PoolClosed)
            _, late = made.call()
            assert isinstance(late.error, PoolClosed)
            first.leave()
            made.lane.leases.discard(made.lane.lane)

    run(test)


def test_a_listener_that_can_t_take_more() -> None:
    """W1: while it is paused nothing is told, and the worker's pipe fills; then all of it comes."""

    async def test() -> None:
        async with calls() as made:
            call, told = made.call()
            made.lane.say(HEAD_200)
            await told.wait_for_more()
            call.pause()
            made.lane.say((BODY, b"x" * 1000), END_FRAME)
            await some_turns()
            assert told.body == b""
            assert made.lane.states == (0, 1)
            call.resume()
            await told.wait()
            assert told.body == b"x" * 1000

    run(test)


def test_a_body_that_is_pushed() -> None:
    """H6, T12: sent as the worker takes it, in order; more is wanted once there is none; its end ends it."""

    async def test() -> None:
        async with calls() as made:
            wanted: list[int] = []
            upload = PushedUpload(lambda: wanted.append(1))
            _, told = made.call("POST", upload=upload)
            assert len(wanted) == 1
            whole = random.Random(7).randbytes(3_000_000)
            received = b""
            at = 0
            while at < len(whole):
                size = min(200_000, len(whole) - at)
                upload.push(whole[at : at + size])
                at += size
                while upload.waiting or not made.lane.worker.channel.flushed:
                    received += b"".join(payload for kind, _, payload in made.lane.heard() if kind == BODY)
                    await asyncio.sleep(0)
            upload.end()
            frames = made.lane.heard()
            received += b"".join(payload for kind, _, payload in frames if kind == BODY)
            assert received == whole
            assert frames[-1][0] == END
            assert len(wanted) > 10
            made.lane.say(HEAD_200, END_FRAME)
            await told.wait()
            assert told.ended

    run(test)


def test_a_pushed_body_that_comes_too_late() -> None:
    """H6: the response comes first: the upload is stopped, and what is pushed afterwards goes nowhere."""

    async def test() -> None:
        async with calls() as made:
            upload = PushedUpload(lambda: None)
            _, told = made.call("POST", upload=upload)
            upload.push(b"one")
            made.lane.say(HEAD_200, END_FRAME)
            await told.wait()
            assert [kind for kind, _, _ in made.lane.heard()] == [REQUEST, BODY, STOP]
            upload.push(b"two")
            upload.end()
            assert made.lane.heard() == []
            assert made.lane.states == (1, 0)

    run(test)


def test_over_its_wall_time() -> None:
    """F5: told at the time, without anything from the worker."""

    async def test() -> None:
        async with calls(Limits(wall_seconds=0.05)) as made:
            _, told = made.call()
            await told.wait()
            assert isinstance(told.error, JobTimedOut)
            made.lane.leases.discard(made.lane.lane)

    run(test)


def test_a_listener_that_raises() -> None:
    """I2: it is told of that, once, and the worker is not lost."""

    async def test() -> None:
        async with calls() as made:
            _, told = made.call()
            told.on_head = None  # type: ignore[method-assign, assignment]
            made.lane.say(HEAD_200)
            await told.wait()
            assert isinstance(told.error, TypeError)
            assert len(made.lane.adopted) == 1
            made.lane.leases.discard(made.lane.lane)

    run(test)


def test_a_large_head_of_a_worker_that_has_died() -> None:
    """F3: what it had written is taken, though it takes several reads, and its death is known already."""

    async def test() -> None:
        async with calls() as made:
            _, told = made.call()
            await turns(lambda: bool(made.lane.heard()))
            made.lane.say((HEAD, ResponseHead(200, [("x-large", "x" * 100_000)])), (BODY, b"ab"), END_FRAME)
            made.lane.die(-9)
            await told.wait()
            assert (told.error, told.body, told.ended) == (None, b"ab", True)

    run(test)


def test_real_workers_die_under_callbacks() -> None:
    """W8, I5: 400 jobs, workers killed at seeded instants: each listener is told once, and the pool is whole after."""

    async def test() -> None:
        seed = random.randrange(1 << 32)
        print("seed", seed)
        chance = random.Random(seed)
        loop = asyncio.get_running_loop()
        with Pool("tests.handlers:app", workers=2, queue=1000, grace=0.5) as pool:
            poller = Poller(loop)
            try:
                waiting = []
                for _ in range(400):
                    target = chance.choice(["/hello", "/pid", "/die", "/raise", "/stream?count=5&pause=0.001"])
                    told = Told()
                    call = pool.open_for(told, Request("GET", target), poller)
                    call.begin()
                    waiting.append((call, told, target))
                    if chance.random() < 0.1:
                        await asyncio.sleep(chance.random() * 0.01)
                        if pids := [worker.pid for worker in pool.workers() if worker.pid and worker.state == "busy"]:
                            with contextlib.suppress(ProcessLookupError):  # it has died by itself meanwhile
                                kill(chance.choice(pids))
                    if chance.random() < 0.1:
                        waiting.pop()
                        call.leave()
                for _, told, target in waiting:
                    await told.wait()
                    assert told.ended or isinstance(told.error, (WorkerDied, HandlerRaised)), (target, told.error)
                await turns(lambda: pool.stats().idle == 2)
                told = Told()
                pool.open_for(told, Request("GET", "/hello"), poller).begin()
                await told.wait()
                assert told.body == b"hello"
            finally:
                poller.close()

    run(test)
