"""What all fronts together have counted and show. Counts of a front that is gone stay: sums never go back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from prometheus_client import Metric

from transport.fronts.messages import Counts, Family, Numbers, Sample

_COUNTED: Final = frozenset(("counter", "histogram", "summary"))
_HIGHEST: Final = frozenset(("blastdoor_last_reload_failed",))
"""Gauges of which the highest tells; of all others the sum does."""

_FAULTS: Final = 50
_SUMS: Final = ("starting", "idle", "busy", "waiting", "deaths", "running", "lanes")

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Sums:
    """The numbers of fronts that are there, and what those that are gone had counted when they last said so."""

    def __init__(self) -> None:
        self._now: dict[int, Numbers] = {}
        self._gone: dict[str, _Sum] = {}
        self._gone_counts: dict[str, Counts] = {}

    def take(self, front: int, numbers: Numbers) -> None:
        """A front has told its numbers."""
        self._now[front] = numbers

    def retire(self, front: int) -> None:
        """A front is gone: what it counted stays."""
        numbers = self._now.pop(front, None)
        if numbers is None:
            return
        for family in numbers.metrics:
            if family.kind in _COUNTED:
                self._gone.setdefault(family.name, _Sum(family)).add(family)
        for path, counts in numbers.counts.items():
            self._gone_counts[path] = _added(self._gone_counts.get(path), counts)

    def metrics(self) -> list[Metric]:
        """The metrics of all fronts."""
        sums = {name: _Sum(gone.family, dict(gone.values)) for name, gone in self._gone.items()}
        for numbers in self._now.values():
            for family in numbers.metrics:
                sums.setdefault(family.name, _Sum(family)).add(family)
        return [total.metric() for total in sums.values()]

    def counts(self, path: str) -> Counts:
        """What the pools of a mount have counted, those of fronts that are gone included."""
        total = self._gone_counts.get(path, Counts(0, {}))
        return Counts(total.deaths, dict(total.outcomes))


class _Sum:
    """A metric of several fronts."""

    def __init__(self, family: Family, values: dict[_Key, float] | None = None) -> None:
        self.family = family
        self.values: dict[_Key, float] = {} if values is None else values

    def add(self, family: Family) -> None:
        """Those of one more front."""
        highest = family.name in _HIGHEST
        for sample in family.samples:
            key = _key(sample)
            before = self.values.get(key, 0.0)
            self.values[key] = max(before, sample.value) if highest else before + sample.value

    def metric(self) -> Metric:
        """As prometheus_client has it."""
        metric = Metric(self.family.name, self.family.documentation, self.family.kind)
        for (name, labels), value in self.values.items():
            metric.add_sample(name, dict(labels), value)
        return metric


def _key(sample: Sample) -> _Key:
    return sample.name, tuple(sample.labels.items())


def _added(one: Counts | None, other: Counts) -> Counts:
    if one is None:
        return other
    return Counts(one.deaths + other.deaths, dict(Counter(one.outcomes) + Counter(other.outcomes)))


def whole_status(told: list[dict[str, Any]], sums: Sums, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows for all fronts, from what each one's would, and what the parent knows by itself.

    The median of several is weighted by their answers, the p99 is the highest.
    """
    active = sum(status["active"] for status in told)
    return {
        "active": active,
        "latency": _latency([status["latency"] | {"answers": _last_minute(status)} for status in told]),
        "history": _history(status["history"] for status in told),
        "hour": _hour([status["hour"] for status in told]),
        "pools": _pools([status["pools"] for status in told], sums),
        "faults": sorted(
            (fault for status in told for fault in status["faults"]), key=lambda fault: -float(fault["at"])
        )[:_FAULTS],
        **own,
    }


def _last_minute(status: Mapping[str, Any]) -> int:
    return sum(second["answers"] for second in status["history"] if second["at"] > status["now"] - 60)


def _latency(parts: list[dict[str, float]]) -> dict[str, float]:
    weight = sum(part["answers"] for part in parts)
    if not weight:
        return {"p50": 0.0, "p99": 0.0}
    return {
        "p50": sum(part["p50"] * part["answers"] for part in parts) / weight,
        "p99": max(part["p99"] for part in parts if part["answers"]),
    }


def _history(histories: Iterable[list[dict[str, float]]]) -> list[dict[str, float]]:
    seconds: dict[float, list[dict[str, float]]] = {}
    for history in histories:
        for second in history:
            seconds.setdefault(second["at"], []).append(second)
    return [
        {
            "at": at,
            "answers": sum(part["answers"] for part in parts),
            "errors": sum(part["errors"] for part in parts),
            **_latency(parts),
        }
        for at, parts in sorted(seconds.items())
    ]


def _hour(told: list[dict[str, Any]]) -> dict[str, Any]:
    mounts = sorted({mount for hour in told for mount in hour})
    return {
        mount: {
            "provider": next(hour[mount]["provider"] for hour in told if mount in hour),
            "minutes": _history(hour[mount]["minutes"] for hour in told if mount in hour),
        }
        for mount in mounts
    }


def _pools(told: list[dict[str, dict[str, Any]]], sums: Sums) -> dict[str, dict[str, Any]]:
    whole: dict[str, dict[str, Any]] = {}
    for pools in told:
        for path, pool in pools.items():
            known = whole.get(path)
            if known is None:
                gone = sums.counts(path)
                known = whole[path] = {
                    **pool,
                    **dict.fromkeys(_SUMS, 0),
                    "deaths": gone.deaths,
                    "outcomes": gone.outcomes,
                    "workers": [],
                    "ready": False,
                }
            for name in _SUMS:
                known[name] += pool[name]
            known["outcomes"] = dict(Counter(known["outcomes"]) + Counter(pool["outcomes"]))
            known["workers"] += pool["workers"]
            known["ready"] |= pool["ready"]
    return whole
