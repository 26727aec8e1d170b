"""What each of several fronts gets of what the settings say for all of them."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from msgspec import UNSET

from runner.errors import ConfigurationError
from transport.serving.settings import QUEUE, PoolSettings, Settings
from transport.serving.settings_parsing import parse_workers


def how_many(settings: Settings) -> int:
    """How many fronts the settings ask for. ConfigurationError where that can't work."""
    fronts = max((os.cpu_count() or 1) // 8, 1) if settings.fronts == "auto" else int(settings.fronts)
    if fronts > 1:
        if settings.reload:
            raise ConfigurationError("reload is for development, and takes one front: leave fronts at 1")
        for path, mount in settings.all_mounts.items():
            least = _workers(mount.with_defaults(settings.defaults))[0]
            if least < fronts:
                if settings.fronts == "auto":
                    return max(least, 1)
                raise ConfigurationError(
                    f"mount {path!r}: {fronts} fronts need {fronts} workers or more, one for each, not {least}"
                )
    return fronts


def share(settings: Settings, front: int, fronts: int) -> Settings:
    """The settings of one of the fronts, numbered from 0: its part of workers, queue and connections."""
    mounts = {
        path: msgspec.structs.replace(mount, **_shares(mount.with_defaults(settings.defaults), front, fronts))
        for path, mount in settings.all_mounts.items()
    }
    return msgspec.structs.replace(
        settings, app="", mounts=mounts, connections=_up(settings.connections, fronts), admin="none"
    )


def _shares(pool: PoolSettings, front: int, fronts: int) -> dict[str, Any]:
    least, most = (_part(number, front, fronts) for number in _workers(pool))
    shares: dict[str, Any] = {"workers": least if least == most else f"{least}:{most}"}
    shares["queue"] = _up(QUEUE if pool.queue is UNSET else pool.queue, fronts)
    if pool.per_provider is not UNSET:
        shares["per_provider"] = {name: _up(limit, fronts) for name, limit in pool.per_provider.items()}
    if pool.spares is not UNSET:
        shares["spares"] = _up(pool.spares, fronts)
    return shares


def _workers(pool: PoolSettings) -> tuple[int, int]:
    workers = (os.cpu_count() or 1) if pool.workers is UNSET else parse_workers(pool.workers)
    return workers if isinstance(workers, tuple) else (workers, workers)


def _part(number: int, front: int, fronts: int) -> int:
    return number // fronts + (front < number % fronts)


def _up(number: int, fronts: int) -> int:
    return -(-number // fronts)
