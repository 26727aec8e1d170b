"""Counters and histograms that cost little to count with: prometheus_client renders them, and counts in Python no more.

Its own `Histogram.observe` takes some 5 µs, which a small request would pay three times.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Buckets of times: from a small round trip to a long stream."""

_LE: Final = [*map(floatToGoString, SECONDS), "+Inf"]


class Times:
    """How often which times were seen. Safe to use from any thread."""

    __slots__ = ("_lock", "counts", "total")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = [0] * len(_LE)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        bucket = bisect_left(SECONDS, seconds)
        with self._lock:
            self.counts[bucket] += 1
            self.total += seconds


class _Family(Collector):
    """Metrics of one name, one for each tuple of labels. `flush` is called before their numbers are looked at."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        documentation: str,
        labels: Sequence[str],
        flush: Callable[[], object] = lambda: None,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._flush = flush
        self._make()
        registry.register(self)  # which collects, to learn the names

    @abstractmethod
    def _make(self) -> None:
        """There are none yet."""


class Histograms(_Family):
    """A family of histograms of times in seconds: a `Times` for each tuple of labels."""

    def _make(self) -> None:
        self.children: dict[tuple[str, ...], Times] = {}

    def of(self, labels: tuple[str, ...]) -> Times:
        """The one with these labels."""
        child = self.children.get(labels)
        return self.children.setdefault(labels, Times()) if child is None else child

    def collect(self) -> Iterable[Metric]:
        """The numbers of this moment."""
        self._flush()
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, times in list(self.children.items()):
            buckets = list(zip(_LE, accumulate(times.counts), strict=True))
            family.add_metric(labels, buckets, times.total)
        return (family,)


class Counters(_Family):
    """A family of counters: a number for each tuple of labels. Safe to use from any thread."""

    def _make(self) -> None:
        self._lock = threading.Lock()
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], amount: float = 1) -> None:
        """So much more."""
        with self._lock:
            self.values[labels] = self.values.get(labels, 0) + amount

    def collect(self) -> Iterable[Metric]:
        """The numbers of this moment."""
        self._flush()
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in list(self.values.items()):
            family.add_metric(labels, value)
        return (family,)
