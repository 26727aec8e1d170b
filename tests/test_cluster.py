"""runner.cluster on a real Ray cluster of several nodes on this machine: what stays the same, and what a node adds."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import pytest
import ray
import requests
import trustme
from ray.cluster_utils import Cluster
from requests.exceptions import ChunkedEncodingError

from runner import (
    CancelScope,
    ConfigurationError,
    HandlerRaised,
    InvalidRequest,
    JobClosed,
    LeaseTimeout,
    NodeLost,
    Pool,
    PoolClosed,
    PoolForked,
    QueueFull,
    ReadTimeout,
    Request,
    Retry,
    Sandbox,
    StartError,
    WorkerDied,
)
from runner.cluster import ClusterPool, ClusterTLS, nodes
from runner.cluster.link import GIVE_UP
from runner.events import JobEnded, JobStarted, WorkerEnded
from tests.cluster_handlers import record
from tests.documented import Block, blocks
from tests.processes import kill, wait_gone
from tests.serving import ROOT, Process
from tests.waiting import wait_until
from transport import httpx2 as blastdoor_httpx2
from transport.requests import Transport

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:.*:FutureWarning")]

HANDLER = "tests.cluster_handlers:app"
URL = "http://app.local"
STORE = 80 << 20

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""The settings that docs/cluster.md advises: a node that is gone is found in seconds."""


def _is_pool_s(process: psutil.Process) -> bool:
    """Whether this is a zygote or a worker: by its title, or by its program as long as it has none."""
    return any("zygote" in argument or argument.startswith("blastdoor: ") for argument in process.cmdline())


def zygotes() -> set[int]:
    """The zygotes and workers below this process, which all belong to agents here."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _is_pool_s(process):
                found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """W11: after each test no agent's processes are left, and no thread of a pool's. Ray's stay with its cluster."""
    yield
    gc.collect()
    wait_until(lambda: not zygotes(), 15)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("blastdoor")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes."""
    before = {name: os.environ.get(name) for name in HEALTH}
    children = set(psutil.Process().children(recursive=True))
    os.environ.update(HEALTH)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE}
    )
    try:
        cluster.add_node(num_cpus=2, object_store_memory=STORE)
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    left = [process.pid for process in psutil.Process().children(recursive=True) if process not in children]
    wait_gone(left, 20)


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[..., ClusterPool]]:
    """Starts pools on the cluster, by default with two workers on each node, and closes them after the test."""
    pools: list[ClusterPool] = []

    def start_pool(handler: Any = HANDLER, **settings: Any) -> ClusterPool:
        settings.setdefault("workers", 2)
        pool = ClusterPool(handler, address=cluster.address, **settings)
        pools.append(pool)
        return pool.start()

    yield start_pool
    for pool in pools:
        pool.close(drain=0)


@pytest.fixture
def pool(start: Callable[..., ClusterPool]) -> ClusterPool:
    return start()


@pytest.fixture
def third_node(cluster: Cluster) -> Iterator[Any]:
    """One more node, which a test may do with what it likes."""
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    yield node
    for process in node_processes(node):
        with contextlib.suppress(psutil.Error):
            process.resume()
    with contextlib.suppress(Exception):
        cluster.remove_node(node, allow_graceful=False)


def node_processes(node: Any) -> list[psutil.Process]:
    """All processes of a node, but for the workers below its agents."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(info.process.pid)
                found += [process, *process.children(recursive=True)]
    return [process for process in found if not is_ours(process)]


def is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(_is_pool_s(one) for one in [process, *process.parents()[:3]])
    return False


def get(pool: ClusterPool, target: str, body: object = None, **timeouts: Any) -> bytes:
    with pool.open(Request("POST", target, body=body), **timeouts) as job:  # type: ignore[arg-type]
        return b"".join(job)


def agents() -> dict[str, int]:
    """The pids of the agents by their nodes' ids, from the zygotes' parents."""
    return {str(pid): psutil.Process(pid).ppid() for pid in zygotes()}


def in_threads(calls: Sequence[Callable[[], object]]) -> list[object]:
    """What came of calls that are made at once, each in a thread: its value, or its exception."""
    outcomes: list[object] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            outcomes[place] = calls[place]()
        except BaseException as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# -- the same as on one machine ----------------------------------------------------------------------


