"""Control groups, where one is delegated to this process (cgroups(7), version 2; systemd's Delegate=yes)."""

from __future__ import annotations

import contextlib
import os
from typing import Final

WAY_OUT: Final = (
    "none is delegated to this process: in a systemd unit, set Delegate=memory pids and DelegateSubgroup=host"
)
_ROOT: Final = "/sys/fs/cgroup"
_CONTROLLERS: Final = ("memory", "pids")


def enter(entrance: str) -> None:
    """Go into the group with this entrance; what this process starts is in it too."""
    with open(entrance, "w", encoding="ascii") as file:
        file.write("0")


def delegated() -> str:
    """The control group in which this process may make others that limit memory and processes; empty for none."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            own = next((line[3:].strip() for line in file if line.startswith("0::")), "")
        if not own or own == "/":
            return ""
        # A group with processes of its own has no limited children: the unit's processes sit one below (cgroups(7)).
        parent = os.path.dirname(_ROOT + own)
        with open(f"{parent}/cgroup.subtree_control", encoding="ascii") as file:
            enabled = file.read().split()
    except OSError:
        return ""
    writable = os.access(parent, os.W_OK) and os.access(f"{parent}/cgroup.procs", os.W_OK)
    return parent if writable and all(name in enabled for name in _CONTROLLERS) else ""


class Group:
    """The control group of one worker, which enters it by `enter` with its `entrance`."""

    def __init__(self, parent: str, number: int, memory: int | None, processes: int) -> None:
        """Make it. OSError where that is refused."""
        self._path = f"{parent}/blastdoor-{os.getpid()}-{number}"
        self.entrance = f"{self._path}/cgroup.procs"
        os.mkdir(self._path)
        try:
            self._set("pids.max", processes)
            if memory is not None:
                self._set("memory.max", memory)
                with contextlib.suppress(FileNotFoundError):  # a kernel that does not account for swap
                    self._set("memory.swap.max", 0)
        except BaseException:
            os.rmdir(self._path)
            raise

    def remove(self) -> bool:
        """Kill what is in it, and remove it. False where something in it is still dying: ask again later."""
        with contextlib.suppress(OSError):
            self._set("cgroup.kill", 1)
        try:
            os.rmdir(self._path)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def _set(self, name: str, value: int) -> None:
        with open(f"{self._path}/{name}", "w", encoding="ascii") as file:
            file.write(str(value))
