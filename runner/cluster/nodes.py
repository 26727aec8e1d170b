"""The agents of one ClusterPool: one on each node of the cluster, made as nodes come, given up as they go.

One thread follows the nodes. Others, one for each agent that is being made, end when that is ready.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import ray
import ray._private.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import PoolClosed, StartError, WorkersUnavailable
from ..events import WorkerInfo
from . import ray_connection
from .agent import Agent
from .host import ClusterHost
from .link import AgentLink
from .messages import JoinReply, decode
from .placement import Node
from .tls import ClusterTLS

logger = logging.getLogger("blastdoor")

NAMESPACE: Final = "blastdoor"

_LOOK: Final = 0.5
_LOOK_PER_NODE: Final = 0.005

JOINING: Final = 32
"""How many agents are made at once: each is a process of Ray's, with a pool that starts."""

SLOW: Final = 5.0
"""Seconds after which one that is not ready yet holds up no other."""

_AGAIN: Final = 2.0
"""Seconds after which an agent that could not be made is tried again."""

_MOST_FAILURES: Final = 5
"""How often the agent of a node may fail to be made, before a start fails that has no other."""

_STUCK: Final = 15.0
"""Seconds that an agent that is there already has to answer."""

_LEAVE_PATIENCE: Final = 10.0
"""Seconds that agents have to end their workers, when a pool is closed."""

_END_PATIENCE: Final = 2.0
"""Seconds that the threads have to end, and agents that had not answered before: those end by themselves, later."""

_CTL_THREADS: Final = 8
_LIFE_THREADS: Final = 4


def look_pause(nodes: int) -> float:
    """Seconds between two looks at a cluster of so many nodes: its head answers each with what it knows of all."""
    return max(_LOOK, _LOOK_PER_NODE * nodes)


class AgentSpec:
    """What a manager's agents are made from.

    `workers` is how many there are at most on each node, None for one per core that Ray counts there. `shared` says
    that other pools may use the same ones.
    """

    def __init__(self, name: str, payload: bytes, workers: int | None, tls: ClusterTLS | None, *, shared: bool) -> None:
        self.name = name
        self.shared = shared
        self._payload = payload
        self._workers = workers
        self._tls = tls

    def on(self, node: str, cores: int) -> Any:
        """The agent of a node, made where there is none: by whichever host comes first. One that is stuck is killed."""
        name = f"{self.name}:{node}"
        with contextlib.suppress(ValueError):
            there: Any = ray.get_actor(name, NAMESPACE)
            answered, _ = ray.wait([there.answer.remote()], timeout=_STUCK)
            if not answered:
                ray.kill(there)
                raise Unready("it did not answer, and is killed")
            return there
        groups = {"ctl": _CTL_THREADS, "life": _LIFE_THREADS}
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
            .remote(self._payload, cores if self._workers is None else None, self._tls)
        )


