"""transport.front.forwarded: who a request comes from, where proxies stand in front."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from runner import ConfigurationError
from tests.serving import Served, receive_all
from transport.front.forwarded import Forwarded, parse_ip


def seen(
    client: str | None, *hops: str, proto: str = "", trusted: tuple[str, ...] = ("127.0.0.1", "::1"), unix: bool = False
) -> tuple[str | None, str]:
    """Client and scheme as the app is told."""
    headers = [("x-forwarded-for", hop) for hop in hops]
    headers += [("x-forwarded-proto", proto)] if proto else []
    forwarded = Forwarded(trusted)
    found, behind_proxy = forwarded.peer(None if client is None else (client, 5), unix=unix)
    scheme = "http"
    if behind_proxy:
        found, scheme = forwarded.resolve(found, headers)
    return found and found[0], scheme


@pytest.mark.parametrize(
    ("client", "hops", "shown"),
    [
        ("127.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("::ffff:127.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("::1", ["2001:db8::1"], "2001:db8::1"),
        ("127.0.0.1", ["6.6.6.6, 9.9.9.9"], "9.9.9.9"),
        ("127.0.0.1", ["6.6.6.6", "9.9.9.9"], "9.9.9.9"),
        ("127.0.0.1", ["9.9.9.9, 127.0.0.1"], "9.9.9.9"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("127.0.0.1", ["[2001:db8::1]:80"], "2001:db8::1"),
        ("127.0.0.1", ["9.9.9.9:1234"], "9.9.9.9"),
        ("127.0.0.1", ["fe80::1%<script>"], "127.0.0.1"),
        ("127.0.0.1", ["root\x1b[2J"], "127.0.0.1"),
        ("127.0.0.1", ["9.9.9.9, unknown"], "127.0.0.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("8.8.8.8", ["9.9.9.9"], "8.8.8.8"),
        ("::ffff:8.8.8.8", ["9.9.9.9"], "8.8.8.8"),
    ],
)
def test_hops(client: str, hops: list[str], shown: str) -> None:
    """G4: the last address that no trusted proxy has, from a trusted proxy alone, and nothing that is no address."""
    assert seen(client, *hops)[0] == shown


def test_a_unix_socket_is_one_hop() -> None:
    """G4: what the peer has seen is believed, what it was told is not."""
    assert seen(None, "6.6.6.6, 127.0.0.1", unix=True)[0] == "127.0.0.1"
    assert seen(None, "6.6.6.6, 9.9.9.9", unix=True)[0] == "9.9.9.9"
    assert seen(None, "not an address", unix=True)[0] is None


@pytest.mark.parametrize(
    ("proto", "shown"), [("https", "https"), ("HTTPS", "https"), ("http, https", "https"), ("x", "http")]
)
def test_schemes(proto: str, shown: str) -> None:
    """G4: the nearest proxy's word, and one of the two that there are."""
    assert seen("127.0.0.1", proto=proto)[1] == shown
    assert seen("8.8.8.8", proto=proto)[1] == "http"


def test_networks_and_all() -> None:
    """G10: networks count, `*` is all, and what is neither is refused at the start."""
    assert seen("10.1.2.3", "9.9.9.9", trusted=("10.0.0.0/8",))[0] == "9.9.9.9"
    assert seen("8.8.8.8", "6.6.6.6, 9.9.9.9", trusted=("*",))[0] == "9.9.9.9"
    with pytest.raises(ConfigurationError, match="nohost"):
        Forwarded(["nohost"])
    assert parse_ip("1.2.3.4.5") is None


def test_forged_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """G4: over a unix socket a client chooses neither its address nor what the access log says."""
    caplog.set_level(logging.INFO, "blastdoor.access")
    path = tmp_path / "socket"
    with Served(uds=str(path), drain=0, admin="none"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(
            b'GET /echo?a="b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
            b'X-Forwarded-For: 6.6.6.6 "GET /admin" 200\x9b2J, 9.9.9.9\r\n\r\n'
        )
        answer = receive_all(client)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "blastdoor.access"]
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert line.startswith('9.9.9.9 "GET ')
    assert "6.6.6.6" not in line
    assert "\x9b" not in line
    assert line.count('"') - line.count('\\"') == 2
