"""runner.cluster.placement and the messages, without a cluster: who is placed where, and what an agent may say."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import threading

import msgspec
import pytest

from runner.cluster.messages import (
    Heartbeat,
    JobEnd,
    JoinReply,
    decode,
    decode_event,
    encode,
    encode_event,
    ending_of,
    error_of,
)
from runner.cluster.placement import Node, Placement, Slot
from runner.errors import (
    Fault,
    HandlerRaised,
    JobFailed,
    LeaseTimeout,
    NodeLost,
    PoolClosed,
    ReadTimeout,
    WorkersUnavailable,
)
from runner.events import JobStarted, WorkerEnded
from scripts.trials.thousand_nodes import Case, simulate
from tests.waiting import wait_until


def placed(nodes: list[Node], **settings: object) -> Placement:
    placement = Placement(**settings)  # type: ignore[arg-type]
    for node in nodes:
        placement.add(node)
    return placement


def test_the_least_loaded_node() -> None:
    """D4: a job goes where the fewest run for the capacity, jobs of other hosts included."""
    small, large = Node("small", "10.0.0.1", 2), Node("large", "10.0.0.2", 4)
    placement = placed([small, large])
    slots = [placement.lease(0) for _ in range(6)]
    assert (small.running, large.running) == (2, 4)
    with pytest.raises(LeaseTimeout):
        placement.lease(0.01)
    for slot in slots:
        placement.give_back(slot)
    placement.update(small, others=1)
    assert [placement.lease(0).node for _ in range(2)] == [large, large]


def test_nodes_of_one_load() -> None:
    """D4: hosts that know the same do not all go to the same node."""
    firsts = {placed([Node(str(n), "", 4) for n in range(8)]).lease(0).node.name for _ in range(100)}
    assert len(firsts) > 4


def test_nodes_that_take_no_jobs() -> None:
    """D4, D7: one that drains, is silent or removed gets no job; a paused one only where there is no other."""
    now = [0.0]
    one, other = Node("one", "", 4), Node("other", "", 4)
    placement = placed([one, other], clock=lambda: now[0])
    for change in ({"draining": True}, {"silent": True}, {"paused_until": 5.0}):
        placement.update(one, **change)
        assert [placement.lease(0).node for _ in range(3)] == [other] * 3
        other.running = 0
        placement.update(one, draining=False, silent=False, paused_until=0.0)
        placement.update(other)
    placement.update(one, paused_until=5.0)
    placement.remove(other)
    assert placement.lease(0).node is one
    now[0] = 6.0
    assert placement.lease(0).node is one
    placement.remove(one)
    assert not placement.has_any


def test_a_full_node() -> None:
    """D4: where a node had no worker free, the next try goes to another."""
    one, other = Node("one", "", 4), Node("other", "", 4)
    placement = placed([one, other])
    placement.update(other, others=3)
    slot = placement.lease(0)
    assert slot.node is one
    placement.full(slot)
    assert placement.lease(0).node is other


def test_waiting_callers() -> None:
    """D4, W4: first come, first served, but for a provider at its limit; closing refuses those that wait."""
    node = Node("node", "", 2)
    placement = placed([node], per_provider={"slow": 1})
    slow, fast = placement.lease(0, provider="slow"), placement.lease(0)
    order: list[str] = []

    def wait(provider: str) -> None:
        try:
            slot = placement.lease(None, provider=provider)
        except PoolClosed:
            order.append("refused")
            return
        order.append(provider)
        placement.give_back(slot)

    threads = [threading.Thread(target=wait, args=(provider,)) for provider in ("slow", "fast")]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: placement.numbers()[1] == number + 1)  # type: ignore[misc]
    placement.give_back(fast)
    wait_until(lambda: order == ["fast"])
    placement.close(lambda: PoolClosed("closed"))
    for thread in threads:
        thread.join()
    assert order == ["fast", "refused"]
    placement.give_back(slow)
    placement.wait_drained(0)
    assert placement.numbers() == (0, 0)


def test_any_course_of_events() -> None:
    """D4: 20,000 random steps: no node is over its capacity, none that takes no jobs is given one, no slot is lost."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    nodes = [Node(str(n), "", chance.randrange(1, 5)) for n in range(12)]
    placement = placed(nodes)
    there, slots = set(nodes), list[Slot]()
    for _ in range(20_000):
        node = chance.choice(nodes)
        match chance.randrange(8):
            case 0:
                placement.remove(node)
                there.discard(node)
            case 1:
                if node not in there:
                    placement.add(node)
                    there.add(node)
            case 2:
                placement.update(node, draining=chance.random() < 0.3, silent=chance.random() < 0.3)
            case 3 | 4:
                if slots:
                    give = placement.full if chance.random() < 0.2 else placement.give_back
                    give(slots.pop(chance.randrange(len(slots))))
            case _:
                slot = placement._take("")
                if slot is None:
                    assert not any(node.open for node in there)
                    continue
                assert slot.node in there
                assert not slot.node.draining
                assert not slot.node.silent
                assert slot.node.running <= slot.node.capacity
                slots.append(slot)
        assert sum(node.running for node in nodes) == len(slots) == placement.numbers()[0]
    assert len(placement._heap) <= 4 * len(nodes) + 65


