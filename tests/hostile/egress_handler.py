"""What a sandboxed handler may try with the proxy that is its only way out. Each answers with JSON."""

from __future__ import annotations

import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

from runner import HandlerRequest, HandlerResponse

PROXY = ("127.0.0.1", 3128)


def app(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Call what the path names."""
    arguments = {name: values[0] for name, values in parse_qs(request.query).items()}
    return json.dumps(globals()["do_" + request.path[1:]](**arguments)).encode()


def _context() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=os.environ["TRUST"])


def do_get(url: str) -> dict[str, Any]:
    """As any client does, by HTTPS_PROXY."""
    try:
        with urllib.request.urlopen(url, context=_context(), timeout=20) as response:
            return {"status": response.status, "size": len(response.read())}
    except urllib.error.URLError as error:
        return {"error": str(error.reason)}


def do_post(url: str, size: str) -> dict[str, Any]:
    """An upload."""
    with urllib.request.urlopen(url, data=bytes(int(size)), context=_context(), timeout=20) as response:
        return {"status": response.status, "taken": int(response.read())}


def do_requests(url: str) -> dict[str, Any]:
    """By requests, as it comes."""
    import requests

    with open(os.path.join(os.environ["HOME"], "trust.pem"), "w") as file:
        file.write(os.environ["TRUST"])
    answer = requests.get(url, timeout=20, verify=file.name)
    return {"status": answer.status_code, "text": answer.text}


def do_ask(head: str, rest: str = "0") -> dict[str, Any]:
    """Send the proxy something, and what it says."""
    with socket.create_connection(PROXY, 20) as client:
        try:
            client.sendall(unquote_to_bytes(head))
            client.sendall(b"x" * int(rest))
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has heard enough
        answer = b""
        try:
            while data := client.recv(4096):
                answer += data
        except ConnectionResetError:
            pass
    return {"answer": answer.decode("latin-1")}


def do_connect(host: str, port: str) -> dict[str, Any]:
    """Past the proxy."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(3)
            sock.connect((host, int(port)))
    except OSError as error:
        return {"error": str(error)}
    return {"connected": True}


def do_sockets() -> dict[str, Any]:
    """Sockets of other kinds, and servers."""
    found = {}
    kinds = {
        "udp": (socket.AF_INET, socket.SOCK_DGRAM, 0),
        "raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0),
        "netlink": (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    }
    for name, kind in kinds.items():
        try:
            socket.socket(*kind).close()
            found[name] = "made"
        except OSError as error:
            found[name] = str(error)
    try:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 3129))
            sock.listen()
        found["server"] = "made"
    except OSError as error:
        found["server"] = str(error)
    return found


def do_hold(count: str, most: str) -> dict[str, Any]:
    """Many tunnels at once, and connections that say nothing; then one more that is honest."""
    held = []
    granted = 0
    for _ in range(int(count)):
        client = socket.create_connection(PROXY, 5)
        client.sendall(b"CONNECT api.example.com:443 HTTP/1.1\r\n\r\n")
        held.append(client)
    for client in held:
        client.settimeout(10 if granted < int(most) else 0.05)
        try:
            granted += b"200" in client.recv(100)
        except TimeoutError:
            pass
    for client in held:
        client.close()
    return {"granted": granted, "after": do_get("https://api.example.com/")}


def do_hold_and_die() -> dict[str, Any]:
    """Die with a tunnel open."""
    client = socket.create_connection(PROXY, 5)
    client.sendall(b"CONNECT api.example.com:443 HTTP/1.1\r\n\r\n")
    client.recv(100)
    os._exit(3)


def do_environment() -> dict[str, Any]:
    """What it is told of the way out."""
    return {name: value for name, value in os.environ.items() if "PROXY" in name.upper()}


def do_flood(count: str) -> dict[str, Any]:
    """Ask for what is refused, again and again."""
    for _ in range(int(count)):
        with socket.create_connection(PROXY, 20) as client:
            client.sendall(b"CONNECT other.example.com:443 HTTP/1.1\r\n\r\n")
            client.recv(4096)
    return {}
