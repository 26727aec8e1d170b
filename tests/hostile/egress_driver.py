"""A host in a network of its own, with a public address and private ones; told what to do by JSON lines.

To be started by root in new network and mount namespaces (unshare(1)).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import psutil
import trustme

from runner import BlastdoorError, Limits, Pool, Request, Sandbox
from tests.hostile.driver import become_user

PUBLIC: Final = "93.184.216.34"
PRIVATE: Final = {
    "loop.example.com": "127.0.0.1",
    "private.example.com": "10.1.2.3",
    "meta.example.com": "169.254.169.254",
    "six.example.com": "fd00::1",
}
OWN: Final = "93.184.216.1"
"""The host's own address: one that is public."""

ALLOWED: Final = (
    "api.example.com:443",
    "own.example.com:443",
    "both.example.com:443",
    *(f"{name}:443" for name in PRIVATE),
)


class Log(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def set_up_network(directory: Path, outside: int) -> None:
    """Two networks: the host's, and what is outside, where a process of this pid is."""
    inside = f"nsenter --net=/proc/{outside}/ns/net"
    for words in (
        "ip link set lo up",
        "ip link add within type veth peer name without",
        f"ip link set without netns {outside}",
        f"ip addr add {OWN}/24 dev within",
        "ip addr add fd00::2/64 dev within nodad",
        "ip link set within up",
        f"{inside} ip link set lo up",
        f"{inside} ip addr add {PUBLIC}/24 dev without",
        f"{inside} ip addr add 10.1.2.3/32 dev lo",
        f"{inside} ip addr add 169.254.169.254/32 dev lo",
        f"{inside} ip addr add fd00::1/64 dev without nodad",
        f"{inside} ip link set without up",
        f"ip route add 10.1.2.3/32 via {PUBLIC}",
        f"ip route add 169.254.169.254/32 via {PUBLIC}",
    ):
        subprocess.run(words.split(), check=True)
    hosts = directory / "hosts"
    names = {"127.0.0.1": ["localhost", "both.example.com"], PUBLIC: ["api.example.com", "other.example.com"]}
    names[PUBLIC].append("both.example.com")
    for name, address in {**PRIVATE, "own.example.com": OWN}.items():
        names.setdefault(address, []).append(name)
    hosts.write_text("".join(f"{address} {' '.join(known)}\n" for address, known in names.items()))
    hosts.chmod(0o644)
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


def main(user: str, profile: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="egress-"))
    directory.chmod(0o755)
    authority = trustme.CA()
    trust = directory / "trust.pem"
    authority.cert_pem.write_to_path(str(trust))
    trust.chmod(0o644)
    names = [host.partition(":")[0] for host in ALLOWED]
    issued = authority.issue_cert(*names, "other.example.com")
    issued.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
    command = ["unshare", "--net", sys.executable, "-m", "tests.hostile.egress_server", str(directory / "server.pem")]
    outside = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert outside.stdin is not None
    assert outside.stdout is not None
    assert outside.stdout.readline() == "ready\n"
    set_up_network(directory, outside.pid)
    own = socket.create_server((OWN, 443))
    if user == "user":
        become_user()
    log = Log()
    logging.getLogger("blastdoor").addHandler(log)
    logging.getLogger("blastdoor").setLevel(logging.INFO)
    text = trust.read_text() if user == "root" else authority.cert_pem.bytes().decode()
    sandbox = Sandbox(profile=profile, connect_hosts=ALLOWED)  # type: ignore[arg-type] # from the command line
    with Pool(
        "tests.hostile.egress_handler:app",
        workers=1,
        sandbox=sandbox,
        env={"TRUST": text, "HTTPS_PROXY": "http://evil.example.com:1", "NO_PROXY": "*"},
        limits=Limits(wall_seconds=30),
        debug=True,
    ) as pool:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            answer: Any
            if asked["do"] == "call":
                try:
                    with pool.open(Request("GET", asked["target"], body=asked.get("body", "").encode())) as job:
                        answer = json.loads(b"".join(job))
                except BlastdoorError as error:
                    answer = {"failed": str(error)}
            elif asked["do"] == "seen":
                outside.stdin.write("seen\n")
                outside.stdin.flush()
                answer = json.loads(outside.stdout.readline())
            elif asked["do"] == "log":
                answer = log.lines[:]
            elif asked["do"] == "children":
                children = psutil.Process(os.getpid()).children(recursive=True)
                answer = {}
                for child in children:
                    with contextlib.suppress(psutil.Error):
                        answer[child.pid] = " ".join(child.cmdline())
            else:
                os.kill(asked["pid"], 9)
                answer = "killed"
            print(json.dumps(answer), flush=True)
    own.close()
    outside.stdin.close()
    outside.wait(10)


if __name__ == "__main__":
    main(*sys.argv[1:])
