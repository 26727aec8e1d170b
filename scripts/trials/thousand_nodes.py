"""A thousand nodes on paper: the placement that ClusterPool uses, driven by simulated hosts, agents, jobs and failures.

Real is `runner.cluster.placement.Placement`, with its times of decision, and what a heartbeat costs its host; simulated
are the clock, the network's delays, the agents with their workers and queues, the pings, and nodes that are lost or
join. What is shown: how long jobs wait, how many are lost with their nodes, how soon nobody places there any more, how
soon new nodes are used, how many connections there are (one for each host and agent, and one for each job that ever ran
there beside another), and how often the head is asked which nodes there are.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from runner.cluster.link import GIVE_UP, SILENT, decode_heartbeat
from runner.cluster.messages import Heartbeat, Ping, encode
from runner.cluster.nodes import look_pause
from runner.cluster.placement import PATIENCE, Node, Placement, Slot
from runner.cluster.pulse import BEAT
from runner.events import WorkerInfo
from runner.supervision.waiters import Waiter

ONE_WAY: Final = 0.0005
"""Seconds that a message takes between a host and an agent."""


class Clock:
    """Simulated time, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()


@dataclass
class Job:
    host: Host
    asked: float
    seconds: float
    slot: Slot | None = None
    done: bool = False


class Asker(Waiter[Slot]):
    """A job that waits in its host's queue."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        super().__init__("")
        self.job = job

    def wake(self) -> bool:
        assert self.found is not None
        self.job.host.place(self.job, self.found)
        return True


class TimedPlacement(Placement):
    """The placement, with the time that its decisions take, in seconds."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=lambda: clock.now)
        self.decisions: list[float] = []

    def ask(self, asker: Asker) -> None:
        began = time.perf_counter()
        slot = self._take("")
        self.decisions.append(time.perf_counter() - began)
        if slot is None:
            self._enqueue(asker)
        else:
            asker.found = slot
            asker.wake()


class Agent:
    """A node: so many workers, and a queue in which a job waits for PATIENCE at most."""

    def __init__(self, name: str, workers: int, clock: Clock) -> None:
        self.name = name
        self.workers = workers
        self.clock = clock
        self.alive = True
        self.running: dict[str, int] = {}
        self.busy = 0
        self.queue: deque[tuple[float, Job]] = deque()

    def take(self, job: Job) -> None:
        if not self.alive:
            return  # it is never answered
        if self.busy < self.workers:
            self._begin(job)
        else:
            self.queue.append((self.clock.now, job))
            self.clock.after(PATIENCE, lambda: self._give_up(job))

    def _begin(self, job: Job) -> None:
        self.busy += 1
        world.waits.append(self.clock.now - job.asked)
        self.clock.after(job.seconds, lambda: self._end(job))

    def _end(self, job: Job) -> None:
        self.busy -= 1
        if not self.alive:
            return
        self.clock.after(ONE_WAY, lambda: job.host.ended(job))
        if self.queue:
            self._begin(self.queue.popleft()[1])

    def _give_up(self, job: Job) -> None:
        for waiting in self.queue:
            if waiting[1] is job:
                self.queue.remove(waiting)
                world.placed_anew += 1
                self.clock.after(ONE_WAY, lambda: job.host.busy(job))
                return


class Host:
    """One ClusterPool: its placement, its links' pulses, its jobs under way."""

    def __init__(self, clock: Clock, agents: dict[str, Agent]) -> None:
        self.clock = clock
        self.agents = agents
        self.placement = TimedPlacement(clock)
        self.under_way: dict[str, set[int]] = {}
        self.jobs: dict[int, Job] = {}
        self.nodes: dict[str, Node] = {}
        self.heard: dict[str, float] = {}
        self.lanes: dict[str, int] = {}

    def joins(self, agent: Agent) -> None:
        node = self.nodes[agent.name] = Node(agent.name, agent.name, agent.workers)
        self.heard[agent.name] = self.clock.now
        self.placement.add(node)
        self.clock.after(random_.random() * BEAT, lambda: self.beat(agent, node))

    def beat(self, agent: Agent, node: Node) -> None:
        world.pings += 1
        if agent.alive:
            self.heard[agent.name] = self.clock.now
            self.placement.update(node, others=max(0, agent.busy - node.running))
        elif self.clock.now - self.heard[agent.name] > GIVE_UP:
            self.lose(agent, node)
            return
        elif self.clock.now - self.heard[agent.name] > SILENT:
            self.placement.update(node, silent=True)
        self.clock.after(BEAT, lambda: self.beat(agent, node))

    def lose(self, agent: Agent, node: Node) -> None:
        self.placement.remove(node)
        for number in self.under_way.pop(agent.name, set()):
            job = self.jobs.pop(number)
            job.done = True
            world.lost += 1
            assert job.slot is not None
            self.placement.give_back(job.slot)

    def ask(self, job: Job) -> None:
        self.placement.ask(Asker(job))

    def place(self, job: Job, slot: Slot) -> None:
        job.slot = slot
        agent = self.agents[slot.node.name]
        there = self.under_way.setdefault(agent.name, set())
        there.add(id(job))
        self.lanes[agent.name] = max(self.lanes.get(agent.name, 0), len(there))
        self.jobs[id(job)] = job
        if not agent.alive:
            world.last_to_the_lost = self.clock.now
        elif agent.name in world.new:
            world.first_on_new = min(world.first_on_new, self.clock.now)
        self.clock.after(ONE_WAY, lambda: agent.take(job))

    def _leaves(self, job: Job) -> bool:
        if job.done:
            return False
        assert job.slot is not None
        self.under_way[job.slot.node.name].discard(id(job))
        del self.jobs[id(job)]
        return True

    def ended(self, job: Job) -> None:
        if self._leaves(job):
            job.done = True
            world.ended += 1
            assert job.slot is not None
            self.placement.give_back(job.slot)

    def busy(self, job: Job) -> None:
        if self._leaves(job):
            assert job.slot is not None
            self.placement.full(job.slot)
            self.ask(job)


