"""This process's connection to a Ray cluster: made where there is none, and ended with the last pool that needs it."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable
from typing import Final

import ray
from ray.job_config import JobConfig

from ..errors import ConfigurationError, PoolForked, StartError

_lock = threading.RLock()  # reentrant: a finalizer may close a pool in the middle of anything
_inherited = False
_KNOCK: Final = 5.0
"""Seconds that the head of a cluster has to take a connection."""

_users = 0
_ours = False


class _NoPlaces(list[str]):
    """Ray would have agents look for every module in this process's working directory first, that of an app perhaps
    whose code is to run in a sandbox. They look where they are installed."""

    def extend(self, places: Iterable[str], /) -> None:
        """Add nothing."""


def attach(address: str | None) -> None:
    """Be connected to the cluster at `address`; None and "auto" are for the one that runs here.

    Where this process has called `ray.init` by itself, that connection is used, and stays. StartError where there
    is no cluster, ConfigurationError where this process is connected to another one, PoolForked where it has inherited
    the connection of its parent.
    """
    global _users, _ours
    with _lock:
        if _inherited:
            raise PoolForked(
                "this process was forked from one that is connected to a Ray cluster, and would destroy that "
                "connection: fork before the first ClusterPool, or start the process with 'spawn'"
            )
        if not ray.is_initialized():
            try:
                _knock(address)
                job_config = JobConfig()
                job_config._py_driver_sys_path = _NoPlaces()
                ray.init(
                    address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, job_config=job_config
                )
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise StartError(
                    f"there is no Ray cluster at {address or 'auto'!r} ({error}): start one (ray start --head), "
                    f"or give the address of one that runs"
                ) from error
            _ours = True
        elif address not in (None, "auto", "local") and not _same(address, ray.get_runtime_context().gcs_address):
            raise ConfigurationError(
                f"this process is connected to the Ray cluster at {ray.get_runtime_context().gcs_address}, and can't "
                f"be to the one at {address} as well: leave the address out, or use a process for each"
            )
        _users += 1


def is_connected() -> bool:
    """Whether this process is connected still. Ray would connect by itself at the next call, to whatever it finds."""
    return bool(ray.is_initialized())


def _same(address: str | None, other: str) -> bool:
    """Whether two addresses are of one place, as far as names can tell."""

    def resolved(place: str) -> tuple[str, str]:
        host, _, port = place.rpartition(":")
        try:
            return socket.gethostbyname(host), port
        except OSError:
            return host, port

    mine = {"127.0.0.1", resolved(f"{socket.gethostname()}:")[0]}
    one, two = resolved(address or ""), resolved(other)
    return one == two or (one[1] == two[1] and one[0] in mine)


def _knock(address: str | None) -> None:
    """See that somebody listens: Ray itself would try for minutes. OSError where nobody does."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()


def detach() -> None:
    """A pool needs the connection no more."""
    global _users, _ours
    with _lock:
        _users -= 1
        if not _users and _ours:
            _ours = False
            if ray.is_initialized():
                ray.shutdown()


def _forked() -> None:
    global _lock, _users, _ours, _inherited
    _inherited = _inherited or bool(ray.is_initialized())
    _lock = threading.RLock()
    _users = 0
    _ours = False


os.register_at_fork(after_in_child=_forked)
