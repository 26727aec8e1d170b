"""The code of a pool's app as its first worker has imported it: later workers have the same, whatever is edited.

The first worker that has loaded the handler writes the sources of the app's modules into a file in memory and seals it
(memfd_create(2), fcntl(2)). Each later one, that of a new template process too, imports from there. Where a file is
still what it was, Python's own caches of bytecode are used. The host makes the file and never reads it.

Modules of the interpreter and of installed packages are not kept, nor what an app imports in the middle of a job.
"""

from __future__ import annotations

import fcntl
import os
import site
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Final

import msgspec

from .import_isolation import HOME

MOST: Final = 64 << 20
"""The most bytes of sources that are kept."""

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class KeptModule(msgspec.Struct, array_like=True, frozen=True):
    """A module's source, and what its file was then: time of change in seconds, size in bytes."""

    origin: str
    package: bool
    mtime: int
    size: int
    source: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, KeptModule]).decode


def make_snapshot() -> int:
    """An empty one, as a descriptor; -1 where the system has none to give."""
    try:
        return os.memfd_create("blastdoor-code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1


def own_view(fd: int) -> int:
    """A descriptor for the same file that shares nothing else with anybody; -1 where there is none."""
    if fd < 0:
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def use(fd: int) -> bool:
    """Have the app imported from the snapshot; False where there is none yet, or none that makes sense."""
    try:
        if fd < 0 or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            return False
        kept = _decode(os.pread(fd, MOST, 0))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    sys.meta_path.insert(0, _KeptFinder(kept))
    return True


def keep(fd: int) -> None:
    """Make the snapshot of what is imported now, unless somebody does."""
    try:
        if fd < 0:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            return
        data = memoryview(_encode(_imported()))
        if len(data) > MOST:
            print(f"blastdoor: the app's sources have over {MOST} bytes: workers that start later read the files")
            return
        os.ftruncate(fd, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], written)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        return  # somebody else is at it, or the sandbox does not let us: later workers read the files


def _imported() -> dict[str, KeptModule]:
    """The app's modules that are imported from source files."""
    homes = [sys.prefix, sys.base_prefix, *site.getsitepackages(), os.path.dirname(os.__file__), HOME]
    skipped = tuple(os.path.realpath(home) + os.sep for home in homes)
    found = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        if not isinstance(origin, str) or not origin.endswith(".py") or os.path.realpath(origin).startswith(skipped):
            continue
        try:
            with open(origin, "rb") as file:
                state = os.fstat(file.fileno())
                source = file.read()
        except OSError:
            continue
        package = spec is not None and spec.submodule_search_locations is not None
        found[name] = KeptModule(origin, package, int(state.st_mtime), state.st_size, source)
    return found


class _KeptLoader(SourceFileLoader):
    """Loads a module from its kept source; by Python's own caches where its file is what it was."""

    def __init__(self, name: str, kept: KeptModule) -> None:
        super().__init__(name, kept.origin)
        self._kept = kept

    def path_stats(self, path: str) -> Mapping[str, float]:
        """What bytecode is compared with. OSError where the file has changed: there is none for the kept source."""
        stats: Mapping[str, float] = super().path_stats(path)
        if path == self._kept.origin and (int(stats["mtime"]), stats["size"]) != (self._kept.mtime, self._kept.size):
            raise OSError("the file has changed")
        return stats

    def get_data(self, path: str) -> bytes:
        """The kept source; else a file's bytes."""
        return self._kept.source if path == self._kept.origin else super().get_data(path)


class _KeptFinder:
    """Finds the modules that are kept (`sys.meta_path`)."""

    def __init__(self, kept: dict[str, KeptModule]) -> None:
        self._kept = kept

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of this name, as it was."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        places = [os.path.dirname(kept.origin)] if kept.package else None
        loader = _KeptLoader(name, kept)
        return spec_from_file_location(name, kept.origin, loader=loader, submodule_search_locations=places)
