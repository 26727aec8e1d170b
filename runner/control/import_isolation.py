"""Which of this project's names an app has modules of its own for: its modules and ours never hide each other.

Our package is loaded from where it lies, whatever is on the path. Where the app has a `runner` of its own, ours goes by
another name in its zygote and workers, and `import runner` finds the app's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Final

NAMES: Final = ("runner", "transport")
"""The top-level packages of this project."""

OTHER_NAME: Final = "blastdoor_runner"
"""What `runner` is called where an app has a module of that name."""

HOME: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The directory of the package `runner`."""

BOOTSTRAP: Final = """
import sys
name, home, *sys.path[:] = (
    sys.stdin.buffer.read(int(sys.stdin.buffer.readline())).decode('utf-8', 'surrogateescape').split('\\0')
)
from importlib import import_module, util
spec = util.spec_from_file_location(name, home + '/__init__.py', submodule_search_locations=[home])
sys.modules[name] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
del spec, home
import_module(name + '.worker.zygote').main()
"""
"""The zygote's program: our package by the name and from the place that come on standard input, whatever the path."""

_SOURCES: Final = (".py", ".so", ".pyc")


def taken_names(path: Sequence[str], first: int) -> list[str]:
    """Those of NAMES that mean something else on this path: in its `first` entries, or before where ours lie."""
    parent = os.path.realpath(os.path.dirname(HOME))
    found = []
    for name in NAMES:
        ours_seen = False
        for index, entry in enumerate(path):
            ours_seen |= os.path.realpath(entry or ".") == parent
            if (index < first or not ours_seen) and _offers(entry, name, os.path.join(parent, name)):
                found.append(name)
                break
    return found


def _offers(entry: str, name: str, ours: str) -> bool:
    """Whether an entry of the path has a module of this name that is not ours."""
    try:
        spec = PathFinder.find_spec(name, [entry])
    except (OSError, ImportError, ValueError):
        return False
    if spec is None:
        return False
    if spec.origin is not None:
        return os.path.realpath(os.path.dirname(spec.origin)) != ours
    places = [place for place in spec.submodule_search_locations or () if os.path.realpath(place) != ours]
    return any(file.endswith(_SOURCES) for place in places if os.path.isdir(place) for file in os.listdir(place))


class AppModuleFinder:
    """A finder of modules (`sys.meta_path`) that gives an app its own of these names, wherever on the path they are.

    A directory without an `__init__.py` would else come after a package of ours.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The app's module of this name, if it is one of the names."""
        if path is not None or name not in self._names:
            return None
        parent = os.path.dirname(HOME)
        ours = os.path.realpath(os.path.join(parent, name))
        found: ModuleSpec | None = None
        for entry in sys.path:
            if _offers(entry, name, ours):
                found = PathFinder.find_spec(name, [entry])
                break
        return found
