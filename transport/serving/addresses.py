"""Sockets to listen at, bound before anything else is done, so that an address that is taken is told at once."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import ConfigurationError
from transport.serving.settings_parsing import parse_bind

if TYPE_CHECKING:
    from transport.serving.settings import Settings

logger = logging.getLogger("blastdoor")

_FIRST_INHERITED = 3


def bind_port(host: str, port: int, option: str, where: str = "host", *, v6_only: bool = False) -> socket.socket:
    """A socket at a host's port, 0 for any. ConfigurationError where it is taken, or the host is none.

    `option` is the command's for the port, `where` that for the host. With `v6_only` "::" is not all of IPv4 as well,
    as it is by the kernel's default (ipv6(7)).
    """
    try:
        host = host or "127.0.0.1"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = next((entry[4] for entry in found if entry[0] == family), (host, port))  # with a scope (RFC 4007)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigurationError(
            f"{host!r} is no address of this machine ({error}): choose another with --{where}"
        ) from error
    # With its protocol named asyncio turns Nagle's algorithm off on its connections (TCP_NODELAY, tcp(7)): an answer
    # in two writes would wait for the client's delayed acknowledgement otherwise, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections have these from it (tcp(7)): a client whose host has gone is found after two minutes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        if v6_only:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(
            f"{host}:{port} can't be listened at: {error}; choose another with --{option}"
        ) from error
    return listener


def bind_path(path: str, mode: int | None = None, option: str = "uds") -> socket.socket:
    """A socket at a path, in the place of one that nobody listens at any more. ConfigurationError for another.

    `option` is the command's for it. Who may connect is `mode`'s to say, and else the umask's (unix(7)).
    """
    if _is_served(path):
        raise ConfigurationError(f"somebody listens at {path!r} already: stop it, or choose another with --{option}")
    listener = socket.socket(socket.AF_UNIX)
    try:
        if Path(path).is_socket():
            Path(path).unlink()
        before = None if mode is None else os.umask(0o777 & ~mode)  # the path may be another's to change afterwards
        try:
            listener.bind(path)
        finally:
            if before is not None:
                os.umask(before)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"{path!r} can't be listened at: {error}; choose another with --{option}") from error
    return listener


def inherited() -> list[socket.socket]:
    """The sockets that systemd, or its like, has opened for this process (sd_listen_fds(3)). Nobody else inherits them.

    ConfigurationError for what is no socket that listens.
    """
    told, meant_for = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not told:
        return []
    if meant_for and meant_for != str(os.getpid()):
        logger.warning("LISTEN_FDS=%s is meant for process %s, not for this one: it is ignored", told, meant_for)
        return []
    found = []
    try:
        for fd in range(_FIRST_INHERITED, _FIRST_INHERITED + int(told)):
            os.set_inheritable(fd, False)
            found.append(socket.socket(fileno=fd))
            if not found[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ConfigurationError(f"LISTEN_FDS: descriptor {fd} is a socket that does not listen")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"LISTEN_FDS={told}: {error}") from error
    return found


class Listeners:
    """The sockets that requests come to; those at `paths` are ours to remove. `scheme` is what is spoken there."""

    def __init__(self, sockets: list[socket.socket], paths: Iterable[str] = (), scheme: str = "http") -> None:
        self.sockets = sockets
        self._paths = list(paths)
        self._scheme = scheme

    @classmethod
    def of(cls, settings: Settings) -> Listeners:
        """Those that settings name, or that systemd has opened. ConfigurationError for one that can't be had."""
        listeners = cls(inherited(), scheme="https" if settings.tls_cert else "http")
        if listeners.sockets:
            return listeners
        try:
            if settings.bind:
                listeners._bind([parse_bind(address) for address in settings.bind], settings.uds_permissions)
            elif settings.uds:
                listeners._add_path(settings.uds, settings.uds_permissions, "uds")
            else:
                listeners.sockets.append(bind_port(settings.host, settings.port, "port"))
        except BaseException:
            listeners.close()
            raise
        return listeners

    def _bind(self, addresses: list[str | tuple[str, int]], mode: int | None) -> None:
        if twice := [address for address in addresses if addresses.count(address) > 1 and address[1] != 0]:
            raise ConfigurationError(f"bind names {twice[0]!r} twice")
        v4_ports = {address[1] for address in addresses if not isinstance(address, str) and ":" not in address[0]}
        for address in addresses:
            if isinstance(address, str):
                self._add_path(address, mode, "bind")
            else:
                host, port = address
                v6_only = ":" in host and port in v4_ports
                self.sockets.append(bind_port(host, port, "bind", "bind", v6_only=v6_only))

    def _add_path(self, path: str, mode: int | None, option: str) -> None:
        self.sockets.append(bind_path(path, mode, option))
        self._paths.append(os.path.abspath(path))

    def give(self, uid: int, gid: int) -> None:
        """Make unix sockets at paths somebody's own. OSError where that can't be."""
        for path in self._paths:
            os.chown(path, uid, gid, follow_symlinks=False)

    def unlink(self) -> None:
        """Remove the unix sockets' paths, once."""
        paths, self._paths = self._paths, []
        for path in paths:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:  # in a directory of somebody else's: the next start takes it over
                logger.warning("%s can't be removed: %s", path, error.strerror)

    def close(self) -> None:
        """Listen no more."""
        self.unlink()
        for sock in self.sockets:
            sock.close()

    def __str__(self) -> str:
        return ", ".join(name_of(sock, self._scheme) for sock in self.sockets)


def name_of(listener: socket.socket, scheme: str = "http") -> str:
    """The address as a URL, or as unix:PATH."""
    address = listener.getsockname()
    if isinstance(address, (str, bytes)):
        return f"unix:{address if isinstance(address, str) else '@' + os.fsdecode(address[1:])}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{scheme}://{host}:{address[1]}"


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(1)
        client.connect(path)
        return True
    return False
