"""The zygote's own view of the file system: a mount namespace with room for the workers' scratch directories.

What a worker needs and could not reach as a user of its own, because it lies below a directory that is closed to
others, is mounted where it was; the rest of such a directory is gone, and so is the host's /tmp. An ordinary user may
have such a view in a user namespace (user_namespaces(7)).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import Final

from ..platform import linux

SCRATCH_PARENT: Final = "/tmp"
_FILES: Final = 8192
"""How many files a scratch directory holds."""


class MountNamespace:
    """The view, entered for good when it is made. OSError where the machine does not allow it."""

    def __init__(self, needed: Iterable[str], *, other_users: bool) -> None:
        needed = sorted({*needed, *map(os.path.realpath, needed)})
        enter_mount_namespace()
        hidden = {SCRATCH_PARENT}
        if other_users:
            hidden |= {closed for path in needed if (closed := first_closed(path))}
        for directory in sorted(hidden, key=len):
            if not any(directory.startswith(upper + "/") for upper in hidden):
                _hide(directory, [path for path in needed if path.startswith(directory + "/")])

    def add_scratch(self, number: int, size: int, uid: int, gid: int) -> str:
        """Make a worker's scratch directory, of so many bytes; its path."""
        path = f"{SCRATCH_PARENT}/worker-{number}"
        os.mkdir(path, 0o700)
        options = f"size={size},nr_inodes={_FILES},mode=0700,uid={uid},gid={gid}"
        linux.mount("tmpfs", path, "tmpfs", linux.NO_SUID | linux.NO_DEVICES, options)
        return path

    def remove_scratch(self, number: int) -> None:
        """Remove it, with all that is in it."""
        path = f"{SCRATCH_PARENT}/worker-{number}"
        if os.path.ismount(path):
            linux.unmount(path)
        if os.path.isdir(path):
            os.rmdir(path)


def enter_mount_namespace() -> None:
    """Leave the host's mount namespace; an ordinary user gets a user namespace with it, which maps nobody else."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        linux.unshare(linux.NEW_MOUNTS)
    else:
        linux.unshare(linux.NEW_USERS | linux.NEW_MOUNTS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    linux.mount("", "/", flags=linux.PRIVATE | linux.RECURSIVE)


def mount_scratch() -> None:
    """Whether a scratch directory can be mounted: to be tried in a process of its own."""
    linux.mount("tmpfs", SCRATCH_PARENT, "tmpfs", linux.NO_SUID | linux.NO_DEVICES, "size=64k,mode=0755")


def first_closed(path: str) -> str:
    """The topmost directory above the path that others may not pass through; empty where there is none."""
    parts = path.split("/")
    for end in range(2, len(parts)):
        upper = "/".join(parts[:end])
        if not os.stat(upper).st_mode & stat.S_IXOTH:
            return upper
    return ""


def _hide(directory: str, kept: list[str]) -> None:
    """Mount an empty directory over this one, with only these paths below it, which stay what they are."""
    kept = [path for path in kept if not any(path.startswith(upper + "/") for upper in kept)]
    opened = []
    try:
        for path in kept:
            try:
                opened.append((path, os.open(path, os.O_PATH | os.O_CLOEXEC)))
            except FileNotFoundError:
                continue
        linux.mount("tmpfs", directory, "tmpfs", linux.NO_SUID | linux.NO_DEVICES, "size=1m,mode=0755")
        for path, fd in opened:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                os.makedirs(path, 0o755, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            linux.mount(f"/proc/self/fd/{fd}", path, flags=linux.BIND | linux.RECURSIVE)
    finally:
        for _, fd in opened:
            os.close(fd)
