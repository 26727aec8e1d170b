"""The part of the soak's traffic that comes from tasks of one event loop, through httpx2."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
import httpx2

from runner import Pool
from scripts.trials.traffic import URL, Kind, expect
from transport.httpx2 import AsyncTransport

if TYPE_CHECKING:
    from scripts.trials.soak import Tally


async def task_plain(client: httpx2.AsyncClient, rng: random.Random) -> None:
    body = rng.randbytes(rng.randrange(300))
    answer = await client.post(f"{URL}/echo", content=body)
    expect(answer.status_code == 200 and answer.content == body, f"echo: {answer.status_code}")


async def task_upload(client: httpx2.AsyncClient, rng: random.Random) -> None:
    pieces = [rng.randbytes(rng.randrange(1, 30_000)) for _ in range(rng.randrange(1, 10))]

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    answer = await client.post(f"{URL}/echo", content=body())
    expect(answer.content == b"".join(pieces), f"upload: {answer.status_code}")


async def task_stream(client: httpx2.AsyncClient, rng: random.Random) -> None:
    seed, count = rng.getrandbits(32), rng.randrange(200)
    async with client.stream("GET", f"{URL}/stream?{seed},{count}") as answer:
        lines = [line async for line in answer.aiter_lines()]
    expect(lines == [f"{seed} {number}" for number in range(count)], f"stream: {lines[:3]} of {count}")


async def task_cancel(client: httpx2.AsyncClient, rng: random.Random) -> None:
    seed = rng.getrandbits(32)
    with anyio.move_on_after(rng.uniform(0, 0.02)):
        answer = await client.get(f"{URL}/stream?{seed},500")
        expected = b"".join(b"%d %d\n" % (seed, number) for number in range(500))
        expect(answer.content == expected, f"a cancelled stream: {len(answer.content)} bytes")


_TASKS: list[tuple[Callable[[httpx2.AsyncClient, random.Random], Awaitable[None]], float, frozenset[str]]] = [
    (task_plain, 100, frozenset({"ok"})),
    (task_upload, 10, frozenset({"ok"})),
    (task_stream, 20, frozenset({"ok"})),
    (task_cancel, 10, frozenset({"ok", "left"})),
]

ASYNC_KINDS = [Kind(run, weight, outcomes) for run, weight, outcomes in _TASKS]  # type: ignore[arg-type]


def run_tasks(pool: Pool, tally: Tally, callers: int, seed: int, stop: threading.Event) -> None:
    """As many tasks that call, until `stop`; each of them at least once per kind."""
    anyio.run(_main, pool, tally, callers, seed, stop)


async def _main(pool: Pool, tally: Tally, callers: int, seed: int, stop: threading.Event) -> None:
    async with (
        httpx2.AsyncClient(transport=AsyncTransport(pool), timeout=120) as client,
        anyio.create_task_group() as group,
    ):
        for number in range(callers):
            group.start_soon(_call_on, client, tally, f"{seed}/task {number}", stop)


async def _call_on(client: httpx2.AsyncClient, tally: Tally, seed: str, stop: threading.Event) -> None:
    rng = random.Random(seed)
    caller = object()
    first = [run for run, _, _ in _TASKS]
    while first or not stop.is_set():
        run = first.pop() if first else rng.choices([run for run, _, _ in _TASKS], [each[1] for each in _TASKS])[0]
        name = getattr(run, "__name__", "")
        tally.begin(caller, name)
        error: BaseException | None = None
        try:
            await run(client, rng)
        except Exception as raised:  # noqa: BLE001 - it is counted
            error = raised
        tally.end(caller, name, error)
