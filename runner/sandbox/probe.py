"""What this machine can enforce: each layer of the profiles, tried in a process of its own.

For single-threaded processes, as the zygote and `blastdoor doctor` are: they fork to try.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import msgspec

from ..platform import linux
from . import landlock, mount_namespace, seccomp

OWN_USER: Final = "own user"
FILES: Final = "files"
PORTS: Final = "ports"
SIGNALS: Final = "signals"
CALLS: Final = "system calls"
SCRATCH: Final = "scratch"
USERS: Final = "user namespace"
NAMESPACES: Final = "namespaces"

FIRST_UID: Final = 1 << 30
"""Users of their own for workers begin here: far above those that systems give out."""


class Layer(msgspec.Struct, frozen=True):
    """One kind of protection. `lacking` says why this machine can't give it, and the way out; empty where it can."""

    name: str
    what: str
    lacking: str = ""


def probe_layers() -> list[Layer]:
    """All layers, as far as this process could have them for its workers."""
    version = landlock.abi()
    root = os.geteuid() == 0
    no_landlock = "this kernel has no Landlock, or it is switched off: use Linux 5.13 or newer, with lsm=landlock"
    layers = [
        Layer(FILES, f"reading and writing by path (Landlock {version})", "" if version else no_landlock),
        Layer(
            PORTS,
            "outgoing TCP to named ports (Landlock)",
            "" if version >= landlock.PORTS_ABI else "Landlock knows ports from Linux 6.7 on: grant no `connect`",
        ),
        Layer(
            SIGNALS,
            "no signals to others, no abstract sockets (Landlock)",
            "" if version >= landlock.SCOPES_ABI else "Landlock knows scopes from Linux 6.12 on",
        ),
        Layer(CALLS, "system calls (seccomp)", seccomp.available() or _try_seccomp()),
    ]
    if root:
        why = attempt(lambda: switch_user(FIRST_UID))
        way_out = f"{why}: give the container CAP_SETUID and CAP_SETGID, or run the host as an ordinary user"
        layers.append(Layer(OWN_USER, "a user of its own for each worker", way_out if why else ""))
    why = attempt(_try_scratch)
    allow = "give the container CAP_SYS_ADMIN" if root else "allow user namespaces (user.max_user_namespaces, AppArmor)"
    layers.append(
        Layer(
            SCRATCH, "a scratch directory of limited size (mounts)", f"{why}: {allow}, or use scratch=None" * bool(why)
        )
    )
    why = attempt(_try_users)
    layers.append(Layer(USERS, "threads counted for each worker (user namespace)", f"{why}: {allow}" * bool(why)))
    why = attempt(_try_namespaces)
    layers.append(Layer(NAMESPACES, "processes, network and IPC of its own", f"{why}: {allow}" * bool(why)))
    return layers


def attempt(step: Callable[[], object]) -> str:
    """Take a step in a process of its own; what went wrong, empty where nothing did."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - it is told in the parent
            os.write(write, (str(error) or type(error).__name__).encode()[:1000])
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        words = answer.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return words or (f"the trial ended with status {status}" if status else "")


def switch_user(uid: int) -> None:
    """Become a user of one's own, for good. For root."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _try_seccomp() -> str:
    def load() -> None:
        linux.set_no_new_privs()
        seccomp.load(seccomp.allow_filter(), os.getpid())

    return attempt(load)


def _try_scratch() -> None:
    mount_namespace.enter_mount_namespace()
    mount_namespace.mount_scratch()


def _try_users() -> None:
    if os.geteuid() == 0:
        switch_user(FIRST_UID)
    linux.unshare(linux.NEW_USERS)


def _try_namespaces() -> None:
    if os.geteuid() != 0:
        mount_namespace.enter_mount_namespace()
    linux.unshare(linux.NEW_PIDS | linux.NEW_NETWORK | linux.NEW_IPC | linux.NEW_HOSTNAME)
