"""What is outside: an HTTPS server in a network of its own, at all of its addresses; told what to do by lines."""

from __future__ import annotations

import http.server
import json
import ssl
import sys
import threading
from typing import Any, Final


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


def main(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(("", 443), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({"addresses": Handler.seen[:], "open": server.open}), flush=True)
        Handler.seen.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