def test_ray_is_not_imported() -> None:
    """D1: importing runner and the transports imports no Ray."""
    code = "import runner, transport.requests, transport.gateway, runner.pool, sys; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_round_trips(pool: ClusterPool) -> None:
    """D1: what a job gives and raises is what it gives and raises on one machine."""
    with Pool(HANDLER, workers=2) as local:
        for one in (pool, local):
            with one.open(Request("POST", "/mirror?a=b", [("X-A", "1")], body=b"abc")) as job:
                assert (job.head.status, job.read(), job.read()) == (200, b"abc", b"")
                assert job.settled
                assert job.finished
            with one.open(Request("POST", "/headers", body=b'[["x-a", "1"], ["X-A", "2"]]')) as job:
                assert [pair for pair in job.head.headers if pair[0].lower() == "x-a"] == [("x-a", "1"), ("X-A", "2")]
            with pytest.raises(HandlerRaised, match="boom") as caught:
                one.open(Request("GET", "/raise"))
            assert "do_raise" in caught.value.fault.traceback
            with pytest.raises(WorkerDied) as died:
                one.open(Request("GET", "/die"))
            assert died.value.fault.signal == "SIGSEGV"
            with one.open(Request("GET", "/die?late=1")) as job, pytest.raises(WorkerDied):
                assert job.read() == b"first piece"
                job.read()
            with one.open(Request("GET", "/raise_late")) as job, pytest.raises(HandlerRaised):
                list(job)
            with pytest.raises(ReadTimeout):
                one.open(Request("GET", "/never_read"), read_timeout=0.2)
            with pytest.raises(InvalidRequest):
                one.open(Request("GET", "/", [("x", "y" * 300_000)]))
            assert get(one, "/hello") == b"hello"  # type: ignore[arg-type]


def test_clients(pool: ClusterPool) -> None:
    """D1: requests and httpx2 take it for a pool; a worker's death is a 500."""
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        assert session.get(f"{URL}/hello").text == "hello"
        died = session.get(f"{URL}/die")
        assert died.status_code == 500
        assert died.json()["signal"] == "SIGSEGV"
        with pytest.raises(ChunkedEncodingError), session.get(f"{URL}/die?late=1", stream=True) as response:
            response.content  # noqa: B018

    async def use() -> None:
        async with httpx2.AsyncClient(transport=blastdoor_httpx2.AsyncTransport(pool), base_url=URL) as client:
            assert (await client.get("/hello")).text == "hello"
            assert (await client.post("/mirror", content=pieces(b"a", b"b"))).content == b"ab"
            assert (await client.get("/die")).status_code == 500
            with anyio.move_on_after(0.3) as scope:
                await client.get("/never_read")
            assert scope.cancelled_caught

    anyio.run(use)
    anyio.run(use, backend="trio")


async def pieces(*found: bytes) -> AsyncIterator[bytes]:
    for piece in found:
        await anyio.lowlevel.checkpoint()
        yield piece


def test_uploads(pool: ClusterPool) -> None:
    """D1, H6: bodies of every kind, of any size; one that is not wanted ends, and one that fails ends its job."""
    block = bytes(range(256)) * 100
    assert get(pool, "/mirror", block * 40) == block * 40
    assert get(pool, "/mirror", (block for _ in range(40))) == block * 40
    assert get(pool, "/count", iter([])) == b"0"
    closed = threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                yield block
        finally:
            closed.set()

    with pool.open(Request("POST", "/answer_early", body=endless())) as job:
        assert job.head.status == 413
        assert list(job) == [b"too large"]
    assert closed.wait(5)

    def failing() -> Iterator[bytes]:
        yield block
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        get(pool, "/count", failing())
    assert get(pool, "/hello") == b"hello"


def test_handler_by_value(start: Callable[..., ClusterPool]) -> None:
    """D1: a callable is sent to the nodes by value."""
    word = "by value"

    def handler(request: Any, response: Any) -> bytes:
        return word.encode()

    assert get(start(handler), "/") == b"by value"


def test_events_and_numbers(pool: ClusterPool, caplog: pytest.LogCaptureFixture) -> None:
    """D1, W10: events, numbers and logs of the nodes reach their host."""
    caplog.set_level(logging.DEBUG, "blastdoor")
    events: list[object] = []
    end = pool.subscribe(events.append)
    get(pool, "/hello")
    get(pool, "/print")
    with contextlib.suppress(WorkerDied):
        get(pool, "/die")
    jobs = [event for event in events if isinstance(event, (JobStarted, JobEnded))]
    assert [type(event) for event in jobs] == [JobStarted, JobEnded] * 3
    assert [(event.outcome, event.status) for event in jobs if isinstance(event, JobEnded)] == [
        *[("ok", 200)] * 2,
        ("died", None),
    ]
    wait_until(lambda: any(isinstance(event, WorkerEnded) for event in events))
    wait_until(lambda: pool.stats().deaths == 1)
    wait_until(lambda: pool.stats().idle == 4)
    wait_until(lambda: "last words" in caplog.text)
    assert pool.stats().outcomes == {"ok": 2, "died": 1}
    workers = pool.workers()
    assert len(workers) == 4
    assert all(worker.node for worker in workers)
    end()


