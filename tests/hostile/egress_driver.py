"""A host in a network of its own, with a public address and private ones; told what to do by JSON lines.

To be started by root in new network and mount namespaces (unshare(1)).
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile
import threading
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
ALLOWED: Final = ("api.example.com:443", "both.example.com:443", *(f"{name}:443" for name in PRIVATE))


class Handler(http.server.BaseHTTPRequestHandler):
    """What the public host serves, and what the private ones would."""

    protocol_version = "HTTP/1.1"
    seen: Final[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.connection.getsockname()[0])
        body = bytes(int(self.path.rpartition("/")[2] or 0)) if self.path.startswith("/bytes/") else b"from outside"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        taken = 0
        while taken < size:
            taken += len(self.rfile.read(min(1 << 16, size - taken)))
        body = str(taken).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Counts its connections."""

    open = 0
    request_queue_size = 256

    def process_request_thread(self, request: Any, address: Any) -> None:
        self.open += 1
        try:
            super().process_request_thread(request, address)
        finally:
            self.open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go."""


class Log(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def set_up_network(directory: Path) -> None:
    for words in (
        "ip link set lo up",
        f"ip addr add {PUBLIC}/32 dev lo",
        "ip addr add 10.1.2.3/32 dev lo",
        "ip addr add 169.254.169.254/32 dev lo",
        "ip addr add fd00::1/128 dev lo",
    ):
        subprocess.run(words.split(), check=True)
    hosts = directory / "hosts"
    names = {"127.0.0.1": ["localhost"], PUBLIC: ["api.example.com", "other.example.com", "both.example.com"]}
    for name, address in PRIVATE.items():
        names.setdefault(address, []).append(name)
    names["127.0.0.1"].append("both.example.com")
    hosts.write_text("".join(f"{address} {' '.join(known)}\n" for address, known in names.items()))
    hosts.chmod(0o644)
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


def main(user: str, profile: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="egress-"))
    directory.chmod(0o755)
    set_up_network(directory)
    authority = trustme.CA()
    trust = directory / "trust.pem"
    authority.cert_pem.write_to_path(str(trust))
    trust.chmod(0o644)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(host.partition(":")[0] for host in ALLOWED), "other.example.com").configure_cert(context)
    server = Server(("", 443), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
                answer = {"addresses": Handler.seen[:], "open": server.open}
                Handler.seen.clear()
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


if __name__ == "__main__":
    main(*sys.argv[1:])