@dataclass
class World:
    """What is counted."""

    waits: list[float] = field(default_factory=list)
    lost: int = 0
    ended: int = 0
    pings: int = 0
    placed_anew: int = 0
    last_to_the_lost: float = 0.0
    new: set[str] = field(default_factory=set)
    first_on_new: float = float("inf")


world = World()
random_ = random.Random()


@dataclass(frozen=True)
class Case:
    hosts: int
    nodes: int
    workers: int
    load: float
    seconds: float = 40.0
    mean: float = 2.0
    lose_at: float = 15.0
    join_at: float = 28.0
    share: float = 0.05


def simulate(case: Case, seed: int) -> tuple[World, list[Host]]:
    """Let the hosts run; a twentieth of the nodes is lost at one moment, and as many join later."""
    global world
    world = World()
    random_.seed(seed)
    clock = Clock()
    agents = {f"node-{n}": Agent(f"node-{n}", case.workers, clock) for n in range(case.nodes)}
    hosts = [Host(clock, agents) for _ in range(case.hosts)]
    for host in hosts:
        for agent in list(agents.values()):
            host.joins(agent)
    rate = case.load * case.nodes * case.workers / case.mean

    def arrive() -> None:
        host = random_.choice(hosts)
        host.ask(Job(host, clock.now, random_.expovariate(1 / case.mean)))
        if clock.now < case.seconds:
            clock.after(random_.expovariate(rate), arrive)

    def lose() -> None:
        for name in random_.sample(sorted(agents), int(case.nodes * case.share)):
            agents[name].alive = False

    def join() -> None:
        for n in range(int(case.nodes * case.share)):
            agent = agents[f"new-{n}"] = Agent(f"new-{n}", case.workers, clock)
            world.new.add(agent.name)
            for host in hosts:
                host.joins(agent)

    clock.after(0, arrive)
    clock.after(case.lose_at, lose)
    clock.after(case.join_at, join)
    clock.run(case.seconds)
    return world, hosts


def heartbeat_cost(workers: int) -> float:
    """Seconds of a host's processor that a ping and its answer take: made, read, and noted in a placement."""
    infos = [WorkerInfo(n, "idle", "", n, 1.0, 20 << 20, 1.0) for n in range(workers)]
    data = encode(Heartbeat(True, 0, workers, 0, 0, 0, 0, infos, [], [], 1))
    placement = Placement()
    nodes = [Node(f"node-{n}", "", workers) for n in range(1000)]
    for node in nodes:
        placement.add(node)
    began = time.process_time()
    for node in nodes:
        encode(Ping(1, 30))
        heartbeat = decode_heartbeat(data)
        placement.update(node, silent=False, others=heartbeat.running)
    return (time.process_time() - began) / len(nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8, help="of each node")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    print("seed", given.seed)
    cost = heartbeat_cost(given.workers)  # first: what is simulated is a burden to the garbage collector
    table = Table(
        title=f"{given.nodes} nodes of {given.workers} workers; jobs of 2 s; 5 % of the nodes lost, then as many new"
    )
    for column in (
        *("hosts", "load", "jobs ended", "lost", "wait\np50", "wait\np99", "placed\nanew", "last placed\non the lost"),
        *("first placed\non the new", "decision\np50", "decision\np99", "pings/s\na node"),
        *("connections\na host", "connections\nan agent", "calls/s\nof the head"),
    ):
        table.add_column(column, justify="right")
    for hosts, load in ((1, 0.9), (20, 0.5), (20, 0.9)):
        case = Case(hosts, given.nodes, given.workers, load)
        found, simulated = simulate(case, given.seed)
        decisions = [seconds for host in simulated for seconds in host.placement.decisions]
        connections = sum(1 + host.lanes.get(name, 0) for host in simulated for name in host.agents)
        waits = statistics.quantiles(found.waits, n=100)
        took = statistics.quantiles(decisions, n=100)
        table.add_row(
            str(hosts),
            f"{load:.0%}",
            f"{found.ended:,}",
            f"{found.lost:,}",
            f"{waits[49] * 1e3:.1f} ms",
            f"{waits[98] * 1e3:.0f} ms",
            f"{found.placed_anew:,}",
            f"after {max(found.last_to_the_lost - case.lose_at, 0):.1f} s",
            f"after {found.first_on_new - case.join_at:.2f} s",
            f"{took[49] * 1e6:.1f} µs",
            f"{took[98] * 1e6:.0f} µs",
            f"{found.pings / given.nodes / case.seconds:.1f}",
            f"{connections / hosts:,.0f}",
            f"{connections / given.nodes:,.0f}",
            f"{hosts / look_pause(given.nodes):.1f}",
        )
    console = Console(width=180)
    console.print(table)
    share = cost * given.nodes / BEAT
    console.print(f"a heartbeat costs its host {cost * 1e6:.0f} µs: of {given.nodes} nodes {share:.1%} of a core")


if __name__ == "__main__":
    main()
