"""Importing from a directory that a sandboxed worker may not list: names are looked up one by one.

Python's own finder lists a directory first, and a worker that is granted a package is not granted what lies beside it.
Whether a file is there can be asked for without (stat(2)); whether it may be read is the sandbox's to say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

_SUFFIXES = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES)


class StatFinder:
    """A path entry finder (importlib) for one directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module of that name. ModuleNotFoundError, with the way out, for one that the sandbox does not grant."""
        place = os.path.join(self._directory, fullname.rpartition(".")[2])
        candidates: list[tuple[str, list[str] | None]] = [
            (os.path.join(place, "__init__" + suffix), [place]) for suffix in _SUFFIXES
        ]
        candidates += [(place + suffix, None) for suffix in _SUFFIXES]
        for path, locations in candidates:
            if os.path.isfile(path):
                _check_granted(fullname, path)
                return spec_from_file_location(fullname, path, submodule_search_locations=locations)
        if os.path.isdir(place):  # a portion of a namespace package (PEP 420)
            spec = ModuleSpec(fullname, None)
            spec.submodule_search_locations = [place]
            return spec
        return None

    def invalidate_caches(self) -> None:
        """There are none."""


def _check_granted(name: str, path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        raise ModuleNotFoundError(
            f"the sandbox does not grant {path!r}, which lies beside the app: name it in readable= if it is needed",
            name=name,
        ) from None


def install(directories: Iterable[str], readable: Sequence[str]) -> None:
    """Have these directories looked into name by name, but for those that may be read whole."""
    for directory in directories:
        if not any(directory == granted or directory.startswith(granted + os.sep) for granted in readable):
            finder = StatFinder(directory)
            sys.path_importer_cache[directory] = finder
