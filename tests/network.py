"""Hosts that are real ones to each other: network namespaces, and a link between them that can be cut, slow, or lossy.

A link is a pair of network interfaces (veth(4)), or of TUN devices whose packets this process passes on, as late and as
few of them as it is told: so that a slow link does not need what not every kernel has (sch_netem).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

HEAD: Final = "10.77.0.1"
NODE: Final = "10.77.0.2"

_SET_INTERFACE: Final = 0x400454CA
_TUN: Final = 0x0001 | 0x1000


def available() -> str:
    """Why there can be no network namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces that last"
    if shutil.which("ip") is None:
        return "there is no ip here: install iproute2"
    name = f"bd{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        ip("netns", "del", name)
    elif not done.stderr:
        return "ip netns add fails"
    return done.stderr.strip()


class Network:
    """Two namespaces, `head` and `node`, and what is between them."""

    def __init__(self) -> None:
        number = os.getpid()
        self.head, self.node = f"bd{number}h", f"bd{number}n"
        for name in (self.head, self.node):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")

    def command(self, where: str, *words: str) -> list[str]:
        """A command that runs in a namespace."""
        return ["ip", "netns", "exec", where, *words]

    def connect(self) -> None:
        """By a pair of interfaces."""
        ip("link", "add", "bdh", "netns", self.head, "type", "veth", "peer", "name", "bdn", "netns", self.node)
        for name, interface, address in ((self.head, "bdh", HEAD), (self.node, "bdn", NODE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")

    def cut(self) -> None:
        """The link is down, as if its cable were pulled."""
        ip("-n", self.node, "link", "set", "bdn", "down")

    def close(self) -> None:
        """Remove all of it, once nothing runs there."""
        for name in (self.head, self.node):
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            ip("netns", "del", name)


class SlowLink:
    """The link of a network, passed on by a thread here: `delay` seconds late each way; nothing where it is `lossy`."""

    def __init__(self, network: Network, delay: float) -> None:
        self.delay = delay
        self.lossy = False
        self._fds = [_tun(network.head, "bdh"), _tun(network.node, "bdn")]
        for name, interface, address in ((network.head, "bdh", HEAD), (network.node, "bdn", NODE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
        self._over_read, self._over_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="link")
        self._thread.start()

    def _run(self) -> None:
        late: list[tuple[float, int, int, bytes]] = []
        numbers = itertools.count()
        others = {self._fds[0]: self._fds[1], self._fds[1]: self._fds[0]}
        while True:
            timeout = max(late[0][0] - time.monotonic(), 0) if late else None
            ready, _, _ = select.select([*others, self._over_read], [], [], timeout)
            if self._over_read in ready:
                return
            now = time.monotonic()
            for fd in ready:
                packet = os.read(fd, 65536)
                if not self.lossy:
                    heapq.heappush(late, (now + self.delay, next(numbers), others[fd], packet))
            while late and late[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(late)
                with contextlib.suppress(OSError):  # its interface is down
                    os.write(fd, packet)

    def close(self) -> None:
        """End it."""
        os.write(self._over_write, b"x")
        self._thread.join()
        for fd in (*self._fds, self._over_read, self._over_write):
            os.close(fd)


def ip(*words: str) -> None:
    """Run iproute2's command."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _tun(namespace: str, interface: str) -> int:
    """A TUN device in a namespace, made by a process that is there for a moment, and its descriptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        "import fcntl, os, socket, struct, sys\n"
        "fd = os.open('/dev/net/tun', os.O_RDWR)\n"
        f"fcntl.ioctl(fd, {_SET_INTERFACE}, struct.pack('16sH22x', {interface!r}.encode(), {_TUN}))\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b'x'], [fd])\n"
    )
    with ours, theirs:
        subprocess.run(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            check=True,
        )
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
    return fds[0]


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two namespaces, as long as the block lasts."""
    made = Network()
    try:
        yield made
    finally:
        made.close()
