"""The pools of a process as Prometheus metrics: counts and times from their events, gauges as they are asked for.

    metrics = PoolMetrics(prometheus_client.REGISTRY)
    metrics.watch("shop", pool)

Names and units follow Prometheus: seconds, bytes, `_total`. Needs prometheus_client (the extra `serve`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .events import Batch, Event, JobRefused, JobTime, WorkerEnded, WorkerReady
from .metric_families import Counters, Histograms

if TYPE_CHECKING:
    from .protocols import AnyPool


class PoolMetrics(Collector):
    """Metrics of pools, each by the name that it is watched under."""

    def __init__(self, registry: CollectorRegistry) -> None:
        who = ("pool", "provider")
        self._batches: list[Batch[JobTime]] = []
        self._jobs = Histograms(
            registry,
            "blastdoor_job_duration_seconds",
            "Time from a worker's taking a job to its end, by how it ended.",
            (*who, "outcome"),
            self._flush,
        )
        self._waits = Histograms(
            registry, "blastdoor_job_wait_seconds", "Time that a job waited for a worker.", who, self._flush
        )
        self._heads = Histograms(
            registry,
            "blastdoor_job_head_seconds",
            "Time to the head of a response whose body was still to come.",
            who,
            self._flush,
        )
        self._refused = Counters(registry, "blastdoor_jobs_refused_total", "Callers that got no worker.", who)
        self._starts = Histograms(
            registry, "blastdoor_worker_start_seconds", "Time from the order of a worker to its readiness.", ("pool",)
        )
        self._ends = Counters(
            registry, "blastdoor_worker_ends_total", "Workers that ended, by signal or exit code.", ("pool", "how")
        )
        self._pools: list[tuple[str, AnyPool]] = []
        registry.register(self)

    def watch(self, name: str, pool: AnyPool) -> Callable[[], None]:
        """Count what happens in a pool, under this name, which several may share; gives what ends that."""
        self._pools.append((name, pool))
        batch: Batch[JobTime] = Batch(functools.partial(self._take, name))
        self._batches.append(batch)
        ends = pool.subscribe(functools.partial(self._count, name), healthy=False), pool.note_times(batch)

        def end() -> None:
            for stop in ends:
                stop()
            self._batches.remove(batch)
            self._pools.remove((name, pool))

        return end

    def _flush(self) -> None:
        """Count what was noted: before anybody looks."""
        for batch in list(self._batches):
            batch.flush()

    def collect(self) -> Iterable[Metric]:
        """The gauges of this moment."""
        workers = GaugeMetricFamily("blastdoor_workers", "Worker processes by state.", labels=("pool", "state"))
        jobs = GaugeMetricFamily("blastdoor_jobs_running", "Jobs that run at this moment.", labels=("pool",))
        lanes = GaugeMetricFamily("blastdoor_lanes", "Jobs that the workers that are ready can run.", labels=("pool",))
        waiting = GaugeMetricFamily("blastdoor_queue_length", "Callers that wait for a worker.", labels=("pool",))
        memory = GaugeMetricFamily(
            "blastdoor_workers_resident_memory_bytes", "Resident memory of the workers, summed.", labels=("pool",)
        )
        pools: dict[str, list[AnyPool]] = {}
        for name, pool in list(self._pools):
            pools.setdefault(name, []).append(pool)
        for name, together in pools.items():
            stats = [pool.stats() for pool in together]
            for state in ("starting", "idle", "busy"):
                workers.add_metric((name, state), sum(getattr(one, state) for one in stats))
            jobs.add_metric((name,), sum(one.running for one in stats))
            lanes.add_metric((name,), sum(one.lanes for one in stats))
            waiting.add_metric((name,), sum(one.waiting for one in stats))
            memory.add_metric((name,), sum(worker.rss for pool in together for worker in pool.workers()))
        return workers, jobs, lanes, waiting, memory

    def _take(self, pool: str, job: JobTime) -> None:
        provider, outcome, seconds, waited = job
        if outcome:
            self._jobs.of((pool, provider, outcome)).observe(seconds)
            self._waits.of((pool, provider)).observe(waited)
        else:
            self._heads.of((pool, provider)).observe(seconds)

    def _count(self, pool: str, event: Event) -> None:
        if isinstance(event, JobRefused):
            self._refused.add((pool, event.provider))
        elif isinstance(event, WorkerReady):
            self._starts.of((pool,)).observe(event.seconds)
        elif isinstance(event, WorkerEnded):
            how = event.signal or ("unknown" if event.exit_code is None else f"exit {event.exit_code}")
            self._ends.add((pool, how))
