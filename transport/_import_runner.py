"""The package `runner` that the imports of this one mean: the one beside it.

A program may have a `runner` of its own. In somebody's own process that can only be said. The command has no other use
for the name, and takes ours.
"""

from __future__ import annotations

import os
import sys
from importlib import util
from importlib.machinery import ModuleSpec

_HOME = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "runner")


def _find() -> None:
    loaded = sys.modules.get("runner")
    spec: ModuleSpec | None = util.find_spec("runner") if loaded is None else loaded.__spec__
    origin = spec.origin if spec is not None else getattr(loaded, "__file__", None)
    if origin is not None and os.path.realpath(os.path.dirname(origin)) == os.path.realpath(_HOME):
        return
    if loaded is None and _is_command():
        ours = util.spec_from_file_location("runner", f"{_HOME}/__init__.py", submodule_search_locations=[_HOME])
        assert ours is not None
        assert ours.loader is not None
        sys.modules["runner"] = module = util.module_from_spec(ours)
        ours.loader.exec_module(module)
        return
    raise ImportError(
        f"blastdoor's package 'runner' is hidden by {origin or 'another one'}, which comes first on sys.path: give "
        f"that another name, or serve the app by the command 'blastdoor serve', for which it may keep its name",
        name="runner",
    )


def _is_command() -> bool:
    """Whether this process is the `blastdoor` command."""
    return os.path.basename(sys.argv[0]) == "blastdoor" or "transport.cli" in sys.orig_argv[1:5]


_find()
