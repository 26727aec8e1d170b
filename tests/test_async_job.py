"""runner.jobs.async_job: Pool.aopen on asyncio and trio, and what a cancel leaves at every await."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from runner import (
    CancelScope,
    DeadlineExceeded,
    HandlerRaised,
    InvalidRequest,
    JobClosed,
    JobTimedOut,
    LeaseTimeout,
    Limits,
    Pool,
    PoolClosed,
    ReadTimeout,
    Request,
    StartError,
    WorkerDied,
    WorkerMisbehaved,
    WorkersUnavailable,
    WriteTimeout,
)
from tests.processes import kill, wait_gone
from tests.waiting import wait_until

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine function in an event loop of its own."""

    def in_loop(main: Callable[[], Awaitable[Any]]) -> Any:
        return anyio.run(main, backend=request.param)

    return in_loop


async def aget(pool: Pool, target: str, body: Any = None, **limits: Any) -> bytes:
    async with await pool.aopen(Request("POST", target, body=body), **limits) as job:
        return b"".join([piece async for piece in job])


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.sleep(0.002)


def test_a_round_trip(pool: Pool, run: Run) -> None:
    """X: the head is there when aopen returns, and the body comes piece by piece."""

    async def main() -> None:
        async with await pool.aopen(Request("POST", "/echo?a=b", body=b"hi")) as job:
            assert job.head.status == 200
            assert b'"body": "hi"' in b"".join([piece async for piece in job])
            assert job.settled
            assert await job.read() == b""

    run(main)


def test_threads_and_tasks_at_once(pool: Pool, run: Run) -> None:
    """X: a pool serves threads and tasks at the same time, on channels that change hands between them."""

    def in_thread() -> None:
        for _ in range(300):
            with pool.open(Request("GET", "/pid")) as job:
                assert b"".join(job).isdigit()

    async def in_task() -> None:
        for _ in range(100):
            assert (await aget(pool, "/pid")).isdigit()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(in_task)
            for _ in range(3):
                group.start_soon(anyio.to_thread.run_sync, in_thread)

    run(main)
    assert pool.stats().outcomes == {"ok": 1200}


