"""The agents of one ClusterPool: one on each node of the cluster, made as nodes come, given up as they go.

Two threads: one follows the nodes, the other keeps the links' pulses, and neither waits for the other. A third kind,
one for each agent that is being made, ends when that is ready.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any, Final

import msgspec
import ray
import ray._private.state
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runner.cluster.agent import Agent
from runner.cluster.link import Link
from runner.cluster.messages import Joined, decode
from runner.cluster.placement import Node
from runner.cluster.round_trip import Host
from runner.errors import StartError, WorkersUnavailable
from runner.events import WorkerInfo

logger = logging.getLogger("blastdoor")

NAMESPACE: Final = "blastdoor"

LOOK: Final = 0.5
"""Seconds between two looks at the cluster's nodes."""

BEAT: Final = 1.0
"""Seconds between two pings of an agent."""

_AGAIN: Final = 2.0
"""Seconds after which an agent that could not be made is tried again."""

_STUCK: Final = 15.0
"""Seconds that an agent that is there already has to answer."""

_LEAVE_PATIENCE: Final = 10.0
"""Seconds that agents have to end their workers, when a pool is closed."""

_CUT_OFF_PATIENCE: Final = 2.0
"""Seconds that those have which had not answered: they end by themselves, later."""

_CTL_THREADS: Final = 8
_EXTRA_THREADS: Final = 4


