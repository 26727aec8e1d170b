"""The connections between a host and an agent, without Ray: who is let in, what is bounded, and how they break."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import random
import resource
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
import uvloop

from runner import (
    ConfigurationError,
    JobClosed,
    LeaseTimeout,
    NodeLost,
    Pool,
    PoolClosed,
    Request,
    WorkerDied,
    WorkerMisbehaved,
)
from runner.cluster import ClusterTLS, agent_server, link
from runner.cluster.agent_outbox import AgentOutbox
from runner.cluster.agent_server import AgentServer
from runner.cluster.handshake import CONTROL, GREETING_SIZE, LANE, NAME, NONCE, Stranger, connect, greeting, make_secret
from runner.cluster.host import ClusterHost
from runner.cluster.job import RemoteDispatch
from runner.cluster.lane import OUTCOME, TAKEN
from runner.cluster.link import AgentLink
from runner.cluster.messages import Heartbeat, JoinReply, encode
from runner.cluster.placement import Node, Placement
from runner.events import Events
from runner.model.request import Upload
from runner.wire.frames import BODY, END, HEAD, MAX_HEAD, REQUEST, pack_header
from runner.wire.frames import encode as frame
from runner.wire.messages import JobContext, RequestHead, ResponseHead
from tests.waiting import wait_until

HOST = "h" * 32
HANDLER = "tests.cluster_handlers:app"


class Agent:
    """What an agent's server knows of its agent: a pool, and hosts, all of which it knows."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.known = True

    def pool_for(self, host: str) -> Pool | None:
        return self.pool if self.known else None

    def heard_of(self, host: str) -> None:
        """It lives."""

    def heartbeat(self, host: str, seen: int, level: int) -> bytes:
        return encode(Heartbeat(self.known, 0, 1, 0, 0, 0, self.pool.stats().running, [], [], [], 0))


class Wire:
    """An agent's server in this process, and a host with a link to it."""

    def __init__(self, tls: ClusterTLS | None = None, handler: str = HANDLER, **settings: Any) -> None:
        self.pool = Pool(handler, **{"workers": 2, **settings}).start()
        self.agent = Agent(self.pool)
        self.server = AgentServer(self.agent, make_secret())
        self.address = "127.0.0.1", self.server.start("127.0.0.1", None if tls is None else tls.for_agents())
        self.placement = Placement()
        self.host = ClusterHost(HOST, self.placement, Events(), tls)
        self.host.begin()
        self.node = Node("node", "127.0.0.1", 2)
        self.numbers = iter(range(1 << 30))

    def join(self, address: tuple[str, int] | None = None) -> AgentLink:
        """Have the host use the agent."""
        host, port = address or self.address
        joined = JoinReply(2, address=host, port=port, secret=self.server.secret)
        made = AgentLink(None, self.node, joined, self.host)
        made.begin()
        self.host.links["node"] = made
        self.placement.add(self.node)
        return made

    def open(
        self, target: str, body: Any = None, method: str = "POST", timeout: float | None = 10, retries: int = 0
    ) -> Any:
        """As `ClusterPool.open`."""
        job_id = f"j-{next(self.numbers)}"
        request, times = Request(method, target), (None, None)
        call = RemoteDispatch(request, Upload(body), JobContext(), job_id, timeout, times, retries)
        return call.run(self.host)

    def get(self, target: str, body: Any = None) -> bytes:
        with self.open(target, body) as job:
            return b"".join(job)

    def dial(self) -> socket.socket:
        """A connection that has said nothing yet."""
        return socket.create_connection(self.address, 10)

    def lane(self) -> socket.socket:
        """A connection that is a lane."""
        return connect(self.address, self.server.secret, LANE, HOST, 5)[0]

    def close(self) -> None:
        self.host.closing = True
        for job in self.host.leases.jobs():
            job.close()
        self.host.end()
        self.pool.close(drain=0)
        self.server.close()


@pytest.fixture(scope="module", autouse=True)
def first_uvloop() -> None:
    """libuv has a pipe for signals from its first loop on, as long as the process lasts."""
    uvloop.new_event_loop().close()


