"""Pools within pools: a handler that starts a pool of itself where it is imported would have no end.

Each worker of that pool would import it again, and start one more. So a zygote is told of the pools that it is within,
and a pool that is one of these is refused while a handler is imported; and so is any that lies too deep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import ConfigurationError

DEEPEST: Final = 4
"""How many pools may be within each other."""

within: list[str] = []
"""The fingerprints of the pools that this process is a worker, or a zygote, of: outermost first."""

_importing = False


@contextmanager
def importing_handler() -> Iterator[None]:
    """The handler is imported, or made, meanwhile."""
    global _importing
    before, _importing = _importing, True
    try:
        yield
    finally:
        _importing = before


def fingerprint(*parts: object) -> str:
    """Of what decides which code a pool's workers import, and how that goes on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def refuse_endless(pool: str, handler: str) -> list[str]:
    """The fingerprints for a pool's own processes, of which this one's is `pool`. ConfigurationError for no end."""
    if _importing and pool in within:
        raise ConfigurationError(
            f"a pool of handler {handler!r} is started where its own workers import it, and would have no end: "
            f"start it below `if __name__ == '__main__':`, in a function, or in another file"
        )
    if len(within) >= DEEPEST:
        raise ConfigurationError(
            f"a pool of handler {handler!r} is started within {len(within)} others, each in a worker of the one "
            f"before, and that may have no end: start it where workers do not"
        )
    return [*within, pool]
