"""HTTPS by the server itself: real handshakes, over both event loops."""

from __future__ import annotations

import json
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
import uvloop

from tests.serving import Process, Served, receive_all, receive_until
from tests.test_cli import blastdoor
from tests.waiting import wait_until
from transport.front import server


class Certificates:
    """An authority, and the files that a server is given."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.trusted = str(directory / "authority.pem")
        self.authority.cert_pem.write_to_path(self.trusted)
        self.cert, self.key = str(directory / "cert.pem"), str(directory / "key.pem")
        self.renew()

    def renew(self) -> None:
        """A new key and a new certificate in the files' places."""
        issued = self.authority.issue_cert("127.0.0.1", "localhost")
        Path(self.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.key)

    def client(self) -> ssl.SSLContext:
        """What trusts the authority."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def session(self) -> requests.Session:
        """The same for requests, whatever the environment says."""
        session = requests.Session()
        session.trust_env = False
        session.verify = self.trusted
        return session

    def connect(self, served: Served) -> ssl.SSLSocket:
        """A client's connection, after its handshake."""
        return self.client().wrap_socket(served.connect(), server_hostname="localhost")


@pytest.fixture(scope="module", autouse=True)
def first_uvloop() -> None:
    """libuv has a pipe for signals from its first loop on, as long as the process lasts."""
    uvloop.new_event_loop().close()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture(params=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Served]:
    with serve(certificates, loop=request.param) as served:
        yield served


def serve(certificates: Certificates, **settings: Any) -> Served:
    return Served(drain=0, admin="none", tls_cert=certificates.cert, tls_key=certificates.key, **settings)


def test_requests(served: Served, certificates: Certificates) -> None:
    """G10: https as any client speaks it; the app is told, and what a client claims of its scheme is as ever."""
    with certificates.session() as session:
        for _ in range(3):  # on one connection
            seen = session.get(f"{served.url}/echo", timeout=20).json()
            assert seen["scheme"] == "https"
        told = session.get(f"{served.url}/echo", headers={"x-forwarded-proto": "http"}, timeout=20).json()
        assert told["scheme"] == "http"  # 127.0.0.1 is a trusted proxy
        body = bytes(8 << 20)
        assert session.post(f"{served.url}/count", data=body, timeout=60).text == str(len(body))
        assert len(session.get(f"{served.url}/big?size=20000000", timeout=60).content) == 20_000_000


def test_tokens_and_faults(served: Served, certificates: Certificates) -> None:
    """G10, T3: tokens come as they are written; a body whose worker dies has no clean end."""
    with certificates.session() as session:
        with session.get(f"{served.url}/stream?count=5&pause=0.1", stream=True, timeout=20) as response:
            lags = [time.monotonic() - float(line.split()[2]) for line in response.iter_lines() if line]
        assert len(lags) == 5
        assert sorted(lags)[2] < 0.09
        died = session.get(f"{served.url}/die", timeout=20)
        assert (died.status_code, died.json()["signal"]) == (500, "SIGSEGV")
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            _ = session.get(f"{served.url}/die?late=1", timeout=20).content


def test_a_client_that_goes(served: Served, certificates: Certificates) -> None:
    """G10, G7: its job is ended, before the head and in the middle of the body."""
    for target in ("never_read", "endless"):
        with certificates.connect(served) as client:
            client.sendall(f"GET /{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(lambda: served.pool.stats().running == 1)
        wait_until(lambda: served.pool.stats().running == 0)


def test_a_client_that_takes_nothing(certificates: Certificates) -> None:
    """G10, G7: it is dropped after send_timeout, and its job ended."""
    with serve(certificates, send_timeout=0.2) as served, certificates.connect(served) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: served.pool.stats().running == 1)
        wait_until(lambda: served.pool.stats().running == 0)


def test_pipelined_requests_over_tls(served: Served, certificates: Certificates) -> None:
    """G10: they are answered one after the other, and the last one ends the connection."""
    with certificates.connect(served) as client:
        request = b"GET /hello HTTP/1.1\r\nHost: x\r\n"
        client.sendall((request + b"\r\n") * 20 + request + b"Connection: close\r\n\r\n")
        assert receive_all(client).count(b"hello") == 21