@pytest.fixture
def wires() -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(**settings: Any) -> Wire:
        made.append(Wire(**settings))
        return made[-1]

    yield make
    for wire in made:
        wire.close()


@pytest.fixture
def wire(wires: Callable[..., Wire]) -> Wire:
    return wires()


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed the connection, or does so within seconds."""
    sock.settimeout(10)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def head(method: str = "GET", target: str = "/hello", *, body: bool = False) -> bytes:
    return encode(RequestHead(method, target, [], "http", ("x", 80), body, JobContext("j"), ("127.0.0.1", 1)))


def test_lanes_that_nobody_uses(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: a host keeps connections for as many jobs as it has had at once lately, and no more."""
    wire.join()
    with wire.open("/big?size=20000000") as one, wire.open("/big?size=20000000") as two:
        assert b"".join(one) == b"".join(two)
    kept = set(wire.host.links["node"].lanes)
    assert len(kept) == len(wire.server.lanes) == 2
    assert wire.get("/hello") == b"hello"
    assert wire.host.links["node"].lanes == kept
    monkeypatch.setattr(link, "KEEP", 0.0)
    wait_until(lambda: not (wire.server.lanes or wire.host.links["node"].lanes))
    wait_until(lambda: all(lane.channel.response_fd < 0 for lane in kept))
    assert wire.get("/hello") == b"hello"


@pytest.mark.parametrize(
    ("target", "body", "retries"),
    [("/", b"x", 0), ("/?head", b"x", 1), ("/", [b"in", b"pieces"], 1), ("/", b"x", 1)],
    ids=["not wanted", "after the head", "a body that is gone", "once"],
)
def test_requests_that_are_done_again(
    wires: Callable[..., Wire],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    target: str,
    body: Any,
    retries: int,
) -> None:
    """F3, D1: where its worker died, the host has another take it: if that is wanted, and what there is to send again;
    it counts both tries."""
    tries = tmp_path / "tries"
    monkeypatch.setenv("BLASTDOOR_TEST_TRIES", str(tries))
    monkeypatch.setenv("BLASTDOOR_TEST_DEATHS", "1")
    wire = wires(handler="tests.retry_handlers:app")
    wire.join()
    again = target == "/" and body == b"x" and bool(retries)
    sent = iter(body) if isinstance(body, list) else body
    outcome = contextlib.nullcontext() if again else pytest.raises(WorkerDied)
    with outcome, wire.open(target, sent, retries=retries) as job:
        assert b"".join(job) == b"POST x"
    assert tries.stat().st_size == 1 + again
    outcomes = wire.host.events.outcomes()
    outcomes.pop("not taken", None)  # it was asked again while it had no worker yet
    assert outcomes == ({"retried": 1, "ok": 1} if again else {"died": 1})
    assert ("it is done again, by another" in caplog.text) is again