def test_the_queue(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """D4, W4: callers wait in one queue for all nodes; a provider's limit holds over all nodes."""
    pool = start(workers=1, queue=1, per_provider={"slow": 1})
    from runner import JobContext

    slow = JobContext(provider="slow")
    until = f"/hold?until={tmp_path / 'go'}"
    first = pool.open(Request("GET", until), context=slow)
    with pytest.raises(LeaseTimeout):
        pool.open(Request("GET", "/hello"), context=slow, lease_timeout=0.1)  # the other node is free
    second = pool.open(Request("GET", until))
    assert {job._lane.link.node.name for job in (first, second)} == set(pool._host.links)  # type: ignore[attr-defined] # to an agent
    outcomes: list[object] = []
    waiting = threading.Thread(target=lambda: outcomes.append(get(pool, "/hello")))
    waiting.start()
    wait_until(lambda: pool.stats().waiting == 1)
    with pytest.raises(QueueFull):
        pool.open(Request("GET", "/hello"))
    with pytest.raises(JobClosed), CancelScope(timeout=0.05):
        pool._placement._queue = 5
        pool.open(Request("GET", "/hello"))
    (tmp_path / "go").touch()
    for job in (first, second):
        assert b"".join(job).endswith(b" done")
    waiting.join()
    assert outcomes == [b"hello"]


def test_settings() -> None:
    """D1: what can't work is refused when the pool is made, or at its start."""
    with pytest.raises(ConfigurationError, match="workers"):
        ClusterPool(HANDLER, workers=0)
    with pytest.raises(ConfigurationError, match="name"):
        ClusterPool(HANDLER, name="a:b")
    with pytest.raises(ConfigurationError, match="address"):
        ClusterPool(HANDLER, address="")
    with pytest.raises(StartError, match="no Ray cluster"):
        ClusterPool(HANDLER, address="127.0.0.1:1").start()
    pool = ClusterPool(HANDLER)
    pool.close()
    with pytest.raises(PoolClosed):
        pool.open(Request("GET", "/"))


def test_a_handler_that_does_not_load(cluster: Cluster) -> None:
    """D1: start raises with the worker's traceback, and nothing is left."""
    with pytest.raises(StartError, match="no_such_module"):
        ClusterPool("no_such_module:app", address=cluster.address, workers=1).start()


# -- the acceptance tests of the issue ---------------------------------------------------------------


def test_many_frames(pool: ClusterPool) -> None:
    """D2: 20,000 frames of 64 B come in their order, each once; so they do for four callers at a time."""
    expected = b"".join(map(record, range(20_000)))
    assert in_threads([lambda: get(pool, "/records?count=20000") == expected] * 4) == [True] * 4


def test_a_consumer_that_stalls(pool: ClusterPool) -> None:
    """D3: of 250 MiB that nobody reads little is held anywhere, and nobody else waits for it."""
    size = 250 << 20
    get(pool, f"/big?size={size // 50}")
    processes = [psutil.Process(), *map(psutil.Process, agents().values())]
    processes += [psutil.Process(worker.pid) for worker in pool.workers()]
    before = sum(process.memory_info().rss for process in processes)
    with pool.open(Request("GET", f"/big?size={size}")) as job:
        assert job.read()
        answers, cancels = [], []
        for _ in range(50):
            began = time.monotonic()
            assert get(pool, "/hello") == b"hello"
            answers.append(time.monotonic() - began)
            with CancelScope() as scope:
                other = pool.open(Request("GET", "/endless"))
                assert other.read()
                began = time.monotonic()
                scope.cancel()
                with pytest.raises(JobClosed):
                    other.read()
                cancels.append(time.monotonic() - began)
        grown = sum(process.memory_info().rss for process in processes) - before
        print("grown by", grown >> 20, "MiB; answers, cancels at most", max(answers), max(cancels))
        assert grown < 60 << 20
        assert sorted(answers)[45] < 0.1
        assert sorted(cancels)[45] < 0.1
        assert not job.settled


def test_cancels_at_random_instants(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """D4, C5: of 400 jobs that are cancelled at random instants none completes, and all workers are free soon after."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pool = start()
    get(pool, "/hello")

    def cancelled(number: int, after: float) -> bool:
        scope = CancelScope()
        timer = threading.Timer(after, scope.cancel)
        timer.start()
        try:
            with scope:
                get(pool, f"/complete?place={tmp_path}&name={number}&seconds=1.5")
            return False
        except JobClosed:
            return True
        finally:
            timer.join()

    for round_ in range(0, 400, 4):
        instants = [chance.random() ** 2 * 0.02 for _ in range(4)]
        calls = [lambda n=round_ + place, s=seconds: cancelled(n, s) for place, seconds in enumerate(instants)]
        assert in_threads(calls) == [True] * 4
    wait_until(lambda: pool._placement.numbers() == (0, 0), 2)
    began = [path for path in tmp_path.iterdir() if path.name.startswith("begun")]
    print("begun", len(began))
    assert in_threads([lambda: get(pool, "/hello", lease_timeout=2)] * 4) == [b"hello"] * 4
    wait_until(lambda: pool.stats().idle == 4, 5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("completed")]


def test_a_worker_dies(pool: ClusterPool, tmp_path: Path) -> None:
    """D5: killed in the middle of its body the caller has a body-read error, and its siblings lose nothing."""
    until = tmp_path / "go"
    jobs = [pool.open(Request("GET", f"/hold?until={until}")) for _ in range(4)]
    pids = [int(job.read()) for job in jobs]
    kill(pids[0])
    with pytest.raises(WorkerDied):
        jobs[0].read()
    until.touch()
    assert [b"".join(job) for job in jobs[1:]] == [b" done"] * 3
    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        assert session.get(f"{URL}/die").status_code == 500


def test_an_agent_dies(pool: ClusterPool) -> None:
    """D6: its streams end with a NodeLost, its workers are gone within a second, and the node serves again."""
    both = {psutil.Process(pid).ppid() for pid in zygotes()}
    jobs = [pool.open(Request("GET", "/stream?count=1000&pause=0.02")) for _ in range(4)]
    workers = [worker.pid for worker in pool.workers()]
    for pid in both:
        kill(pid)
    wait_gone(workers, 1)
    killed = time.monotonic()
    for job in jobs:
        with pytest.raises(NodeLost):
            list(job)
    print("told after", time.monotonic() - killed)
    assert get(pool, "/hello", lease_timeout=60) == b"hello"
    print("serving again after", time.monotonic() - killed)
    wait_until(lambda: len(pool._host.links) == 2)


def test_a_lost_node_is_a_502(pool: ClusterPool) -> None:
    """D6, F1: clients see a 502 that asks not to be tried again, and the request is not sent again."""
    outcomes: list[requests.Response] = []

    def call() -> None:
        with requests.Session() as session:
            session.mount(URL, Transport(pool))
            outcomes.append(session.get(f"{URL}/never_read"))

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: pool.stats().busy == 1)
    wait_until(lambda: any(worker.state == "busy" for worker in pool.workers()))
    for pid in set(agents().values()):
        kill(pid)
    thread.join()
    (response,) = outcomes
    assert response.status_code == 502
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["fault"] == "lost"
    assert pool.stats().outcomes == {"lost": 1}


def test_a_node_that_joins_and_stops(start: Callable[..., ClusterPool], third_node: Any) -> None:
    """D7: a node that joins is used within seconds; stopped, its callers are told in time, and the others serve on."""
    pool = start(workers=1)
    wait_until(lambda: len(pool._host.links) == 3)
    jobs = [pool.open(Request("GET", "/stream?count=100000&pause=0.01")) for _ in range(3)]
    (job,) = [job for job in jobs if job._lane.link.node.name == third_node.node_id]  # type: ignore[attr-defined] # to an agent
    job.read()
    for process in node_processes(third_node):
        process.suspend()
    stopped = time.monotonic()
    for other in jobs:
        if other is not job:
            other.close()
    with pytest.raises(NodeLost):
        list(job)
    told = time.monotonic() - stopped
    print("told after", told)
    assert told < 8
    for _ in range(20):
        assert get(pool, "/hello", lease_timeout=5) == b"hello"


def said(host: subprocess.Popen[str], *words: str) -> str:
    """Which of these lines a host has printed; Ray prints others beside them."""
    assert host.stdout is not None
    for line in host.stdout:
        if line.strip() in words:
            return line.strip()
    raise AssertionError(f"it has ended without a word of {words}")


def test_a_host_that_is_cut_off(cluster: Cluster, tmp_path: Path) -> None:
    """D7: where a host is not heard of any more, its jobs end with its lease; none completes, none is run twice."""
    code = f"""
import sys
from runner import JobFailed, Request
from runner.cluster import ClusterPool
with ClusterPool({HANDLER!r}, address={cluster.address!r}, workers=1) as pool:
    print("started", flush=True)
    try:
        job = pool.open(Request("GET", "/complete?place={tmp_path}&name=cut&seconds=6.2"))
        print("completed", flush=True)
    except JobFailed as error:
        print(error.fault.kind, flush=True)
"""
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert said(host, "started") == "started"
        wait_until((tmp_path / "begun-cut").exists)
        host.send_signal(signal.SIGSTOP)
        time.sleep(6.8)  # the lease, and what the job would have needed
        assert not (tmp_path / "completed-cut").exists()
        host.send_signal(signal.SIGCONT)
        assert said(host, "lost", "completed", "died") == "lost"
        assert host.wait(20) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["begun-cut"]
    finally:
        host.kill()
        host.communicate()


def test_a_host_that_is_killed(cluster: Cluster) -> None:
    """D7, W11: agents end with the last of their hosts, whatever became of it."""
    code = f"""
import time
from runner.cluster import ClusterPool
pool = ClusterPool({HANDLER!r}, address={cluster.address!r}, workers=1).start()
print("started", flush=True)
time.sleep(3600)
"""
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert said(host, "started") == "started"
    host.kill()
    host.communicate()
    wait_until(lambda: not zygotes(), 15)


@pytest.mark.parametrize("what", ["hostile_pickle", "hostile_error"])
def test_hostile_answers(pool: ClusterPool, what: str, tmp_path: Path) -> None:
    """D8: the host runs nothing of what a handler returns or raises; nor does its agent."""
    place = tmp_path / "run"
    if what == "hostile_pickle":
        assert b"mkdir" in get(pool, f"/{what}?place={place}")
    else:
        with pytest.raises(HandlerRaised, match="hostile"):
            get(pool, f"/{what}?place={place}")
    assert not place.exists()


# -- what else a cluster adds ------------------------------------------------------------------------


def test_workers_know_nothing_of_ray(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """D8: workers have none of Ray's variables; sandboxed they can't read its token, nor its processes' environment."""
    token = Path.home() / ".ray" / "blastdoor_test_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("secret")
    try:
        plain = json.loads(get(start(), f"/look_around?file={token}"))
        assert not [name for name in plain["names"] if name.startswith("RAY")]
        shut_in = json.loads(get(start(sandbox=Sandbox.default()), f"/look_around?file={token}"))
    finally:
        token.unlink()
    assert not [name for name in shut_in["names"] if name.startswith("RAY")]
    assert shut_in["read"] in ("PermissionError", "FileNotFoundError")
    assert shut_in["parents"] != "read"


def test_shared_agents(cluster: Cluster) -> None:
    """D1: pools of one name share their workers, whose last user ends them; another handler has its own."""
    settings: dict[str, Any] = {"address": cluster.address, "workers": 1}
    first = ClusterPool(HANDLER, name="shop", **settings)
    second = ClusterPool(HANDLER, name="shop", **settings)
    other = ClusterPool("tests.handlers:app", name="shop", **settings)
    with first.start(), other.start():
        with second.start():
            ours = {worker.pid for worker in first.workers()}
            assert ours == {worker.pid for worker in second.workers()}
            assert not ours & {worker.pid for worker in other.workers()}
        assert get(first, "/hello") == b"hello"
        assert {worker.pid for worker in first.workers()} == ours


def test_requests_that_are_done_again(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """F3, D1: `retry` is the pool's own, over all nodes; its counts tell of it."""
    environ = {"BLASTDOOR_TEST_TRIES": str(tmp_path / "tries"), "BLASTDOOR_TEST_DEATHS": "1"}
    pool = start("tests.retry_handlers:app", workers=1, retry=Retry(methods={"POST"}), set_env=environ)
    assert get(pool, "/") == b"POST "
    outcomes = dict(pool.stats().outcomes)
    outcomes.pop("not taken", None)  # its node was asked again while it had no worker yet
    assert outcomes == {"retried": 1, "ok": 1}


def test_agents_that_are_made_in_turns(start: Callable[..., ClusterPool], monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, D5: a large cluster's agents are made so many at once, and a start waits for all of them."""
    at_once: list[int] = []
    join = nodes.NodeManager._join

    def count(manager: nodes.NodeManager, name: str, address: str, cores: int) -> None:
        at_once.append(len(manager._began))
        join(manager, name, address, cores)

    monkeypatch.setattr(nodes, "JOINING", 1)
    monkeypatch.setattr(nodes, "SLOW", 60.0)
    monkeypatch.setattr(nodes.NodeManager, "_join", count)
    pool = start(workers=1)
    assert len(pool._host.links) == 2
    assert set(at_once) == {1}


def test_an_agent_that_is_slow_to_start(start: Callable[..., ClusterPool], monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, D5: it holds up the others for a moment only."""
    join = nodes.NodeManager._join
    others = threading.Event()
    begun: list[str] = []
    waited: list[bool] = []

    def wait_for_others(manager: nodes.NodeManager, name: str, address: str, cores: int) -> None:
        begun.append(name)
        if len(begun) == 1:
            waited.append(others.wait(30))
        join(manager, name, address, cores)
        others.set()

    monkeypatch.setattr(nodes, "JOINING", 1)
    monkeypatch.setattr(nodes, "SLOW", 0.5)
    monkeypatch.setattr(nodes.NodeManager, "_join", wait_for_others)
    assert len(start(workers=1)._host.links) == 2
    assert waited == [True]


def test_a_program_that_closes_no_pool(cluster: Cluster) -> None:
    """D1, W11: its end does, before Ray leaves the cluster: whatever was imported first."""
    code = f"""
from runner import Pool, Request
from runner.cluster import ClusterPool
pool = ClusterPool({HANDLER!r}, address={cluster.address!r}, workers=1).start()
print(*[worker.pid for worker in pool.workers()])
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_gone(pids, 2)


def test_what_is_no_request(start: Callable[..., ClusterPool]) -> None:
    """X5, D1: it is refused as by a pool of one machine."""
    with pytest.raises(TypeError, match="a pool opens a Request"):
        start().open("/hello")  # type: ignore[arg-type]


def test_shared_agents_of_other_processes() -> None:
    """D1: pools of one name and the same settings share their agents, whatever order sets have in their processes."""
    code = f"""
from runner import Retry
from runner.cluster import ClusterPool
pool = ClusterPool({HANDLER!r}, name="shop", workers=1, retry=Retry(methods=["GET", "HEAD", "PUT"]))
print(pool._agents.name)
"""
    names = set()
    for seed in "0123":
        environ = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        made = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        names.add(made.stdout)
    assert len(names) == 1


def test_serving(cluster: Cluster) -> None:
    """D1, G4: blastdoor serve on a cluster is what it is on one machine."""
    arguments = (HANDLER, f"--cluster={cluster.address}", "--workers=1", "--port=0", "--admin=127.0.0.1:0")
    with Process(*arguments) as served:
        assert requests.get(f"{served.url}/hello").text == "hello"
        assert requests.get(f"{served.url}/die").status_code == 500

        def workers() -> list[dict[str, Any]]:
            found = requests.get(f"{served.admin}/-/status.json").json()["pools"]["/"]["workers"]
            assert isinstance(found, list)
            return found

        wait_until(lambda: len(workers()) == 2)  # the one that died has a successor, of which its agent tells
        assert all(worker["node"] for worker in workers())
        assert 'blastdoor_workers{pool="/",state="idle"}' in requests.get(f"{served.admin}/-/metrics").text
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reloaded in")
        assert requests.get(f"{served.url}/hello").text == "hello"


def test_modules_beside_a_sandboxed_app(cluster: Cluster, tmp_path: Path) -> None:
    """D8, S: agents, which no sandbox shuts in, import nothing from their host's working directory."""
    for name in ("msgspec", "runner", "psutil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    code = f"""
from runner import Request, Sandbox
from runner.cluster import ClusterPool
with ClusterPool({HANDLER!r}, address={cluster.address!r}, workers=1, sandbox=Sandbox.default()) as pool:
    with pool.open(Request("GET", "/hello")) as job:
        assert b"".join(job) == b"hello"
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, env=env)
    assert not (tmp_path / "imported").exists()


def test_a_node_that_drains(start: Callable[..., ClusterPool], third_node: Any, tmp_path: Path) -> None:
    """D7: it gets no more jobs, and those that it has come to their ends."""
    pool = start(workers=1)
    wait_until(lambda: len(pool._host.links) == 3)
    until = tmp_path / "go"
    jobs = [pool.open(Request("GET", f"/hold?until={until}")) for _ in range(3)]
    drained = next(node for node in pool._placement.nodes() if node.name == third_node.node_id)
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster_address(pool)),
            *("--node-id", third_node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "a test", "--deadline-remaining-seconds", "600"),
        ],
        check=True,
        capture_output=True,
    )
    wait_until(lambda: drained.draining)
    for job in jobs:
        if job._lane.link.node is not drained:  # type: ignore[attr-defined] # to an agent
            job.close()
    for _ in range(10):
        assert get(pool, "/hello") == b"hello"
        assert drained.running == 1
    until.touch()
    (left,) = [job for job in jobs if not job.settled or job._closed_by is None]
    assert b"".join(left).endswith(b" done")


def cluster_address(pool: ClusterPool) -> str:
    assert pool._address is not None
    return pool._address


def test_pickles(pool: ClusterPool) -> None:
    """D1, R: sessions pickle, as on one machine: in this process it is the same pool, elsewhere one like it."""
    import pickle

    with requests.Session() as session:
        session.mount(URL, Transport(pool))
        with pickle.loads(pickle.dumps(session)) as copy:
            assert copy.get(f"{URL}/hello").text == "hello"
            assert copy.get_adapter(URL)._pool is pool
    code = """
import pickle, sys
from runner import Request
pool = pickle.loads(sys.stdin.buffer.read())
with pool, pool.open(Request("GET", "/hello")) as job:
    print(b"".join(job).decode(), len(pool._host.links), pool._placement._queue)
"""
    data = pickle.dumps(ClusterPool(HANDLER, address=pool._address, workers=1, queue=7))
    done = subprocess.run([sys.executable, "-c", code], input=data, stdout=subprocess.PIPE, check=True)
    assert b"hello 2 7" in done.stdout.splitlines()


def test_closing(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """D1, W11: close waits for the jobs under way up to its limit, and ends the rest."""
    pool = start(workers=1)
    job = pool.open(Request("GET", f"/hold?until={tmp_path / 'never'}"))
    assert job.read()
    quick = pool.open(Request("GET", "/stream?count=5&pause=0.05"))
    outcomes: list[object] = []
    reader = threading.Thread(target=lambda: outcomes.extend(in_threads([lambda: list(quick), lambda: list(job)])))
    reader.start()
    pool.close(drain=1)
    reader.join()
    assert isinstance(outcomes[0], list)
    assert isinstance(outcomes[1], JobClosed)
    assert not ray.is_initialized()
    with pytest.raises(PoolClosed):
        pool.open(Request("GET", "/hello"))


def test_dropped_jobs(pool: ClusterPool) -> None:
    """D4, C4: a job that is dropped without being read is ended, with a warning."""
    job = pool.open(Request("GET", "/endless"))
    assert job.read()
    found = [job]
    del job
    with pytest.warns(ResourceWarning, match="was dropped before its end"):
        found.clear()
    wait_until(lambda: pool._placement.numbers() == (0, 0))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_tasks(pool: ClusterPool, backend: str) -> None:
    """D1, X: 40 tasks on one loop at once; cancelled ones free their workers."""

    async def call(number: int, found: list[bytes]) -> None:
        async with await pool.aopen(Request("POST", "/mirror", body=b"%d" % number)) as job:
            found.append(b"".join([piece async for piece in job]))

    async def main() -> None:
        found: list[bytes] = []
        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(call, number, found)
        assert sorted(found) == sorted(b"%d" % number for number in range(40))
        with anyio.move_on_after(0.1):
            async with await pool.aopen(Request("GET", "/endless")) as job:
                async for _ in job:
                    pass
        with anyio.move_on_after(0.1):
            await pool.aopen(Request("GET", "/never_read"))

    anyio.run(main, backend=backend)
    wait_until(lambda: pool._placement.numbers() == (0, 0))


# -- what a hostile review found ---------------------------------------------------------------------


def test_time_limits_for_a_worker(start: Callable[..., ClusterPool]) -> None:
    """D4, W4: while workers are still at jobs that were left, others wait no longer than they said."""
    pool = start(workers=1, grace=3.0)
    for job in [pool.open(Request("GET", "/deaf")) for _ in range(2)]:
        job.close()
    began = time.monotonic()
    with pytest.raises(LeaseTimeout):
        pool.open(Request("GET", "/hello"), lease_timeout=0.3)
    assert time.monotonic() - began < 2
    assert get(pool, "/hello", lease_timeout=20) == b"hello"


def test_an_agent_that_has_forgotten_its_host(cluster: Cluster) -> None:
    """D7: it says so; the host joins anew, and none of its callers is failed for that."""
    settings: dict[str, Any] = {"address": cluster.address, "workers": 1, "name": "shop"}
    with ClusterPool(HANDLER, **settings).start() as pool, ClusterPool(HANDLER, **settings).start() as other:
        links = list(pool._host.links.values())
        for link in links:
            assert ray.get(link.actor.leave.remote(pool._host.name)) == b""
        for _ in range(5):
            assert get(pool, "/hello", lease_timeout=20) == b"hello"
        # One node after the other finds it out: by a job that is given back, or by the next heartbeat.
        wait_until(lambda: len(pool._host.links) == 2 and not set(links) & set(pool._host.links.values()))
        assert get(other, "/hello") == b"hello"


def test_a_host_that_pauses_hurts_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """D7: a host that has been stopped comes back, and the agents that it shares go on."""
    code = f"""
import sys
from runner import Request
from runner.cluster import ClusterPool
with ClusterPool({HANDLER!r}, address={cluster.address!r}, workers=1, name="shop") as pool:
    print("started", flush=True)
    sys.stdin.readline()
    with pool.open(Request("GET", "/hello"), lease_timeout=20) as job:
        print(b"".join(job).decode(), flush=True)
"""
    with ClusterPool(HANDLER, address=cluster.address, workers=1, name="shop") as pool:
        host = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
        try:
            assert host.stdout is not None
            assert host.stdout.readline() == "started\n"
            until = tmp_path / "go"
            job = pool.open(Request("GET", f"/hold?until={until}"))
            host.send_signal(signal.SIGSTOP)
            time.sleep(6)
            host.send_signal(signal.SIGCONT)
            out, err = host.communicate("go\n", timeout=30)
            assert out == "hello\n", err
            until.touch()
            assert b"".join(job).endswith(b" done")
        finally:
            host.kill()
            host.communicate()


def test_an_agent_that_was_silent_is_sent_no_job(start: Callable[..., ClusterPool], tmp_path: Path) -> None:
    """D7: a host that was stopped itself finds its agents silent before it sends them a job, not a moment after."""
    pool = start(workers=1)
    for number in range(3):
        until = tmp_path / str(number)
        clients = list(pool._host.links.values())
        for client in clients:
            client._heard -= GIVE_UP + 1  # as after so long a stop, before the next heartbeat
        with pool.open(Request("GET", f"/hold?until={until}"), lease_timeout=30) as job:
            for client in clients:
                client.beat()
            until.touch()
            assert b"".join(job).endswith(b" done")


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.needs_cluster], ids=str)
def test_the_documentation_s_examples(cluster: Cluster, tmp_path: Path, block: Block) -> None:
    """D1: they run as they stand, and print what they say."""
    block.write_files(tmp_path)
    (tmp_path / "example.py").write_text(block.text)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    block.check_output(done.stdout)


def test_a_start_that_fails_leaves_nothing(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, W11: after a start that failed nobody waits, or spins, for nodes that are not there."""
    once = tmp_path / "once.py"
    once.write_text(
        "import os\n"
        f"try:\n    os.mkdir({str(tmp_path / 'taken')!r})\n"
        "except FileExistsError:\n    raise ImportError('only once') from None\n"
        "def app(request, response):\n    return b'once'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ClusterPool("once:app", address=cluster.address, workers=1)
    with pytest.raises(StartError, match="only once"):
        pool.start()
    assert not pool._placement.nodes()
    assert not pool.ready
    with pytest.raises(StartError):
        pool.open(Request("GET", "/"), lease_timeout=1)
    pool.close()


def test_a_connection_breaks(pool: ClusterPool) -> None:
    """D6: the lane alone, though the agent lives: its caller is told, the worker is free, and all others go on."""
    job, other = (pool.open(Request("GET", "/stream?count=200&pause=0.01")) for _ in range(2))
    with socket.socket(fileno=os.dup(job._channel.response_fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(NodeLost, match="connection to its agent broke"):
        list(job)
    assert len(list(other)) > 10
    wait_until(lambda: pool._placement.numbers() == (0, 0))
    wait_until(lambda: pool.stats().idle == 4)
    assert len(pool._host.links) == 2


def test_a_source_that_ends_the_program(pool: ClusterPool) -> None:
    """D4, H6: what closing a body's source raises, of whatever kind, keeps no worker and no slot."""

    def source() -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            raise SystemExit(3)

    with CancelScope() as scope:
        threading.Timer(0.2, scope.cancel).start()
        with pytest.raises((SystemExit, JobClosed)):
            pool.open(Request("POST", "/never_read", body=source()))
    wait_until(lambda: pool._placement.numbers() == (0, 0))
    wait_until(lambda: pool.stats().idle == 4)


def test_ray_is_shut_down_under_the_pool(start: Callable[..., ClusterPool]) -> None:
    """D7: jobs go on, since they don't go through it; nobody connects anew behind the user's back."""
    pool = start(workers=1)
    job = pool.open(Request("GET", "/stream?count=1000&pause=0.05"))
    ray.shutdown()
    assert job.read()
    assert job.read()
    job.close()
    assert get(pool, "/hello", lease_timeout=10) == b"hello"
    pool.close(drain=0)
    assert not ray.is_initialized()


def test_forks(pool: ClusterPool) -> None:
    """W11: a forked child can neither use the pool nor make one: the connection is its parent's."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                pool.open(Request("GET", "/hello"))
            except PoolForked:
                try:
                    ClusterPool(HANDLER, address=pool._address).start()
                except PoolForked:
                    code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert get(pool, "/hello") == b"hello"


def test_finalizers(pool: ClusterPool) -> None:
    """D4, C4: a job that is collected while its line is in use ends; nobody waits for himself."""
    jobs = [pool.open(Request("GET", "/endless")) for _ in range(2)]
    for link in list(pool._host.links.values()):
        link.lock.acquire()
    with pool._placement._lock, pytest.warns(ResourceWarning):
        jobs.clear()
    for link in list(pool._host.links.values()):
        link.lock.release()
    wait_until(lambda: pool._placement.numbers() == (0, 0))


def test_slow_subscribers(pool: ClusterPool) -> None:
    """D1: one that is slow at what happens to workers keeps no caller waiting."""
    called, go = threading.Event(), threading.Event()

    def slow(event: object) -> None:
        if isinstance(event, WorkerEnded):
            called.set()
            go.wait(10)

    pool.subscribe(slow)
    with contextlib.suppress(WorkerDied):
        get(pool, "/die")
    assert called.wait(10)
    assert in_threads([lambda: get(pool, "/hello")] * 4) == [b"hello"] * 4
    go.set()


def test_close_while_it_starts(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, W11: start tells that the pool was closed, and its agents end, whose workers were still loading."""
    (tmp_path / "slow_to_load.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'loading')!r}).touch()\ntime.sleep(30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ClusterPool("slow_to_load:app", address=cluster.address, workers=1)
    outcomes: list[object] = []
    starter = threading.Thread(target=lambda: outcomes.extend(in_threads([pool.start])))
    starter.start()
    wait_until((tmp_path / "loading").exists)
    pool.close()
    starter.join()
    assert isinstance(outcomes[0], PoolClosed)


def test_connections_by_tls(cluster: Cluster, tmp_path: Path) -> None:
    """D1, D9: certificates of the user's own, on the nodes and here."""
    authority = trustme.CA()
    issued = authority.issue_cert("the.nodes")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "node.pem"))
    node = str(tmp_path / "node.pem")
    tls = ClusterTLS(cert=node, key=node, ca=str(tmp_path / "ca.pem"))
    with ClusterPool(HANDLER, address=cluster.address, workers=1, tls=tls) as pool:
        assert in_threads([lambda: get(pool, "/mirror", b"x" * 100_000)] * 8) == [b"x" * 100_000] * 8
        with pytest.raises(WorkerDied):
            get(pool, "/die")


def test_lanes(cluster: Cluster) -> None:
    """K5, D1: each worker of each node runs several jobs at once; numbers and placement count them."""
    with ClusterPool("tests.lane_handlers:async_app", address=cluster.address, workers=1, concurrency=4) as pool:
        nodes = len(pool._placement.nodes())
        jobs = [pool.open(Request("GET", "/wait")) for _ in range(4 * nodes)]
        with pytest.raises(LeaseTimeout):
            pool.open(Request("GET", "/hello"), lease_timeout=0.05)
        stats = pool.stats()
        assert (stats.running, stats.lanes) == (4 * nodes, 4 * nodes)
        wait_until(lambda: [worker.running for worker in pool.workers()] == [4] * nodes)
        for job in jobs:
            job.close()
        wait_until(lambda: pool.stats().idle == nodes)
        assert pool.stats().running == 0