def test_what_is_no_tls(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """G10: plain HTTP is refused, and stands in the access log."""
    caplog.set_level(logging.INFO, "blastdoor.access")
    with served.connect() as client:
        client.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"hello" not in receive_all(client)
    wait_until(lambda: any("no TLS" in record.getMessage() for record in caplog.records))


def test_handshakes_are_bounded(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10, G8: who says nothing is dropped in time, and there are no more of them than connections."""
    monkeypatch.setattr(server, "SURPLUS", 4)
    with serve(certificates, connections=2) as served:
        silent = [served.connect() for _ in range(12)]
        for client in silent:
            client.setblocking(False)
        try:
            wait_until(lambda: sum(_is_closed(client) for client in silent) >= 5)
            assert sum(_is_closed(client) for client in silent) == 5
        finally:
            for client in silent:
                client.close()
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.1)
    with serve(certificates) as served, served.connect() as client:
        assert client.recv(1) == b""


def test_a_silent_client_holds_no_end_up(certificates: Certificates) -> None:
    """G10, G9: a drain does not wait for a handshake that may never come."""
    began = time.monotonic()
    with serve(certificates) as served, served.connect():
        pass
    assert time.monotonic() - began < server.HANDSHAKE_SECONDS / 2


def test_a_drain_over_tls(certificates: Certificates, tmp_path: Path) -> None:
    """G10, G9: a request under way is answered whole."""
    go = tmp_path / "go"
    with serve(certificates) as served, certificates.connect(served) as client:
        served.service._settings.drain = 20
        client.sendall(f"GET /head_then_wait?go={go} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        receive_until(client, b"202")
        served.stop()
        wait_until(lambda: served.service.status.draining)
        go.touch()
        assert b"done" in receive_all(client)


def test_a_certificate_is_renewed(served: Served, certificates: Certificates) -> None:
    """G10, G9: SIGHUP reads it again, for those that connect from then on; one that makes no sense changes nothing."""
    with certificates.connect(served) as old:
        first = old.getpeercert()
        certificates.renew()
        assert served.reload()
        with certificates.connect(served) as new:
            second = new.getpeercert()
        assert first is not None
        assert second is not None
        assert first["serialNumber"] != second["serialNumber"]
        old.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        receive_until(old, b"hello")
    Path(certificates.key).write_text("none")
    assert not served.reload()
    assert "certificate" in served.service.status.reload_error
    with certificates.connect(served) as still:
        assert still.getpeercert() == second
    certificates.renew()
    assert served.reload()
    assert not served.service.status.reload_error


def test_many_clients(served: Served, certificates: Certificates) -> None:
    """G10: clients that come and go at once, each with its own answer."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                body = f"{number}.{turn}"
                with certificates.session() as session:
                    answer = session.post(f"{served.url}/echo", data=body, timeout=30)
                assert json.loads(answer.content)["body"] == body
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_slow_client_gets_all_of_it(
    served: Served, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10, G7: one that takes little at a time, over longer than a handshake may take, is not cut off at the end."""
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.5)
    served.service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as plain:
        plain.settimeout(20)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(served.address)
        with certificates.client().wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"GET /big?size=100000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            received = receive_until(client, b"\r\n\r\n")
            while data := client.recv(2048):
                received += data
                time.sleep(0.03)
    assert received.endswith(b"\r\n0\r\n\r\n")


def test_an_idle_client_holds_no_end_up(served: Served, certificates: Certificates) -> None:
    """G10, G9: a client that does not say goodbye has a second for it."""
    with certificates.connect(served) as client:
        client.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        receive_until(client, b"hello")
        began = time.monotonic()
        served.service._settings.drain = 20
        served.stop()
        served._thread.join(30)
        assert time.monotonic() - began < 5


def test_a_certificate_that_can_not_be_read_changes_no_front(certificates: Certificates, tmp_path: Path) -> None:
    """P4, G10: a reload that fails for it fails as a whole: no front has the new app."""
    (tmp_path / "shop.py").write_text("def app(request, response):\n    return b'one'\n")
    options = f"--tls-cert={certificates.cert}", f"--tls-key={certificates.key}", "--fronts=2", "--workers=2"
    with Process("shop:app", *options, "--port=0", "--admin=none", cwd=tmp_path) as served, certificates.session() as s:
        (tmp_path / "shop.py").write_text("def app(request, response):\n    return b'two'\n")
        Path(certificates.key).write_text("none")
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("the settings can't be read again")
        answers = set()
        for _ in range(20):
            answers.add(s.get(served.url, headers={"connection": "close"}, timeout=20).text)
        assert answers == {"one"}
        certificates.renew()
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: s.get(served.url, headers={"connection": "close"}, timeout=20).text == "two", 30)


@pytest.mark.parametrize("fronts", [1, 2])
def test_bad_files(tmp_path: Path, certificates: Certificates, fronts: int) -> None:
    """G11: one line that says what is wrong, and exit code 2."""
    other = tmp_path / "other"
    other.mkdir()
    locked = tmp_path / "locked.pem"
    locked.write_text(LOCKED)
    common = ("serve", "tests.handlers:app", "--port=0", "--admin=none", f"--fronts={fronts}", "--workers=2")
    for options, words in (
        ([f"--tls-key={certificates.key}"], "tls_key goes with tls_cert"),
        (["--tls-cert=nowhere"], "No such file"),
        ([f"--tls-cert={certificates.cert}"], "no certificate and key in PEM form"),
        ([f"--tls-cert={certificates.cert}", f"--tls-key={Certificates(other).key}"], "is not the certificate's"),
        ([f"--tls-cert={certificates.cert}", f"--tls-key={locked}"], "has a password"),
    ):
        done = blastdoor(*common, *options)
        assert (done.returncode, words in done.stderr.decode()) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def _is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


LOCKED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIIC3TBXBgkqhkiG9w0BBQ0wSjApBgkqhkiG9w0BBQwwHAQIsULKgg4u2DQCAggA
MAwGCCqGSIb3DQIJBQAwHQYJYIZIAWUDBAEqBBA4hYJofkSngP2mLDv0ahYIBIIC
gMly7e60FGOVxhfCkolOsvq851fqdjwn7LtHqe56gJYSz76c4/ji4RWQat02aO5d
iLkwi3ZHarnOVsm++dWlUUtUnAvRbcctCdxTyaavrSYDLbBa+GEiqMFvdhaltcH3
29YpjcpA+JXEED3jBLcpyvZcAhILX3jkAH/K+HjOpodnfPu7BZ019qXEOSahGXC/
mthsgbZDCtuCJFkZOYO+Igc83i76zoGb+5OeoE6M0i0WP3Uz0+dWr9iy0pl+bdLj
IMtT8VqrXJIb8wA9M5Dy0rsEfGiKIk+q+QlI3BeFip3p7YCXcGhfIduwNhSaSLvi
LeMhPL5hwSKa6GhOKobH4/ZjSOvfcKQvZt8kvdIWrIiBFc+z/8S8skfiMo7Lx+Z2
DLjq8MPRJEQKTtJ5D4BtyHmfERILDYMHqsxTm2TbxatrenjKirJxNUoyU2sgRTAH
RFqVY2LJ+lmppi5Zv3fUpl4fYJK6OADTMUHf/ygnn1DkoePc3IjLiOgsIR/gXjXZ
NXhphG9kA7qWlq3/su9hbjfTNNY/jRBdYxfuCU8PHgkZU38hNatWEu5UbQFvO1aY
CXjsJfGd+ILaZFYtXUT8JQSERfk3Hg50GuraeHoMtOFzs9eyu3JOKlz2SWmKnbse
Y9DrO3AjOJhN9Zs5Kj1EdVXkcqqzebVP6vR+S62lW6NohE6NryrsGsxA9zrSk4/d
zv9ksmM5VzYotSeKAkzA2eKrN4VBlNtrIIHi9hSPQl8qVgkZOLEp5qYRc9zwXfVa
IybogaYrnujCz7IwNW6uN76bzyVAI5GBNXpbqdqZeyAGKmj7BhiKOMFFOpEFuPJ7
AMntlCfvTRRD6iKtUzzTTY4=
-----END ENCRYPTED PRIVATE KEY-----
"""