def test_a_retry_has_its_own_time(wires: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """F3, D1: how long a worker is waited for does not count what the one that died has taken."""
    monkeypatch.setenv("BLASTDOOR_TEST_TRIES", str(tmp_path / "tries"))
    monkeypatch.setenv("BLASTDOOR_TEST_DEATHS", "1")
    wire = wires(handler="tests.retry_handlers:app")
    wire.join()
    with wire.open("/?late", b"x", timeout=1.0, retries=1) as job:
        assert b"".join(job) == b"POST x"


# -- who is let in -------------------------------------------------------------------------------------


def test_jobs_go_over_it(wire: Wire) -> None:
    """D9: one job after the other on one connection, bodies both ways, each whole."""
    wire.join()
    for number in range(50):
        assert wire.get("/mirror", b"%d" % number) == b"%d" % number
    block = os.urandom(1 << 16)
    assert wire.get("/mirror", iter([block] * 64)) == block * 64
    assert len(wire.server.lanes) == 1


@pytest.mark.parametrize("kind", [LANE, CONTROL])
def test_who_does_not_have_the_secret(wire: Wire, kind: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """D9: he is dropped before a frame of his is looked at, and nothing is told him of the secret."""
    with pytest.raises(ConnectionError):
        connect(wire.address, make_secret(), kind, HOST, 5)
    for hello in (b"", b"x" * 81, b"Z" + b"h" * 32 + b"n" * 16 + b"p" * 32, b"GET / HTTP/1.1\r\n" * 20):
        with wire.dial() as sock:
            assert receive(sock, GREETING_SIZE).startswith(NAME)
            sock.sendall(hello)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock)
    wait_until(lambda: "did not show the pool's secret" in caplog.text)
    assert not wire.server.lanes
    wait_until(lambda: wire.server.strangers == 0)


def test_a_proof_is_good_once(wire: Wire) -> None:
    """D9: what somebody has overheard of one handshake does not open another connection."""
    with wire.dial() as sock:
        nonce = receive(sock, GREETING_SIZE)[len(NAME) :]
        said = LANE + HOST.encode() + b"n" * NONCE
        hello = said + hmac.new(wire.server.secret, b"host" + nonce + said, hashlib.sha256).digest()
        sock.sendall(hello)
        assert len(receive(sock, 40)) == 40
    with wire.dial() as sock:
        receive(sock, GREETING_SIZE)
        sock.sendall(hello)
        assert is_closed(sock)


def test_an_agent_that_is_none(wire: Wire) -> None:
    """D9: a host tells nothing of a request to whoever has taken an agent's port over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(greeting(b"n" * NONCE))
                receive(sock, 81)
                sock.sendall(b"x" * 40)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(Stranger, match="is not the pool's agent"):
            connect(listener.getsockname(), wire.server.secret, LANE, HOST, 5)
        thread.join()


def dial_and_be_silent(wire: Wire, count: int) -> None:
    """Connect so often, say nothing, and wait until each has been closed."""
    silent = [wire.dial() for _ in range(count)]
    try:
        wait_until(lambda: wire.server.strangers == agent_server.STRANGERS)
        assert all(is_closed(sock) for sock in silent)
    finally:
        for sock in silent:
            sock.close()
    wait_until(lambda: wire.server.strangers == 0)


def test_floods_and_silence(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: who says nothing has some seconds, there are so many of them at once, and hosts get through all the same."""
    monkeypatch.setattr(agent_server, "HELLO_SECONDS", 1.0)
    dial_and_be_silent(wire, agent_server.STRANGERS * 2)
    assert len(wire.server.connections) == 0
    wire.join()
    assert wire.get("/hello") == b"hello"


def test_an_agent_that_drops_connections(wires: Callable[..., Wire], caplog: pytest.LogCaptureFixture) -> None:
    """D4, D9: it lives, and is not given up; others are tried first, and it ever more seldom."""
    crowded, other = wires(), wires()
    made = crowded.join()
    crowded.server.strangers = agent_server.STRANGERS
    second = Node("other", "127.0.0.1", 2)
    joined = JoinReply(2, address=other.address[0], port=other.address[1], secret=other.server.secret)
    there = AgentLink(None, second, joined, crowded.host)
    there.begin()
    crowded.host.links["other"] = there
    crowded.placement.add(second)
    tried = 0
    dial = made.open_idle

    def count(timeout: float | None) -> None:
        nonlocal tried
        tried += 1
        dial(timeout)

    made.open_idle = count  # type: ignore[method-assign]
    began = time.monotonic()
    for _ in range(100):
        assert crowded.get("/hello") == b"hello"
    crowded.server.strangers = 0
    assert 0 < tried < 10 + (time.monotonic() - began) / 0.1  # at last no more than five a second
    assert not crowded.node.silent
    assert "can't be reached" not in caplog.text


def test_many_jobs_at_once(
    wires: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D9: a burst of a host's jobs is a flood to its agent, which drops some connections: these are made again."""
    monkeypatch.setattr(agent_server, "STRANGERS", 4)
    wire = wires(workers=1, concurrency=40)
    wire.node.capacity = 40
    for _ in range(5):
        joined = wire.join()
        together = threading.Barrier(40)
        answers: list[bytes] = []

        def call(together: threading.Barrier = together, answers: list[bytes] = answers) -> None:
            together.wait()
            answers.append(wire.get("/hello"))

        threads = [threading.Thread(target=call) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [b"hello"] * 40
        joined.close()
    assert "can't be reached" not in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 100,
        pack_header(REQUEST, 1, MAX_HEAD + 1),
        frame(REQUEST, 1, b"\xc1"),
        frame(BODY, 1, b"x"),
        frame(END, 1),
        frame(TAKEN, 1, b"\x01"),
        frame(REQUEST, 1, head(body=True)) + frame(REQUEST, 2, head()),
        frame(REQUEST, 1, head(body=True)) + frame(BODY, 2, b"x"),
        frame(REQUEST, 1, head()) + frame(BODY, 1, b"x"),
    ],
)
def test_frames_that_are_none(wire: Wire, data: bytes) -> None:
    """D9: what may not come ends its connection, and no other, and leaves no job."""
    wire.join()
    with wire.lane() as sock:
        sock.sendall(data)
        assert is_closed(sock)
    assert wire.get("/hello") == b"hello"
    wait_until(lambda: wire.pool.stats().running == 0)


@pytest.mark.parametrize(
    "data", [struct.pack("<I", 1 << 30), struct.pack("<I", 3) + b"\xc1\xc1\xc1", b"\xff" * 200_000]
)
def test_messages_beside_that_are_none(wire: Wire, data: bytes) -> None:
    """D9: nor does one that is beside the jobs take what it says."""
    sock, _ = connect(wire.address, wire.server.secret, CONTROL, HOST, 5)
    with sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        assert is_closed(sock)
    wire.join()
    assert wire.get("/hello") == b"hello"


class FakeAgent:
    """An agent that has the secret, and says what it likes on its lanes."""

    def __init__(self, wire: Wire, says: bytes) -> None:
        self._wire = wire
        self._says = says
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        secret = self._wire.server.secret
        with contextlib.suppress(OSError), sock:
            sock.sendall(greeting(b"n" * NONCE))
            hello = receive(sock, 81)
            number = struct.pack("<Q", 1)
            sock.sendall(number + hmac.new(secret, b"agent" + hello[33:49] + number, hashlib.sha256).digest())
            if hello[:1] == CONTROL:
                beat = encode(Heartbeat(True, 0, 2, 0, 0, 0, 0, [], [], [], 0))
                while sock.recv(65536):
                    sock.sendall(struct.pack("<I", len(beat)) + beat)
                return
            while sock.recv(65536):
                sock.sendall(self._says)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(
    "says",
    [
        b"\xff" * 100,
        frame(TAKEN, 1, b"\xc1"),
        frame(TAKEN, 2, encode(1)),
        frame(OUTCOME, 1, b"no outcome"),
        frame(HEAD, 1, b"\xc1"),
        frame(HEAD, 1, encode(ResponseHead(200, [("content-length", "3")]))) + frame(END, 1) + frame(END, 1),
        pack_header(HEAD, 1, MAX_HEAD + 1),
        frame(BODY, 1, b"x"),
        frame(TAKEN, 1, encode(1)) * 3 + frame(9, 1),
    ],
)
def test_an_agent_that_lies(wire: Wire, says: bytes) -> None:
    """D8, D9: what an agent says that does not hold up fails its job, and nothing of it is run."""
    fake = FakeAgent(wire, says)
    try:
        wire.join(fake.address)
        with pytest.raises((WorkerMisbehaved, NodeLost, Exception)) as failed:
            wire.get("/hello")
        assert type(failed.value).__module__.startswith("runner"), failed.value
    finally:
        wire.host.links["node"].close()
        fake.close()
    wait_until(lambda: wire.placement.numbers() == (0, 0))


# -- how it flows, and how it breaks ---------------------------------------------------------------------


def test_a_slow_reader_holds_up_only_itself(wires: Callable[..., Wire]) -> None:
    """D3, D9: of a body that nobody reads little is held on both sides, and others' jobs go on."""
    import psutil

    wire = wires(workers=2)
    wire.join()
    wire.get("/big?size=1000000")
    process = psutil.Process()
    before = process.memory_info().rss
    with wire.open("/big?size=300000000") as job:
        assert job.read()
        for _ in range(100):
            assert wire.get("/hello") == b"hello"
        assert process.memory_info().rss - before < 20 << 20
        assert sum(map(len, job)) > 290_000_000


@pytest.mark.parametrize("broken", [False, True])
def test_an_upload_that_nobody_reads(wire: Wire, broken: bool) -> None:
    """D4, D9: the cancel does not wait behind the body that fills the connection, and is said until it is heard."""
    made = wire.join()
    pulled = 0

    def endless() -> Iterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1 << 16
            yield bytes(1 << 16)

    found: list[object] = []

    def call() -> None:
        from runner import CancelScope

        with CancelScope() as scope:
            found.append(scope)
            try:
                wire.open("/never_read", endless())
            except BaseException as error:
                found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: wire.pool.stats().running == 1 and pulled > 1 << 20)
    seen = 0
    while seen != pulled:  # until all that holds any of it is full
        seen = pulled
        time.sleep(0.2)
    assert pulled < 32 << 20
    if broken:
        assert made._beside is not None
        made._beside.sock.shutdown(socket.SHUT_RDWR)
    found[0].cancel()  # type: ignore[attr-defined]
    thread.join()
    assert isinstance(found[1], JobClosed)
    wait_until(lambda: wire.pool.stats().running == 0, 6)
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    assert wire.get("/hello") == b"hello"


