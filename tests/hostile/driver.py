"""The host under attack: a process with pools of its own, as root or an ordinary user, told what to do by JSON lines.

It is not the tests' own process, since an attack that succeeds may kill it.
"""

from __future__ import annotations

import json
import logging
import os
import site
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runner import (
    CancelScope,
    JobFailed,
    Limits,
    Pool,
    Request,
    Sandbox,
)
from runner.sandbox.mount_namespace import MountNamespace

USER = 54321
SECRET = "the-host-s-own-secret"
SCRATCH = 4 << 20
THREADS = 40
OPEN_FILES = 64


def become_user() -> None:
    """Go on as an ordinary user, who can reach the interpreter and the project."""
    here = os.getcwd()
    needed = [here, sys.prefix, sys.base_prefix, *site.getsitepackages(), *filter(os.path.isdir, sys.path)]
    MountNamespace(needed, other_users=True)
    os.chmod("/tmp", 0o1777)
    os.chdir(here)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


class Host:
    """What there is to attack, and the pools."""

    def __init__(self, profile: str) -> None:
        self._profile = profile
        self._pools: dict[str, Pool] = {}
        directory = Path(tempfile.mkdtemp(prefix="canary-"))
        self._directory = directory
        self.canary = directory / "canary"
        self.canary.write_text("intact")
        self.canary.chmod(0o600)
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 0))
        self._unix = socket.socket(socket.AF_UNIX)
        self._unix.bind(str(directory / "socket"))
        self._datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._datagrams.bind(str(directory / "datagrams"))
        self._abstract = socket.socket(socket.AF_UNIX)
        self._abstract.bind(f"\0blastdoor-canary-{os.getpid()}")
        for listener in (self._unix, self._abstract):
            listener.listen()
        for waiting in (self._tcp, self._udp, self._unix, self._datagrams, self._abstract):
            waiting.setblocking(False)
        self._victim = subprocess.Popen(["sleep", "600"], start_new_session=True)

    def facts(self) -> dict[str, Any]:
        return {
            "host": os.getpid(),
            "profile": self._profile,
            "victim": self._victim.pid,
            "canary": str(self.canary),
            "directory": str(self._directory),
            "tcp": self._tcp.getsockname()[1],
            "udp": self._udp.getsockname()[1],
            "unix": str(self._directory / "socket"),
            "datagrams": str(self._directory / "datagrams"),
            "abstract": f"blastdoor-canary-{os.getpid()}",
            "secret": SECRET,
            "scratch": SCRATCH,
            "threads": THREADS,
            "open_files": OPEN_FILES,
        }

    def pool(self, name: str) -> Pool:
        if name not in self._pools:
            make = Sandbox.strict if self._profile == "strict" else Sandbox.default
            sandbox = make(
                scratch=SCRATCH,
                threads=THREADS,
                open_files=OPEN_FILES,
                memory="192MiB",
                cpu_seconds=0.5,
                processes=name == "processes",
                connect=(self._tcp.getsockname()[1],) if name == "network" else (),
            )
            limits = Limits(wall_seconds=20)
            self._pools[name] = Pool("tests.hostile.attacks:app", workers=1, sandbox=sandbox, limits=limits).start()
        return self._pools[name]

    def attack(self, name: str, arguments: dict[str, Any], pool: str, timeout: float | None) -> dict[str, Any]:
        """Run an attack; what came of it, and of a benign request after it."""
        found = self._call(self.pool(pool), name, arguments, timeout)
        benign = self._call(self.pool(pool), "nothing", {}, None)
        return {**found, "benign": benign["body"], "harm": self.harm()}

    def _call(self, pool: Pool, name: str, arguments: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        try:
            with CancelScope(timeout), pool.open(Request("POST", f"/{name}", body=json.dumps(arguments))) as job:
                return {"outcome": "answer", "body": b"".join(job).decode(errors="replace")}
        except JobFailed as error:
            return {"outcome": error.fault.kind, "body": error.fault.detail}
        except TimeoutError as error:
            return {"outcome": "cancelled", "body": str(error)}
        except Exception as error:
            return {"outcome": type(error).__name__, "body": str(error)}

    def harm(self) -> list[str]:
        """What has been done to the host."""
        harm = []
        if not self.canary.exists() or self.canary.read_text() != "intact":
            harm.append("the canary file")
        elif self.canary.stat().st_mode & 0o777 != 0o600 or self.canary.stat().st_mtime < 1000:
            harm.append("the canary file's attributes")
        if self._victim.poll() is not None:
            harm.append("the victim process")
        if os.getpriority(os.PRIO_PROCESS, self._victim.pid) or os.getpriority(os.PRIO_PROCESS, 0):
            harm.append("a priority")
        for name, waiting in (("tcp", self._tcp), ("unix", self._unix), ("abstract", self._abstract)):
            try:
                waiting.accept()[0].close()
            except BlockingIOError:
                continue
            harm.append(f"a connection by {name}")
        for name, waiting in (("udp", self._udp), ("datagrams", self._datagrams)):
            try:
                waiting.recv(100)
            except BlockingIOError:
                continue
            harm.append(f"a datagram by {name}")
        return harm

    def workers(self, pool: str) -> dict[str, Any]:
        return {"workers": [info.pid for info in self.pool(pool).workers()]}

    def close_pools(self) -> dict[str, Any]:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        return {"scratch": [name for name in os.listdir("/tmp") if name.startswith("worker-")]}

    def close(self) -> None:
        self.close_pools()
        self._victim.kill()
        self._victim.wait()
        for waiting in (self._tcp, self._udp, self._unix, self._datagrams, self._abstract):
            waiting.close()
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()


def main() -> None:
    """Serve orders until standard input ends."""
    user, profile = sys.argv[1:]
    logging.basicConfig(level=logging.CRITICAL)
    os.environ["BLASTDOOR_TEST_SECRET"] = SECRET
    if user == "user" and os.geteuid() == 0:
        become_user()
    host = Host(profile)
    print(json.dumps(host.facts()), flush=True)
    try:
        for line in sys.stdin:
            order = json.loads(line)
            what = order.pop("do")
            print(json.dumps(getattr(host, what)(**order)), flush=True)
    finally:
        host.close()


if __name__ == "__main__":
    main()
