"""What tasks of an event loop pay: round trips at pool.aopen and through httpx2, ASGI apps, and many slow streams."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator

import anyio
import httpx2

from runner import Pool, Request
from scripts.measure.figures import SMALL, Floor, Row, middle, show
from transport.httpx2 import AsyncTransport, Transport

URL = "http://app.local"
PAUSE = 0.05
TOKENS = 100
FEW = 10


class Nothing(httpx2.BaseTransport):
    """A transport that answers at once, without sending anything."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=SMALL)


class AsyncNothing(httpx2.AsyncBaseTransport):
    """The same for tasks."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=SMALL)


async def interleave(rounds: int, *calls: Callable[[], Awaitable[object]]) -> list[list[float]]:
    """Await one after the other, round by round; the times of each, in microseconds."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + rounds // 10):
        for call, own in zip(calls, times, strict=True):
            began = time.perf_counter()
            await call()
            if number >= rounds // 10:
                own.append((time.perf_counter() - began) * 1e6)
    return times


def round_trips(rounds: int) -> Iterator[Row]:
    """A small POST by tasks and threads, to a native handler and to an ASGI app, in one run."""

    async def measure() -> list[list[float]]:
        with Floor() as floor:

            async def ping() -> None:
                floor.ping()

            async def opened() -> None:
                async with await native.aopen(Request("POST", "/echo", body=SMALL)) as job:
                    async for _ in job:
                        pass

            async def from_thread() -> None:
                with asgi.open(Request("POST", "/echo", body=SMALL)) as job:
                    for _ in job:
                        pass

            async with (
                httpx2.AsyncClient(transport=AsyncTransport(native)) as client,
                httpx2.AsyncClient(transport=AsyncNothing()) as nothing,
            ):
                with httpx2.Client(transport=Transport(native)) as threads, httpx2.Client(transport=Nothing()) as none:

                    async def in_thread() -> None:
                        threads.post(f"{URL}/echo", content=SMALL)

                    async def in_thread_nothing() -> None:
                        none.post(f"{URL}/echo", content=SMALL)

                    return await interleave(
                        rounds,
                        ping,
                        opened,
                        from_thread,
                        lambda: nothing.post(f"{URL}/echo", content=SMALL),
                        lambda: client.post(f"{URL}/echo", content=SMALL),
                        in_thread_nothing,
                        in_thread,
                    )

    with (
        Pool("scripts.measure.handlers:handler", workers=1, preload=True) as native,
        Pool("scripts.measure.handlers:asgi", workers=1, preload=True) as asgi,
    ):
        raw, opened, through_asgi, empty, through, empty_thread, in_thread = anyio.run(measure)
    yield "256 B at pool.aopen, asyncio", f"{show(opened)}; {middle(opened) / middle(raw):.2f} x raw"
    yield "256 B at pool.open, an ASGI app", f"{show(through_asgi)}; {middle(through_asgi) / middle(raw):.2f} x raw"
    ratio = middle(in_thread) / (middle(empty_thread) + middle(raw))
    yield "256 B through httpx2.Client", f"{show(in_thread)}; {ratio:.2f} x (one that does nothing + raw)"
    ratio = middle(through) / (middle(empty) + middle(raw))
    yield "256 B through httpx2.AsyncClient", f"{show(through)}; {ratio:.2f} x (one that does nothing + raw)"


def slow_streams(streams: int) -> Iterator[Row]:
    """Many slow streams at once through one AsyncClient: how late each token is seen after it was written."""

    async def main() -> None:
        limits = httpx2.Limits(max_connections=None)
        transport = AsyncTransport(pool)

        async def read(client: httpx2.AsyncClient) -> None:
            async with client.stream("GET", f"{URL}/stream?{TOKENS}") as response:
                async for line in response.aiter_lines():
                    lags.extend(_lags(line.encode()))

        async with (
            httpx2.AsyncClient(transport=transport, timeout=None, limits=limits) as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(streams):
                group.start_soon(read, client)

    lags: list[float] = []
    with Pool("scripts.measure.handlers:asgi", workers=streams, preload=True) as pool:
        anyio.run(main)
    yield f"{streams} streams at once, a token each {PAUSE * 1e3:.0f} ms, its lag", _lateness(lags, streams * TOKENS)


def thousand_streams(streams: int = 1000) -> Iterator[Row]:
    """So many streams at once in one event loop, a process for each and then two for all: the lag of their tokens."""

    async def main() -> None:
        async def read() -> None:
            async with await pool.aopen(Request("GET", f"/slow?{FEW}")) as job:
                async for piece in job:
                    lags.extend(_lags(piece))

        async with anyio.create_task_group() as group:
            for _ in range(streams):
                group.start_soon(read)

    for workers, concurrency in ((streams, 1), (2, streams // 2)):
        lags: list[float] = []
        began = time.monotonic()
        pool = Pool("scripts.measure.handlers:asgi", workers=workers, concurrency=concurrency, preload=True).start()
        started = time.monotonic() - began
        anyio.run(main)
        began = time.monotonic()
        pool.close()
        closed = time.monotonic() - began
        name = f"{streams} streams at once, {workers} workers, a token each 500 ms, its lag"
        yield name, _lateness(lags, streams * FEW)
        yield "  the pool's start, and its end", f"{started:.2f} s, {closed:.2f} s"


def _lags(piece: bytes) -> list[float]:
    """How many milliseconds ago each token of this piece was written."""
    now = time.monotonic()
    return [(now - float(when)) * 1e3 for when in piece.split()[1::2]]


def _lateness(lags: list[float], tokens: int) -> str:
    if len(lags) != tokens:
        raise RuntimeError(f"{len(lags)} tokens came of {tokens}")
    late = sum(lag > PAUSE * 1e3 for lag in lags)
    return f"{show(lags, 'ms')}; {late} of {tokens} later than {PAUSE * 1e3:.0f} ms"