def test_busy_agents_are_asked_again(wires: Callable[..., Wire]) -> None:
    """D4, D9: where no worker is free a job is placed anew until its time is over, one that can't be sent twice too."""
    wire = wires(workers=1)
    wire.join()
    with wire.open("/endless") as job:
        assert job.read()
        with pytest.raises(LeaseTimeout):
            wire.open("/hello", timeout=0.3)
        pulled: list[int] = []

        def once() -> Iterator[bytes]:
            pulled.append(1)
            yield b"body"

        with pytest.raises(LeaseTimeout):
            wire.open("/mirror", once(), timeout=0.3)
        assert not pulled
    assert wire.get("/mirror", iter([b"a", b"b"])) == b"ab"


def test_the_connection_beside_is_made_anew(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """D9: it breaks alone: jobs go on, and the agent is heard of again at once."""
    made = wire.join()
    with wire.open("/stream?count=100&pause=0.01") as job:
        assert job.read()
        beside = made._beside
        assert beside is not None
        beside.sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: made._beside not in (None, beside))
        assert sum(1 for _ in job) > 10
    assert "the connection to node" in caplog.text
    assert not made.lost


def test_an_agent_that_is_silent(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """D6, D9: it is given no more jobs, then given up: its jobs end with NodeLost, and are not done again."""
    monkeypatch.setattr(link, "SILENT", 0.2)
    monkeypatch.setattr(link, "GIVE_UP", 1.0)
    made = wire.join()
    job = wire.open("/endless")
    assert job.read()
    wire.agent.heartbeat = lambda *_: time.sleep(3) or b""  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(NodeLost):
        for _ in job:
            pass
    assert "has not answered" in made.lost
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    with pytest.raises(LeaseTimeout):
        wire.open("/hello", timeout=0.1)


def test_nothing_is_left_of_lanes(wires: Callable[..., Wire]) -> None:
    """W11, D9: after jobs of all kinds of ends no descriptor is left on either side once the pool is closed."""
    before = len(os.listdir("/proc/self/fd"))
    wire = wires(workers=2)
    wire.join()
    for number in range(30):
        with contextlib.suppress(Exception):
            wire.get(("/hello", "/die", "/raise", "/die?late=1", "/raise_late")[number % 5])
        job = wire.open("/endless")
        assert job.read()
        job.close()
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    wait_until(lambda: wire.pool.stats().running == 0)
    wire.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.fixture
def tls(tmp_path: Path) -> ClusterTLS:
    """Certificates of the user's own."""
    authority = trustme.CA()
    issued = authority.issue_cert("the.nodes")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(tmp_path / "cert.pem"), append=True)
    return ClusterTLS(cert=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"), ca=str(tmp_path / "ca.pem"))


def test_by_tls(wires: Callable[..., Wire], tls: ClusterTLS) -> None:
    """D9: jobs of all kinds, cancels, faults; nobody without TLS, and no agent that another authority has signed."""
    wire = wires(tls=tls)
    wire.join()
    block = os.urandom(1 << 16)
    for _ in range(3):
        assert wire.get("/mirror", iter([block] * 32)) == block * 32
        assert wire.get("/hello") == b"hello"
        with pytest.raises(WorkerDied):
            wire.get("/die")
        job = wire.open("/endless")
        assert job.read()
        job.close()
        wait_until(lambda: wire.pool.stats().running == 0)
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    with pytest.raises(ConnectionError), wire.dial() as sock:
        sock.sendall(b"x" * 200)
        assert receive(sock, GREETING_SIZE)[: len(NAME)] != NAME
        raise ConnectionError
    other = trustme.CA()
    other.cert_pem.write_to_path(tls.ca)
    stranger = ClusterHost(HOST, Placement(), Events(), tls)
    stranger.begin()
    try:
        with pytest.raises(ssl.SSLError, match="certificate verify failed"):
            connect(wire.address, wire.server.secret, LANE, HOST, 5, stranger.dial)
    finally:
        stranger.end()


@pytest.mark.parametrize("given", [{"cert": ""}, {"key": None}, {"ca": 7}])
def test_files_that_are_no_paths(given: dict[str, Any]) -> None:
    """D1: they are refused where they are given."""
    with pytest.raises(ConfigurationError, match="is the path of a PEM file"):
        ClusterTLS(**{"cert": "c", "key": "k", "ca": "a", **given})


def test_closing_with_jobs_under_way(wire: Wire) -> None:
    """D1, D9: who reads is freed, and nobody's descriptor is closed under him."""
    wire.join()
    outcomes: list[BaseException] = []

    def read() -> None:
        try:
            with wire.open("/endless") as job:
                for _ in job:
                    pass
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: wire.placement.numbers()[0] == 2)
    wire.placement.close(lambda: PoolClosed("it is closed"))
    wire.host.end()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(isinstance(error, (JobClosed, NodeLost, PoolClosed)) for error in outcomes), outcomes


