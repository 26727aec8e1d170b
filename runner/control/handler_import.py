"""A worker that imports its handler: a pool of this very handler, started by its module, would have no end.

Each worker of that pool would import the module again, and start one more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..errors import ConfigurationError

_under_way = False


@contextmanager
def under_way() -> Iterator[None]:
    """The handler is imported meanwhile."""
    global _under_way
    _under_way = True
    try:
        yield
    finally:
        _under_way = False


def refuse_pool_of(module: str) -> None:
    """ConfigurationError where a worker is just importing this module, of a pool's handler, or its package."""
    while module and _under_way:
        if _is_initializing(sys.modules.get(module)):
            raise ConfigurationError(
                f"module {module!r} starts a pool of its own handler where it is imported, and so would each worker of "
                f"that pool: start it below `if __name__ == '__main__':`, in a function, or in another file"
            )
        module = module.rpartition(".")[0]


def _is_initializing(module: ModuleType | None) -> bool:
    """Whether a module's import has begun and not ended: as importlib notes it in the module's spec."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