class Fleet:
    """Finds the nodes, has an agent on each, and knows which of them answer."""

    def __init__(self, host: Host, name: str, payload: bytes, capacity: int, start_timeout: float) -> None:
        self._host = host
        self._name = name
        self._payload = payload
        self._capacity = capacity
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._poke = threading.Event()
        self._ended = threading.Event()
        self._settled = threading.Condition()
        self._joining: set[str] = set()
        self._errors: dict[str, str] = {}
        self._not_before: dict[str, float] = {}
        self._looked = False
        self._last_failure = ""
        self._deaths = 0
        self._lost_actors: dict[str, Any] = {}
        self._threads: set[threading.Thread] = set()

    def begin(self) -> None:
        """Begin to follow the cluster. StartError where the system gives no thread."""
        try:
            self._spawn(self._follow_nodes, "blastdoor-nodes")
            self._spawn(self._beat, "blastdoor-pulse")
        except RuntimeError as error:
            raise StartError(f"the pool can't start its threads: {error}") from error

    def wait_started(self, timeout: float) -> None:
        """Wait until each node of this moment has an agent that is ready. StartError where one can't be had."""
        with self._settled:
            done = self._settled.wait_for(lambda: self._looked and (not self._joining or bool(self._errors)), timeout)
        if self._errors:
            raise StartError(next(iter(self._errors.values())))
        if not self._host.links:
            why = (
                self._last_failure or "it has no node that lives"
                if done
                else f"no agent was ready within {timeout:g} s"
            )
            raise StartError(f"the Ray cluster gives no place for workers: {why}")

    def end(self) -> None:
        """Leave all agents, which end with their last host, and end the threads."""
        self._ended.set()
        self._poke.set()
        for thread in list(self._threads):
            thread.join()
        now = time.monotonic()
        until = dict.fromkeys(self._lost_actors.values(), now + _CUT_OFF_PATIENCE)
        until |= {link.actor: now + _LEAVE_PATIENCE for link in self._host.links.values()}
        self._host.links.clear()
        with contextlib.suppress(Exception):  # no connection is left to say it by: they hear of no host, and end
            leaving = [(actor, actor.leave.remote(self._host.name), latest) for actor, latest in until.items()]
            for actor, left, latest in leaving:
                with contextlib.suppress(ray.exceptions.RayError, ValueError):
                    if ray.get(left, timeout=max(latest - time.monotonic(), 0)) == b"last":
                        ray.kill(actor)

    def numbers(self) -> tuple[int, int, int]:
        """How many workers are starting, how many idle, and how many have died, as the agents last told."""
        pulses = [link.pulse for link in list(self._host.links.values())]
        deaths = self._deaths + sum(pulse.deaths for pulse in pulses)
        return sum(pulse.starting for pulse in pulses), sum(pulse.idle for pulse in pulses), deaths

    def workers(self) -> list[WorkerInfo]:
        """The workers of all nodes, as the agents last told."""
        links = list(self._host.links.values())
        return [_at(worker, link.node.address) for link in links for worker in link.pulse.workers]

    # -- the nodes' thread -------------------------------------------------------------------------

    def _follow_nodes(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception:
                logger.exception("the nodes of the Ray cluster can't be listed")
            self._poke.wait(LOOK)
            self._poke.clear()

    def _look(self) -> None:
        alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        draining = _draining()
        for name, link in list(self._host.links.items()):
            if name not in alive:
                link.lose("Ray says that its node is dead")
            elif (name in draining) is not link.node.draining:
                logger.info("node %s is %s", link.node.address, "draining" if name in draining else "taken back")
                self._host.placement.update(link.node, draining=name in draining)
        now = time.monotonic()
        for name, address in alive.items():
            with self._lock:
                if (
                    name in self._host.links
                    or name in self._joining
                    or name in draining
                    or self._not_before.get(name, 0) > now
                ):
                    continue
                self._joining.add(name)
            self._spawn(lambda name=name, address=address: self._join(name, address), "blastdoor-join")
        with self._settled:
            self._looked = True
            self._settled.notify_all()

    def _join(self, name: str, address: str) -> None:
        error = ""
        try:
            actor = self._agent(name)
            joined = decode(self._await(actor.join.remote(self._host.name)), Joined)
            if joined.ending:
                raise _Unready(f"the agent on node {address} is about to end")
            if joined.error:
                ray.kill(actor)
                error = joined.error
                raise _Unready(f"no worker can be started on node {address}: {joined.error}")
            pulse = self._await(actor.ping.remote(self._host.name, 0, logger.getEffectiveLevel()))
            self._add(actor, Node(name, address, joined.capacity), pulse)
        except Exception as why:  # noqa: BLE001 - Ray has no one root for what it raises here
            if not self._ended.is_set():
                logger.error("no agent on node %s: %s", address, why)
                self._last_failure = str(why)
                self._not_before[name] = time.monotonic() + (_AGAIN if error else LOOK)
        finally:
            with self._settled:
                self._joining.discard(name)
                if error:
                    self._errors[name] = error
                    if not self._host.links:
                        self._host.placement.refuse(lambda: WorkersUnavailable(error, _AGAIN))
                else:
                    self._errors.pop(name, None)
                self._settled.notify_all()
            self._threads.discard(threading.current_thread())

    def _agent(self, node: str) -> Any:
        """The agent of a node, made where there is none: by whichever host comes first. One that is stuck is killed."""
        name = f"{self._name}:{node}"
        with contextlib.suppress(ValueError):
            there: Any = ray.get_actor(name, NAMESPACE)
            answered, _ = ray.wait([there.ping.remote(self._host.name, 0, logging.CRITICAL)], timeout=_STUCK)
            if not answered:
                ray.kill(there)
                raise _Unready("it did not answer, and is killed")
            return there
        threads = min(2 * self._capacity + _EXTRA_THREADS, 512)
        groups = {"ctl": _CTL_THREADS, "run": threads, "more": threads, "feed": threads}
        remote: Any = ray.remote(num_cpus=0, concurrency_groups=groups)  # type: ignore[call-overload]
        return (
            remote(Agent)
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._payload)
        )

    def _await(self, answer: Any) -> object:
        """Wait for an agent to be ready, for its workers' start too, and no longer than this pool lives."""
        until = time.monotonic() + self._start_timeout + 30
        while not self._ended.is_set():
            ready, _ = ray.wait([answer], timeout=LOOK)
            if ready:
                return ray.get(answer)
            if time.monotonic() > until:
                raise _Unready("it was not ready in time")
        raise _Unready("the pool is closed")

    def _add(self, actor: Any, node: Node, pulse: object) -> None:
        link = Link(actor, self._host.name, node, self._host.placement, self._host.events)
        link.on_lost = self._lost
        self._host.links[node.name] = link
        link.pulsed(pulse)
        self._host.placement.add(node)
        logger.info("node %s takes part, with %d workers", node.address, node.capacity)

    def _lost(self, link: Link) -> None:
        """A link's agent is gone, or cut off: have another one made, where its node still lives."""
        self._deaths += link.pulse.deaths
        if self._host.links.get(link.node.name) is link:
            del self._host.links[link.node.name]
        self._lost_actors[link.node.name] = link.actor
        self._poke.set()

    # -- the pulse ---------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            for link in list(self._host.links.values()):
                link.beat()

    def _spawn(self, work: Any, name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()


class _Unready(Exception):
    """An agent can't be used, and why."""


def _draining() -> set[str]:
    """The nodes that Ray is draining, where this version of it tells."""
    state = ray._private.state.state
    try:
        return set(state.get_draining_nodes())
    except AttributeError:
        return set()


def _at(worker: WorkerInfo, address: str) -> WorkerInfo:
    return msgspec.structs.replace(worker, node=address)
