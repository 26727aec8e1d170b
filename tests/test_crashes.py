"""Deaths in great numbers: at every frame boundary, in the middle of frames, and between healthy requests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from runner import JobFailed, Pool, Request, WorkerDied
from tests.clients import job_of
from tests.processes import kill
from transport.requests import Transport

URL = "http://app.local"


def is_healthy(pool: Pool, number: int) -> bool:
    with pool.open(Request("POST", "/mirror", body=b"%d" % number), read_timeout=30) as job:
        return b"".join(job) == b"%d" % number


@pytest.mark.slow
def test_sigkill_at_every_boundary_and_within_frames(start: Callable[..., Pool]) -> None:
    """I1: SIGKILL at every frame boundary and in the middle of frames, 1,000 times: the next request is a 200."""
    pool = start(workers=2, preload=True)
    before_head = in_body = 0
    for number in range(1000):
        # The answer to /cut is 60 to 70 bytes of head, body and end; the worker dies after `number` of them.
        try:
            with pool.open(Request("GET", f"/cut?after={number % 70}"), read_timeout=30) as job:
                try:
                    assert b"".join(job) == b"a body of thirty bytes or less"
                    assert number % 70 >= 9 + 3 + 9 + 30 + 9
                except JobFailed:
                    in_body += 1
        except WorkerDied:
            before_head += 1
        assert is_healthy(pool, number)
    print("died before the head", before_head, "in the body", in_body)
    assert before_head > 100
    assert in_body > 400


@pytest.mark.slow
def test_sigkill_from_outside_at_any_time(start: Callable[..., Pool]) -> None:
    """I1: the same by a killer that takes any worker at any time: each request is right, or a named fault."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start(workers=2, preload=True)
    stop = threading.Event()
    kills = 0

    def kill_any() -> None:
        nonlocal kills
        while not stop.is_set():
            time.sleep(chance.random() * 0.01)
            workers = [worker for worker in list(pool._supervisor._workers.values()) if worker.ready]  # type: ignore[union-attr]
            if workers:
                pool._leases.kill(chance.choice(workers))
                kills += 1

    killer = threading.Thread(target=kill_any)
    killer.start()
    right = died = 0
    while kills < 300:
        try:
            assert is_healthy(pool, right)
            right += 1
        except WorkerDied as error:
            assert error.fault.signal == "SIGKILL"
            died += 1
    stop.set()
    killer.join()
    print("kills", kills, "right", right, "died", died)
    assert right > died
    assert is_healthy(pool, 0)


@pytest.mark.slow
def test_a_thousand_crashes_between_healthy_requests(start: Callable[..., Pool]) -> None:
    """I3: 1,000 crashes between healthy requests: every healthy one a 200, exactly 1,000 500s."""
    ways = ["segfault", "exit", "exit0", "SIGKILL", "SIGABRT"]
    statuses: list[int] = []
    lock = threading.Lock()
    with requests.Session() as session:
        session.mount(URL, Transport(start(workers=4, preload=True)))

        def call(thread: int) -> None:
            for number in range(250):
                healthy = session.post(URL + "/mirror", data=f"{thread}-{number}", timeout=60)
                crashed = session.get(f"{URL}/die?how={ways[number % len(ways)]}", timeout=60)
                with lock:
                    statuses.append(healthy.status_code)
                    statuses.append(crashed.status_code)
                    assert healthy.text == f"{thread}-{number}"
                    assert crashed.json()["fault"] == "died"

        threads = [threading.Thread(target=call, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses.count(200) == 1000
    assert statuses.count(500) == 1000
    assert len(statuses) == 2000


def test_deaths_with_streams_open(start: Callable[..., Pool]) -> None:
    """F3: one worker's death ends its own stream and no other."""
    pool = start(workers=3)
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        streams = [session.get(f"{URL}/stream?count=30&pause=0.01", stream=True) for _ in range(3)]
        (victim,) = [lane.worker for lane in pool._leases._leased if lane.job and lane.job() is job_of(streams[1])]
        kill(victim.pid)
        with pytest.raises(ChunkedEncodingError, match="SIGKILL"):
            streams[1].content  # noqa: B018
        for stream in (streams[0], streams[2]):
            assert stream.content.count(b"data:") == 30