def test_messages_are_what_they_are() -> None:
    """D8: what travels beside the jobs decodes as itself and as nothing else."""
    with pytest.raises(msgspec.ValidationError):
        link.decode_heartbeat(encode((1, 2, 3)))
    logging.getLogger("blastdoor").debug("done")


def test_a_fork_ends_no_job_of_its_parent(wire: Wire) -> None:
    """W11, D9: the child closes its copies of the connections, and says nothing on them."""
    wire.join()
    with wire.open("/stream?count=100&pause=0.01") as job:
        assert job.read()
        child = os.fork()
        if not child:
            wire.host.after_fork_in_child()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert sum(1 for _ in job) > 10


def test_a_body_is_never_sent_in_part(wires: Callable[..., Wire], tmp_path: Path) -> None:
    """D4, D9: where a worker is gone before it read a body that was begun, nobody else gets the rest of it."""
    wire = wires(workers=1)
    wire.join()
    wire.get("/hello")
    (worker,) = wire.pool.workers()
    os.kill(worker.pid, signal.SIGSTOP)
    pulled = threading.Event()

    def body() -> Iterator[bytes]:
        for number in range(200):
            yield b"%d," % number
            pulled.set()
        yield b"end"

    outcomes: list[object] = []

    def call() -> None:
        try:
            outcomes.append(wire.get("/mirror", body()))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    pulled.wait(10)
    with contextlib.suppress(ProcessLookupError):  # the pool itself ends one that is stopped, sooner or later
        os.kill(worker.pid, signal.SIGKILL)
    thread.join()
    (outcome,) = outcomes
    whole = b"".join(b"%d," % number for number in range(200)) + b"end"
    assert isinstance(outcome, Exception) or outcome == whole, outcome