class NodeManager:
    """Finds the nodes, has an agent on each, and knows which of them answer."""

    def __init__(self, host: ClusterHost, agents: AgentSpec, start_timeout: float) -> None:
        self._host = host
        self._agents = agents
        self._start_timeout = start_timeout
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._notify = threading.Event()
        self._ended = False
        self._looked = False
        self._alive: set[str] = set()
        self._joining: dict[str, Any] = {}
        self._errors: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._last_failure = ""
        self._not_before: dict[str, float] = {}
        self._deaths = 0
        self._lost_actors: dict[str, Any] = {}
        self._threads: set[threading.Thread] = set()
        self._to_join: deque[tuple[str, str, int]] = deque()
        self._began: dict[str, float] = {}

    def begin(self) -> None:
        """Begin to follow the cluster. StartError where the system gives no thread."""
        try:
            self._spawn(self._follow_nodes, "blastdoor-nodes")
            self._host.begin()
        except (RuntimeError, OSError) as error:
            self.end()
            raise StartError(f"the pool can't start its threads: {error}") from error

    def wait_started(self, timeout: float) -> None:
        """Wait until each node of this moment has an agent that is ready. StartError where one can't be had."""
        with self._changed:
            began = time.monotonic()
            while not self._has_started():
                rounds = max(len(self._alive) - 1, 0) // JOINING  # before the last, which has all the time
                left = began + rounds * (SLOW + look_pause(len(self._alive))) + timeout - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._ended:
                raise PoolClosed("the pool was closed while it started")
            if self._errors:
                raise StartError(next(iter(self._errors.values())))
            if not self._host.links:
                why = self._last_failure or (
                    f"no agent was ready within {timeout:g} s" if self._alive else "it has no node that lives"
                )
                raise StartError(f"the Ray cluster gives no place for workers: {why}")

    def _has_started(self) -> bool:
        """Whether there is nothing left to wait for. An agent that was about to end is made anew meanwhile."""
        if self._ended or self._errors:
            return True
        if not self._looked or self._joining:
            return False
        return bool(self._host.links) or all(self._failures[name] >= _MOST_FAILURES for name in self._alive)

    def end(self) -> None:
        """Leave all agents, which end with their last host, and end the threads."""
        with self._changed:
            self._ended = True
            threads = list(self._threads)
            self._changed.notify_all()
        self._notify.set()
        until = time.monotonic() + _END_PATIENCE
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(until - time.monotonic(), 0))  # one that Ray does not let go is left behind
        with self._lock:
            links = list(self._host.links.values())
            unsure = [*self._lost_actors.values(), *(actor for actor in self._joining.values() if actor is not None)]
        self._host.end()
        self._host.links.clear()
        for node in self._host.placement.nodes():
            self._host.placement.remove(node)
        if ray_connection.is_connected():
            with contextlib.suppress(Exception):  # those that can't be told hear of no host any more, and end
                self._leave([link.actor for link in links], _LEAVE_PATIENCE)
            with contextlib.suppress(Exception):
                self._leave(unsure, _END_PATIENCE)

    def _leave(self, actors: list[Any], patience: float) -> None:
        """Tell agents that this host goes, and kill those that have no other then."""
        told = {actor.leave.remote(self._host.name): actor for actor in actors}
        if not told:
            return
        done, late = ray.wait(list(told), num_returns=len(told), timeout=patience)
        for answer in done:
            with contextlib.suppress(Exception):
                if ray.get(answer) == b"last":
                    ray.kill(told[answer])
        for answer in late:
            if not self._agents.shared:
                ray.kill(told[answer])

    def numbers(self) -> tuple[int, int, int, int]:
        """How many workers are starting, idle and busy, and how many have died, as the agents last told."""
        pulses = [link.heartbeat for link in list(self._host.links.values())]
        starting, idle, busy = (sum(getattr(pulse, name) for pulse in pulses) for name in ("starting", "idle", "busy"))
        return starting, idle, busy, self._deaths + sum(pulse.deaths for pulse in pulses)

    def workers(self) -> list[WorkerInfo]:
        """The workers of all nodes, as the agents last told."""
        links = list(self._host.links.values())
        return [_at(worker, link.node.address) for link in links for worker in link.heartbeat.workers]

    # -- the nodes' thread -------------------------------------------------------------------------

    def _follow_nodes(self) -> None:
        blind = False
        while not self._ended:
            try:
                if ray_connection.is_connected():
                    self._look()
                blind = False
            except Exception as error:  # noqa: BLE001 - Ray has no one root for what it raises here
                if not blind:
                    logger.error("the nodes of the Ray cluster can't be listed: %s: %s", type(error).__name__, error)
                blind = True
            self._notify.wait(look_pause(len(self._alive)))
            self._notify.clear()

    def _look(self) -> None:
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        draining = _draining()
        for name, link in list(self._host.links.items()):
            if name not in alive:
                link.lose("Ray says that its node is dead")
            elif (name in draining) is not link.node.draining:
                logger.info("node %s is %s", link.node.address, "draining" if name in draining else "taken back")
                self._host.placement.update(link.node, draining=name in draining)
        now = time.monotonic()
        for name, node in alive.items():
            with self._lock:
                taken = name in self._host.links or name in self._joining or name in draining
                if self._ended or taken or self._not_before.get(name, 0) > now:
                    continue
                self._joining[name] = None
                self._to_join.append((name, node["NodeManagerAddress"], max(int(node["Resources"].get("CPU", 1)), 1)))
        with self._changed:
            self._looked = True
            self._alive = set(alive)
            for kept in (self._errors, self._failures, self._not_before, self._lost_actors):
                for name in set(kept) - self._alive:
                    del kept[name]
            self._changed.notify_all()
        self._begin_joins()  # last: where no thread is to be had, it raises

    def _begin_joins(self) -> None:
        """Begin to have agents on the nodes that wait for one, as many as may be at once."""
        with self._lock:
            now = time.monotonic()
            quick = sum(now - began < SLOW for began in self._began.values())
            while self._to_join and quick < JOINING and not self._ended:
                waiting = self._to_join.popleft()
                self._began[waiting[0]] = now
                try:
                    self._spawn(functools.partial(self._see_to, *waiting), "blastdoor-join")
                except BaseException:
                    self._to_join.appendleft(waiting)
                    del self._began[waiting[0]]
                    raise
                quick += 1

    def _see_to(self, name: str, address: str, cores: int) -> None:
        """Have an agent on a node, then the next ones."""
        try:
            self._join(name, address, cores)
        finally:
            with self._lock:
                self._began.pop(name, None)
                self._threads.discard(threading.current_thread())
            with contextlib.suppress(RuntimeError):  # there is no thread to be had: the next look tries again
                self._begin_joins()

    def _join(self, name: str, address: str, cores: int) -> None:
        error = failure = ""
        actor = None
        try:
            actor = self._joining[name] = self._agents.on(name, cores)
            joined = decode(self._await(actor.join.remote(self._host.name)), JoinReply)
            if joined.ending:
                raise Unready("it is about to end")
            if joined.error:
                error = joined.error
                raise Unready(f"no worker can be started there: {joined.error}")
            self._add(actor, Node(name, address, joined.capacity), joined)
        except Exception as why:  # noqa: BLE001 - Ray has no one root for what it raises here
            failure = f"no agent on node {address}: {why}"
            if not self._ended:
                logger.error("%s", failure)
        if actor is not None and (error or self._ended) and name not in self._host.links:
            with contextlib.suppress(Exception):
                self._leave([actor], 0 if self._ended else _END_PATIENCE)
        with self._changed:
            self._joining.pop(name, None)
            if failure:
                self._last_failure = failure
                self._failures[name] += 1
                self._not_before[name] = time.monotonic() + (_AGAIN if error else _LOOK)
                if error and not self._ended:
                    self._errors[name] = error
                    if not self._host.links:
                        self._host.placement.refuse(lambda: WorkersUnavailable(error, _AGAIN))
            else:
                self._errors.pop(name, None)
                self._failures.pop(name, None)
            self._changed.notify_all()

    def _await(self, answer: Any) -> object:
        """Wait for an agent to be ready, for its workers' start too, and no longer than this pool lives."""
        until = time.monotonic() + self._start_timeout + 30
        while not self._ended:
            ready, _ = ray.wait([answer], timeout=_LOOK)
            if ready:
                return ray.get(answer)
            if time.monotonic() > until:
                raise Unready("it was not ready in time")
        raise Unready("the pool is closed")

    def _add(self, actor: Any, node: Node, joined: JoinReply) -> None:
        link = AgentLink(actor, node, joined, self._host)
        link.on_lost = self._lost
        try:
            link.begin()
            with self._lock:
                if self._ended or link.lost:
                    raise Unready(link.lost or "the pool is closed")
                self._host.links[node.name] = link
                self._host.placement.add(node)
            self._host.make_room()
        except OSError as error:
            link.close()
            raise Unready(f"its agent can't be reached at {joined.address}:{joined.port}: {error}") from error
        except BaseException:
            link.close()
            raise
        logger.info("node %s takes part, with %d jobs at once", node.address, node.capacity)

    def _lost(self, link: AgentLink) -> None:
        """A link's agent is gone, or cut off: have another one made, where its node still lives."""
        with self._lock:
            self._deaths += link.heartbeat.deaths
            if self._host.links.get(link.node.name) is link:
                del self._host.links[link.node.name]
            if not self._ended:
                self._lost_actors[link.node.name] = link.actor
        self._notify.set()

    def _spawn(self, work: Callable[[], object], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._lock:
            if self._ended:
                raise RuntimeError("the pool is closed")
            thread.start()
            self._threads.add(thread)


class Unready(Exception):
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
