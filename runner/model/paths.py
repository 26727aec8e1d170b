"""Lists of paths that a user gives, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..errors import ConfigurationError


def check_paths(name: str, paths: object) -> tuple[str, ...]:
    """The paths, absolute. ConfigurationError, which calls them `name`, for no list, and for what is not there."""
    if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Iterable):
        raise ConfigurationError(f"{name} is a list of paths, not {paths!r}")
    found = []
    for path in paths:
        absolute = os.path.abspath(os.fspath(path))
        if not os.path.exists(absolute):
            raise ConfigurationError(f"{name}: {absolute!r} is not there: make it first")
        found.append(absolute)
    return tuple(found)
