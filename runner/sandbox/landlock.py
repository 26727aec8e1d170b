"""Landlock, the kernel's own sandbox for unprivileged processes (landlock(7)): rules on paths and ports, and scopes."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from ..platform import linux

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_NET_PORT: Final = 2

EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE: Final = 1 << 4 | 1 << 5
_MAKE_DEVICE: Final = 1 << 6 | 1 << 11
_MAKE: Final = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 12
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15

READ: Final = _READ_FILE | _READ_DIR
WRITE: Final = READ | _WRITE_FILE | _REMOVE | _MAKE | _REFER | _TRUNCATE
_FILE_RIGHTS: Final = EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

_BIND_TCP: Final = 1 << 0
_CONNECT_TCP: Final = 1 << 1
_SCOPE_ABSTRACT_SOCKETS: Final = 1 << 0
_SCOPE_SIGNALS: Final = 1 << 1

PORTS_ABI: Final = 4
SCOPES_ABI: Final = 6


def abi() -> int:
    """The version of Landlock that this kernel has; 0 where it has none, or it is switched off."""
    try:
        return linux.syscall(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def restrict(rights: Mapping[str, int], ports: Iterable[int]) -> None:
    """Give up all access to files but these rights below these paths, TCP but to these ports, and what lies outside.

    Paths that are not there are passed over. Needs no_new_privs. OSError where the kernel refuses.
    """
    version = abi()
    handled = _handled(version)
    network = _BIND_TCP | _CONNECT_TCP if version >= PORTS_ABI else 0
    scopes = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if version >= SCOPES_ABI else 0
    attributes = struct.pack("=QQQ", handled, network, scopes)
    size = 24 if version >= SCOPES_ABI else 16 if version >= PORTS_ABI else 8
    ruleset = linux.syscall(_CREATE_RULESET, attributes, size, 0)
    try:
        for path, granted in rights.items():
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                allowed = granted & handled
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    allowed &= _FILE_RIGHTS
                linux.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", allowed, fd), 0)
            finally:
                os.close(fd)
        if network:
            for port in ports:
                linux.syscall(_ADD_RULE, ruleset, _NET_PORT, struct.pack("=QQ", _CONNECT_TCP, port), 0)
        linux.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _handled(version: int) -> int:
    """All rights on files that this version knows."""
    rights = EXECUTE | READ | _WRITE_FILE | _REMOVE | _MAKE | _MAKE_DEVICE
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if version >= since:
            rights |= right
    return rights