def test_many_hosts_do_not_herd() -> None:
    """D4: 20 hosts at half the load of 100 nodes, 5 lost: 98 of 100 jobs find a worker at once."""
    found, _ = simulate(Case(20, 100, 8, 0.5), random.randrange(1 << 32))
    waits = statistics.quantiles(found.waits, n=100)
    print(found.lost, found.placed_anew, waits[97])
    assert waits[97] < 0.05
    assert found.last_to_the_lost < 15 + 5


# -- messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x94\xc0\xc0\xc0", b"\x94\xc0\xc0\xc0\xc0", 7, None, "text", b"\x80"])
def test_answers_that_are_none(data: object) -> None:
    """D8: what is no message of an agent's is refused, and nothing of it is run."""
    for kind in (Heartbeat, JoinReply, JobEnd):
        with pytest.raises(ValueError, match=r"."):
            decode(data, kind)


def test_events_that_travel() -> None:
    """D1: workers' events arrive as they were; others are told where they happen, and do not travel."""
    event = WorkerEnded(7, None, "SIGSEGV", 3)
    data = encode_event(event)
    assert data is not None
    assert decode_event(data) == event
    assert encode_event(JobStarted("j", "", "", 7, 0.0)) is None
    with pytest.raises(msgspec.ValidationError):
        decode_event(encode(("other", {})))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HandlerRaised(Fault(kind="raised", detail="d", job_id="j", error="e", traceback="t")), HandlerRaised),
        (ReadTimeout("slow"), ReadTimeout),
        (WorkersUnavailable("none", 3), WorkersUnavailable),
        (KeyError("other"), NodeLost),
    ],
)
def test_ends_that_travel(error: BaseException, kind: type[Exception]) -> None:
    """D1: what a job ends with at its agent is what its caller gets."""
    ending = decode(encode(ending_of(error)), JobEnd)
    told = error_of(ending, "j")
    assert type(told) is kind
    if isinstance(error, JobFailed) and isinstance(told, JobFailed):
        assert told.fault == error.fault


def test_an_agent_s_answers() -> None:
    """D8: what fails in an agent stays there: hosts get bytes, and no exception of anybody's."""
    code = """
import logging
from runner.cluster import agent
from runner.cluster.messages import Heartbeat, JoinReply, decode
one = agent.Agent(b"no pickle")
assert not decode(one.heartbeat("host", 0, logging.CRITICAL), Heartbeat).known
assert "UnpicklingError" in decode(one.join("host"), JoinReply).error
assert one.pool_for("host") is None
one._hosts = None
assert one.leave("host") == b""
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"done" in done.stdout.splitlines()