def test_without_descriptors_nothing_leaks(wire: Wire) -> None:
    """W11, D9: a job that is left where no descriptor is to be had gives its slot and its lane back all the same."""
    wire.join()
    job = wire.open("/endless")
    assert job.read()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limits[1]))
    try:
        job.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    assert wire.get("/hello") == b"hello"


def test_a_lane_that_was_left_is_seen_out(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4, D9: its slot is given back once the agent has done with it, and nothing of it stays watched."""
    wire.join()
    jobs = [wire.open("/endless") for _ in range(2)]
    made = wire.host.links["node"]
    said: list[object] = []
    cancel = made.cancel

    def count(lane: object) -> None:
        said.append(lane)
        cancel(lane)  # type: ignore[arg-type]

    monkeypatch.setattr(made, "cancel", count)
    held = threading.Event()
    wire.server.call(lambda: held.wait(30))  # the agent hears nothing
    for job in jobs:
        job.close()
    wait_until(lambda: len(said) == 4)  # each was said, and said again
    assert wire.placement.numbers()[0] == 2
    held.set()
    wait_until(lambda: wire.placement.numbers() == (0, 0))
    wait_until(lambda: not wire.host.pulse._leaving)
    assert made._beside is not None
    assert set(wire.host.pulse._watched) == {made._beside.sock.fileno()}


def test_news_in_parts() -> None:
    """D8: what is too much for one message is told in the next ones, all of it, in its order."""
    outbox = AgentOutbox()
    try:
        for number in range(1500):
            outbox.emit(logging.makeLogRecord({"msg": f"{number} " + "x" * 9000, "levelno": logging.INFO}))
        told: list[int] = []
        seen = rounds = 0
        while len(told) < 1500:
            records, _, seen = outbox.since(seen)
            assert sum(len(record.message) for record in records) < 5 << 20
            told += [int(record.message.split()[0]) for record in records]
            rounds += 1
        assert told == list(range(1500))
        assert rounds > 2
    finally:
        logging.getLogger("blastdoor").removeHandler(outbox)


def test_strangers_before_tls(wires: Callable[..., Wire], tls: ClusterTLS, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: who does not even speak TLS is counted, and has some seconds, as any other."""
    monkeypatch.setattr(agent_server, "HELLO_SECONDS", 1.0)
    wire = wires(tls=tls)
    dial_and_be_silent(wire, agent_server.STRANGERS + 20)
    wire.join()
    assert wire.get("/hello") == b"hello"


def test_a_relay_that_ends_while_it_dials(tls: ClusterTLS) -> None:
    """W11, D9: who waits for a connection is told that there will be none."""
    host = ClusterHost(HOST, Placement(), Events(), tls)
    host.begin()
    dial = host.dial
    assert dial is not None
    found: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def call() -> None:
            try:
                dial(address, 10)
            except OSError as error:
                found.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        wait_until(lambda: bool(host._relay and host._relay._tasks))
        host.end()
        thread.join(5)
        assert not thread.is_alive()
        with pytest.raises(OSError, match="closed"):
            dial(address, 1)
    assert found


def test_a_relay_that_ends_closes_what_it_held(wires: Callable[..., Wire], tls: ClusterTLS) -> None:
    """W11, D9: whether a connection has just begun, has just ended, or waits for a reader, none of it is left."""
    wire = wires(tls=tls)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for _ in range(40):
        host = ClusterHost(HOST, Placement(), Events(), tls)
        host.begin()
        assert host.dial is not None
        ours = [host.dial(wire.address, 5) for _ in range(3)]
        relay = host._relay
        for sock in ours[: dice.randrange(4)]:
            sock.close()
        host.end()
        assert relay is not None
        assert not relay._tasks
        assert not relay._closing
        assert not relay._fds
        for sock in ours:
            assert sock.fileno() < 0 or is_closed(sock)
            sock.close()
    wait_until(lambda: not wire.server.connections)