def test_the_loop_is_not_blocked(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """X: while a task waits for a worker, and for its job, other tasks run."""
    pool = start(workers=1)

    async def main() -> None:
        go = tmp_path / "go"
        async with anyio.create_task_group() as group:
            group.start_soon(aget, pool, f"/wait_for?here={tmp_path / 'here'}&go={go}")
            await until((tmp_path / "here").exists)
            group.start_soon(aget, pool, "/hello")
            await until(lambda: pool.stats().waiting == 1)
            for _ in range(100):
                await checkpoint()
            go.touch()

    run(main)


def test_a_busy_stream_lets_other_tasks_run(pool: Pool, run: Run) -> None:
    """X: a download that always has more does not keep the loop from its other tasks."""

    async def main() -> None:
        turns = 0
        done = anyio.Event()

        async def count() -> None:
            nonlocal turns
            while not done.is_set():
                turns += 1
                await checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(count)
            assert len(await aget(pool, "/big?size=50000000")) == 50_000_000
            done.set()
        assert turns > 300

    run(main)


# -- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, b"", b"x" * 10, "é", b"x" * 10_000_000, bytearray(b"y" * 70_000)])
def test_bodies_that_are_there(pool: Pool, run: Run, body: Any) -> None:
    """H6: none, bytes and text of any size."""
    size = 0 if body is None else len(body.encode() if isinstance(body, str) else body)
    assert run(lambda: aget(pool, "/count", body)).split()[0] == str(size).encode()


def test_an_async_generator(pool: Pool, run: Run) -> None:
    """H6: its pieces of any size come in order, and it is run to its end."""
    ended = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(50):
            yield bytes(number * 5000)
            if number % 10 == 0:
                await anyio.sleep(0.001)
        ended.append(True)

    expected = str(sum(number * 5000 for number in range(50))).encode()
    assert run(lambda: aget(pool, "/count", body())).split()[0] == expected
    assert ended


def test_a_plain_generator_and_a_file(pool: Pool, run: Run, tmp_path: Path) -> None:
    """H6: what is not async may be sent, too."""
    (tmp_path / "file").write_bytes(bytes(300_000))

    async def main() -> None:
        assert (await aget(pool, "/count", (b"ab" for _ in range(10)))).split()[0] == b"20"
        with (tmp_path / "file").open("rb") as file:
            assert (await aget(pool, "/count", file)).split()[0] == b"300000"

    run(main)


def test_a_body_with_an_async_read(pool: Pool, run: Run) -> None:
    """H6: a stream reader, or an async file."""

    class File:
        def __init__(self) -> None:
            self.left = 200_000

        async def read(self, size: int) -> bytes:
            await checkpoint()
            size = min(size, self.left)
            self.left -= size
            return bytes(size)

    assert run(lambda: aget(pool, "/count", File())).split()[0] == b"200000"


class Broken:
    """A source whose iterator can't be had."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise LookupError("the stream is consumed")


def test_sources_that_fail_at_their_ends(pool: Pool, run: Run, log: pytest.LogCaptureFixture) -> None:
    """H6: one that can't begin is the caller's error; what one raises in its clean-up is logged, and harms nobody."""

    async def unclean() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1000)
                await checkpoint()
        finally:
            raise OSError("the clean-up has failed")

    async def main() -> None:
        with pytest.raises(LookupError, match="consumed"):
            await aget(pool, "/count", Broken())
        assert await aget(pool, "/hello", unclean()) == b"hello"
        await until(lambda: "the clean-up has failed" in log.text)

    run(main)


def test_a_source_that_fails_as_it_is_cancelled(pool: Pool, run: Run, log: pytest.LogCaptureFixture) -> None:
    """H6: in the middle of its own waiting; it is logged, as nobody is there to be told."""
    waiting = []

    async def source() -> AsyncIterator[bytes]:
        yield b"some"
        waiting.append(True)
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("the clean-up has failed")

    async def main() -> None:
        job = await pool.aopen(Request("POST", "/endless", body=source()))
        while not waiting:
            await job.read()
        job.close()
        await until(lambda: "the clean-up has failed" in log.text)

    run(main)
    recovered(pool, 2)


def test_a_source_that_will_not_be_cancelled(pool: Pool) -> None:
    """H6: it is asked once, and not over and over."""
    asked: list[bool] = []

    async def stubborn() -> AsyncIterator[bytes]:
        yield b"some"
        while len(asked) < 3:
            try:
                await anyio.sleep(0.2)
                return
            except asyncio.CancelledError:
                asked.append(True)

    async def main() -> None:
        assert await aget(pool, "/hello", stubborn()) == b"hello"
        await anyio.sleep(0.1)

    asyncio.run(main())
    assert len(asked) <= 2  # by the job's end, and by the loop's


def test_full_duplex(start: Callable[..., Pool], run: Run) -> None:
    """H6: each piece of the body waits for the answer to the one before, and neither side waits for ever."""
    pool = start("tests.async_handlers:app", workers=1)

    async def main() -> None:
        send, receive = anyio.create_memory_object_stream[bytes](10)

        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            async with receive:
                async for piece in receive:
                    yield piece

        async with await pool.aopen(Request("POST", "/echo", body=body())) as job:
            assert await job.read() == b"first"
            for number in range(20):
                await send.send(str(number).encode())
                assert await job.read() == str(number).encode()
            await send.aclose()
            assert await job.read() == b""

    run(main)


def test_a_source_that_waits_does_not_delay_the_answer(start: Callable[..., Pool], run: Run) -> None:
    """H6: an early answer ends an upload whose source is asleep; the source is closed."""
    pool = start(workers=1)
    closed = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"some"
            await anyio.sleep(1000)
        finally:
            closed.append(True)

    async def main() -> None:
        with anyio.fail_after(20):
            assert await aget(pool, "/hello", body()) == b"hello"
            await until(lambda: closed)
            assert await aget(pool, "/hello") == b"hello"

    run(main)


def test_a_source_that_raises(start: Callable[..., Pool], run: Run) -> None:
    """H6: its error is the caller's; the worker lives on."""
    pool = start(workers=1)

    async def body(piece: Any) -> AsyncIterator[Any]:
        yield b"some"
        yield piece
        raise LookupError("the source is broken")

    async def main() -> None:
        with pytest.raises(LookupError, match="the source is broken"):
            await aget(pool, "/count", body(b"x"))
        with pytest.raises(InvalidRequest, match="dict"):
            await aget(pool, "/count", body({}))
        assert await aget(pool, "/hello", lease_timeout=10) == b"hello"

    run(main)


def test_an_async_body_needs_aopen(pool: Pool) -> None:
    """H6: refused by open, with the way out."""

    async def body() -> AsyncIterator[bytes]:
        yield b""

    with pytest.raises(InvalidRequest, match="aopen"):
        pool.open(Request("POST", "/", body=body()))


# -- faults and time limits ------------------------------------------------------------------------


def test_faults(pool: Pool, run: Run) -> None:
    """F1, F3, F6: as in threads; the worker's death is awaited without blocking the loop."""

    async def main() -> None:
        with pytest.raises(HandlerRaised, match="boom from the handler"):
            await aget(pool, "/raise")
        for late in ("", "1"):
            with pytest.raises(WorkerDied, match="SIGSEGV"):
                await aget(pool, f"/die?late={late}", lease_timeout=10)
        with pytest.raises(WorkerMisbehaved):
            await aget(pool, "/protocol", b"total nonsense", lease_timeout=10)
        assert await aget(pool, "/hello", lease_timeout=10) == b"hello"

    run(main)


def test_a_death_beside_a_close(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """C2, W11: the worker is dead and the job closed as its reader wakes up: it is told the cause, not the death."""
    pool = start(workers=1)

    async def main() -> None:
        job = await pool.aopen(Request("GET", f"/head_then_wait?go={tmp_path / 'go'}"))
        seen: list[BaseException] = []

        async def read() -> None:
            try:
                await job.read()
            except (JobClosed, WorkerDied) as error:
                seen.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            worker = job._worker
            kill(worker.pid)
            wait_until(lambda: worker.dead)  # the loop, and with it the reader, waits as well
            job.close(ValueError("the cause"))
        assert [type(error) for error in seen] == [JobClosed]
        assert "the cause" in str(seen[0])

    run(main)


def test_many_deaths(start: Callable[..., Pool], run: Run) -> None:
    """I3: crashes among healthy requests of many tasks: each has its own outcome."""
    pool = start(workers=4)
    outcomes: list[bool] = []

    async def call(number: int) -> None:
        if number % 3:
            assert await aget(pool, "/hello") == b"hello"
        else:
            with pytest.raises(WorkerDied):
                await aget(pool, "/die?how=SIGKILL")
        outcomes.append(True)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number in range(150):
                group.start_soon(call, number)

    run(main)
    assert len(outcomes) == 150


def test_time_limits(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """F5, F7: the wait for a worker, for progress, and for the handler to read, each with its own error."""
    pool = start(workers=1, grace=0.05)
    blocked = f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(50_000)

    async def main() -> None:
        async with await pool.aopen(Request("GET", "/endless")):
            with pytest.raises(LeaseTimeout):
                await aget(pool, "/hello", lease_timeout=0.05)
        with pytest.raises(ReadTimeout, match=r"0\.1 s"):
            await aget(pool, blocked, read_timeout=0.1)
        with pytest.raises(WriteTimeout, match=r"0\.1 s"):
            await aget(pool, blocked, endless(), write_timeout=0.1)
        with pytest.raises(WriteTimeout):
            await aget(pool, blocked, bytes(10_000_000), read_timeout=0.1)
        assert await aget(pool, "/hello", lease_timeout=10, read_timeout=float("inf")) == b"hello"

    run(main)


def test_the_pool_s_own_time_limit(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """F5: a job over the wall time ends with its own error."""
    pool = start(workers=1, limits=Limits(wall_seconds=0.2))
    target = f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"
    with pytest.raises(JobTimedOut):
        run(lambda: aget(pool, target))


def test_a_slow_source_is_not_a_read_timeout(start: Callable[..., Pool], run: Run) -> None:
    """X: a source that takes longer than the read time-out is nobody's fault."""
    pool = start(workers=1)

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        await anyio.sleep(0.3)
        yield b"b"

    assert run(lambda: aget(pool, "/count", body(), read_timeout=0.1)).split()[0] == b"2"


def test_pools_that_can_not_start_or_are_closed(run: Run) -> None:
    """F8: the same errors as in threads; the start over does not block the loop."""

    async def main() -> None:
        pool = Pool("tests.no_such_module:app", workers=1)
        for _ in range(2):
            with pytest.raises(StartError, match="no_such_module"):
                await aget(pool, "/")
        with pytest.raises(StartError, match="no_such_module"):
            async with pool:
                pass
        await pool.aclose()
        with pytest.raises(PoolClosed):
            await aget(pool, "/")

    run(main)


def test_a_pool_is_an_async_context_manager(run: Run) -> None:
    """W11: `async with Pool(...)` starts it and closes it without blocking the loop."""

    async def main() -> None:
        async with Pool("tests.handlers:app", workers=1) as pool:
            assert pool.ready
            assert await aget(pool, "/hello") == b"hello"
        assert not pool.ready

    run(main)


@pytest.mark.parametrize("native", [False, True])
def test_a_start_that_is_cancelled(native: bool) -> None:
    """W11: by asyncio's own cancel, or a scope's: nothing of the pool is left."""

    async def main() -> None:
        with contextlib.suppress(TimeoutError):
            if native:
                async with asyncio.timeout(0.01), Pool("tests.handlers:app", workers=2):
                    await asyncio.sleep(0.01)
            else:
                with anyio.fail_after(0.01):
                    async with Pool("tests.handlers:app", workers=2):
                        await anyio.sleep(0.01)

    asyncio.run(main())


def test_a_close_that_is_cancelled(start: Callable[..., Pool]) -> None:
    """W11: it comes to its end, and then the cancel is raised."""
    pool = start()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await pool.aclose()

    asyncio.run(main())
    assert not pool.ready


def test_a_waiter_whose_loop_has_ended(start: Callable[..., Pool]) -> None:
    """W4, X: it is handed no worker, and the next caller is."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/stream?count=2&pause=0.01"))
    loop = asyncio.new_event_loop()
    task = loop.create_task(aget(pool, "/hello"))
    while not pool.stats().waiting:
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    for _ in job:
        pass
    with pool.open(Request("GET", "/hello"), lease_timeout=20) as after:
        assert b"".join(after) == b"hello"
    task._log_destroy_pending = False  # type: ignore[attr-defined] # that it is, is the point of this test
    del task
    gc.collect()


def test_a_fork_of_the_host(start: Callable[..., Pool]) -> None:
    """W11: what a forked child closes stays open, and watched, in the parent: in an upload, and between two jobs."""
    pool = start(workers=1)

    def fork() -> None:
        if not (pid := os.fork()):
            os._exit(0)
        os.waitpid(pid, 0)

    async def body() -> AsyncIterator[bytes]:
        for number in range(100):
            yield bytes(50_000)
            if number == 50:
                fork()

    async def main() -> None:
        with anyio.fail_after(20):
            for _ in range(3):
                assert (await aget(pool, "/slow_count", body())).split()[0] == b"5000000"
                fork()

    asyncio.run(main())


def test_descriptors_run_out(start: Callable[..., Pool]) -> None:
    """F7: a job that finds none to wait with says so, and its worker is free again."""
    pool = start(workers=1)

    async def main() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.dup(0)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            with pytest.raises(WorkersUnavailable, match="descriptor"):
                await aget(pool, "/hello")
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await aget(pool, "/hello") == b"hello"

    asyncio.run(main())


# -- cancelling ------------------------------------------------------------------------------------


def recovered(pool: Pool, workers: int) -> None:
    """The pool is whole: nobody is waiting, nothing is held, and the next answers are right."""
    wait_until(lambda: (pool.stats().idle, pool.stats().busy, pool.stats().waiting) == (workers, 0, 0))
    for number in range(workers):
        with pool.open(Request("POST", "/echo", body=str(number).encode()), lease_timeout=20) as job:
            assert f'"body": "{number}"'.encode() in b"".join(job)


def test_a_cancel_while_queued(start: Callable[..., Pool], run: Run) -> None:
    """C1: the task waits for a worker no more, and takes none from the next one."""
    pool = start(workers=1)

    async def main() -> None:
        async with await pool.aopen(Request("GET", "/endless")), anyio.create_task_group() as group:
            group.start_soon(aget, pool, "/hello")
            await until(lambda: pool.stats().waiting == 1)
            group.cancel_scope.cancel()
        assert pool.stats().waiting == 0

    run(main)
    recovered(pool, 1)


def test_a_cancel_as_the_worker_is_handed_over(start: Callable[..., Pool], run: Run) -> None:
    """C5: the worker that comes at the same moment goes back."""
    pool = start(workers=1)

    async def main() -> None:
        for _ in range(50):
            job = await pool.aopen(Request("GET", "/stream?count=2&pause=0.01"))
            async with anyio.create_task_group() as group:
                group.start_soon(aget, pool, "/hello")
                await until(lambda: pool.stats().waiting == 1)
                while await job.read():
                    pass  # its end hands the worker on
                group.cancel_scope.cancel()

    run(main)
    recovered(pool, 1)


def test_a_cancel_before_the_head(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """C1, C3: the task is freed at once, the handler is told, its worker stays warm."""
    pool = start(workers=1, grace=30)
    pid = pool.workers()[0].pid

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aget, pool, f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}")
            await until((tmp_path / "here").exists)
            group.cancel_scope.cancel()
        assert await aget(pool, "/pid") == str(pid).encode()

    run(main)


def test_a_cancel_in_the_body_and_in_the_upload(start: Callable[..., Pool], run: Run) -> None:
    """C1, H6: both directions are under way; the source is closed, the worker lives."""
    pool = start("tests.async_handlers:app", workers=1, grace=30)
    pid = pool.workers()[0].pid
    closed = []

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(10_000)
        finally:
            closed.append(True)

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with await pool.aopen(Request("POST", "/echo", body=body())) as job:
                async for _ in job:
                    scope.cancel()
        assert scope.cancelled_caught
        await until(lambda: closed)
        assert await aget(pool, "/hello") == b"hello"

    run(main)
    assert [worker.pid for worker in pool.workers()] == [pid]


@pytest.mark.parametrize("target", ["/hello", "/stream?count=3&pause=0", "/echo", "/die?how=SIGKILL&late=1"])
def test_a_cancel_at_every_await(start: Callable[..., Pool], run: Run, target: str) -> None:
    """X, C5: a call cancelled at its first await, its second, and so on, until one comes to its end."""
    pool = start(workers=1, grace=30)
    finished = 0

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            await checkpoint()
            yield bytes(100_000)

    async def main() -> None:
        nonlocal finished
        point = 0
        while finished < 3:
            point += 1
            assert point < 10_000
            with anyio.CancelScope() as scope:
                call = aget(pool, target, body() if target == "/echo" else None)
                try:
                    await _cancelled_at(call, point, scope)
                    finished += 1
                except WorkerDied:
                    finished += 1
            with anyio.fail_after(20):
                assert await aget(pool, "/hello") == b"hello"

    run(main)
    recovered(pool, 1)


class _cancelled_at:  # noqa: N801 - it reads as a function
    """Awaits a coroutine, and cancels the scope at the coroutine's so-manieth suspension."""

    def __init__(self, coroutine: Any, point: int, scope: anyio.CancelScope) -> None:
        self.coroutine, self.point, self.scope = coroutine, point, scope

    def __await__(self) -> Generator[Any, Any, Any]:
        count = 0
        iterator = self.coroutine.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                request = iterator.send(value) if error is None else iterator.throw(error)
            except StopIteration as stop:
                return stop.value
            count += 1
            if count == self.point:
                self.scope.cancel()
            value = error = None
            try:
                value = yield request
            except BaseException as thrown:
                error = thrown


def test_cancels_at_random_moments(start: Callable[..., Pool], run: Run) -> None:
    """I5: many tasks, each cancelled at some moment of its call: nothing held, nothing mixed up, full capacity."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    pool = start(workers=2, grace=30)

    async def call(number: int) -> None:
        body = f"body {number}"
        with anyio.move_on_after(rng.uniform(0, 0.01)):
            assert f'"body": "{body}"'.encode() in await aget(pool, "/echo", body)

    async def main() -> None:
        for _ in range(20):
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(call, number)

    run(main)
    recovered(pool, 2)


def test_a_scope_of_ours(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """C1, C2: a CancelScope cancelled from a thread, and one whose time is up, free a task that waits."""
    pool = start(workers=1)
    target = f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"

    async def main() -> None:
        with CancelScope() as scope:

            def cancel() -> None:
                wait_until((tmp_path / "here").exists)
                scope.cancel("bye")

            thread = threading.Thread(target=cancel)
            thread.start()
            with pytest.raises(JobClosed, match="bye"):
                await aget(pool, target)
            await anyio.to_thread.run_sync(thread.join)
        with CancelScope(timeout=0.1), pytest.raises(JobClosed) as caught:
            await aget(pool, target, lease_timeout=10)
        assert isinstance(caught.value.__cause__, DeadlineExceeded)

    run(main)
    recovered(pool, 1)


def test_a_scope_of_ours_while_queued(start: Callable[..., Pool], run: Run) -> None:
    """C1: also where the task waits for a worker."""
    pool = start(workers=1)

    async def main() -> None:
        async with await pool.aopen(Request("GET", "/endless")):
            with CancelScope(timeout=0.05), pytest.raises(JobClosed):
                await aget(pool, "/hello")
            with CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def call() -> None:
                        with pytest.raises(JobClosed, match="bye"):
                            await aget(pool, "/hello")

                    group.start_soon(call)
                    await until(lambda: pool.stats().waiting == 1)
                    scope.cancel("bye")

    run(main)
    recovered(pool, 1)


def test_a_close_while_another_task_reads(start: Callable[..., Pool], run: Run) -> None:
    """X, C2: the reader is freed at once, with JobClosed."""
    pool = start(workers=1)

    async def main() -> None:
        job = await pool.aopen(Request("GET", "/stream?count=2&pause=1000"))
        assert await job.read()
        async with anyio.create_task_group() as group:

            async def read() -> None:
                with pytest.raises(JobClosed, match=r"close\(\) was called"):
                    await job.read()

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            job.close()

    run(main)
    recovered(pool, 1)


def test_two_readers(pool: Pool, run: Run) -> None:
    """X: a second reader of a job is told so, and does no harm to the first."""

    async def main() -> None:
        job = await pool.aopen(Request("GET", "/stream?count=2&pause=0.3"))
        async with anyio.create_task_group() as group:

            async def read() -> None:
                assert b"".join([piece async for piece in job]).count(b"data:") == 2

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="being read already"):
                await job.read()

    run(main)


def test_pool_close_frees_tasks(start: Callable[..., Pool], run: Run) -> None:
    """W11, C1: the drain time passes, and whoever waits is told."""
    pool = start(workers=1)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            begun = anyio.Event()

            async def read() -> None:
                with pytest.raises(JobClosed, match="the pool was closed"):
                    async with await pool.aopen(Request("GET", "/endless")) as job:
                        async for _ in job:
                            begun.set()

            async def wait() -> None:
                await begun.wait()
                with pytest.raises(PoolClosed):
                    await aget(pool, "/hello")

            group.start_soon(read)
            group.start_soon(wait)
            await until(lambda: pool.stats().waiting == 1)
            await pool.aclose(drain=0.05)

    run(main)


def drop(jobs: list[Any]) -> None:
    """Let go of the only references to jobs."""
    jobs.clear()
    gc.collect()


def test_a_job_that_is_dropped(start: Callable[..., Pool], run: Run) -> None:
    """C1: the finalizer ends it, with a ResourceWarning."""
    pool = start(workers=1)

    async def main() -> None:
        job = [await pool.aopen(Request("GET", "/endless"))]
        with pytest.warns(ResourceWarning, match="dropped before its end"):
            drop(job)
        assert await aget(pool, "/hello", lease_timeout=10) == b"hello"

    run(main)


def test_a_job_that_is_dropped_in_its_upload(start: Callable[..., Pool], run: Run) -> None:
    """C1, H6: the task that pulls its body holds it not, and ends with it."""
    pool = start("tests.async_handlers:app", workers=1)
    closed = []

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"piece"
                await anyio.sleep(0.001)
        finally:
            closed.append(True)

    async def main() -> None:
        job = [await pool.aopen(Request("POST", "/echo", body=body()))]
        with pytest.warns(ResourceWarning, match="dropped before its end"):
            drop(job)
        await until(lambda: closed)

    run(main)


def test_a_loop_that_ends_with_jobs_open(start: Callable[..., Pool], run: Run) -> None:
    """C1, W11: what was open in a loop that is gone can be closed from outside; nothing is held for ever."""
    pool = start(workers=1)

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"piece"
            await anyio.sleep(0.001)

    job = run(lambda: pool.aopen(Request("POST", "/endless", body=body())))
    job.close()
    recovered(pool, 1)


def test_a_killed_handler_is_gone(start: Callable[..., Pool], run: Run, tmp_path: Path) -> None:
    """C3: a cancelled task's handler that does not end is killed with its worker."""
    pool = start(workers=1, grace=0.05)
    pid = pool.workers()[0].pid

    async def main() -> None:
        with anyio.move_on_after(0.1):
            await aget(pool, f"/stubborn?here={tmp_path / 'here'}")

    run(main)
    wait_gone([pid], 5)
    recovered(pool, 1)


def test_slow_streams(start: Callable[..., Pool], run: Run) -> None:
    """X, T10: 50 slow streams at once in one task group: each token comes in order, none is held back to the end."""
    pool = start("tests.asgi_apps:app", workers=50, preload=True)
    lags: list[float] = []

    async def stream() -> None:
        numbers = []
        async with await pool.aopen(Request("GET", "/stream?count=10&pause=0.05")) as job:
            async for piece in job:
                for line in piece.splitlines():
                    number, written = line.split()
                    numbers.append(int(number))
                    lags.append(time.monotonic() - float(written))
        assert numbers == list(range(10))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(stream)

    run(main)
    assert len(lags) == 500
    lags.sort()
    assert lags[250] < 0.25  # half of a stream's whole length


@contextlib.contextmanager
def waiting_task(pool: Pool, target: str, body: Any = None, *, cancel: bool = False) -> Generator[list[object]]:
    """A task that waits for the worker, in a loop that is then held until the block ends; gives what comes of it."""
    held, free = threading.Event(), threading.Event()
    found: list[object] = []

    async def main() -> None:
        task = asyncio.create_task(aget(pool, target, body))
        await until(lambda: pool.stats().waiting == 1)
        held.set()
        assert free.wait(20)
        if cancel:
            task.cancel()
        found.extend(await asyncio.gather(task, return_exceptions=True))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert held.wait(20)
        yield found
    finally:
        free.set()
        thread.join()


def test_whoever_gives_up_a_worker_begins_the_next_job(start: Callable[..., Pool], tmp_path: Path) -> None:
    """W4: the worker does not idle until the caller that has waited longest wakes up."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/stream?count=2&pause=0.01"))
    (tmp_path / "go").touch()
    target = f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'go'}"
    with waiting_task(pool, target) as found:
        list(job)
        wait_until((tmp_path / "here").exists)
        assert pool.stats().busy == 1
    assert found == [b"went"]
    recovered(pool, 1)


@pytest.mark.parametrize("body", ["none", "endless"])
def test_a_cancel_of_a_job_that_was_begun_for_its_caller(start: Callable[..., Pool], tmp_path: Path, body: str) -> None:
    """C3, C5: it ends as any job that its caller leaves, and the worker stays warm; the source is closed."""
    pool = start(workers=1, grace=30)
    pid = pool.workers()[0].pid
    closed = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    job = pool.open(Request("GET", "/stream?count=2&pause=0.01"))
    target = f"/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"
    with waiting_task(pool, target, endless() if body == "endless" else None, cancel=True) as found:
        list(job)
        wait_until((tmp_path / "here").exists)
    assert isinstance(found[0], asyncio.CancelledError)
    assert pool.stats().outcomes["left"] == 1
    recovered(pool, 1)
    assert pool.workers()[0].pid == pid


def test_a_death_before_the_caller_that_it_was_begun_for_wakes_up(start: Callable[..., Pool]) -> None:
    """F1, W4: it is told what became of its job, which is not tried again."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/stream?count=2&pause=0.01"))
    with waiting_task(pool, "/die?how=segfault") as found:
        list(job)
        wait_until(lambda: pool.stats().deaths == 1)
    assert isinstance(found[0], WorkerDied)
    recovered(pool, 1)
    assert pool.stats().deaths == 1
