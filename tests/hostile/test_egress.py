"""connect_hosts: what is granted works for any client, and there is no other way out."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from runner import ConfigurationError, Sandbox
from runner.model.sandbox import parse_host
from runner.sandbox.egress import TUNNELS, is_public
from tests.hostile.egress_driver import PRIVATE, PUBLIC
from tests.waiting import wait_until

MODES = [
    pytest.param((user, profile), id=f"{user}-{profile}")
    for user in ("root", "user")
    for profile in ("default", "strict")
]
GRANTED = "HTTP/1.1 200 Connection established\r\n\r\n"
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a host a network with a public address")


class Driver:
    """A process that is the host, in its own network."""

    def __init__(self, user: str, profile: str) -> None:
        command = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.hostile.egress_driver", user, profile]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._hear() == "ready"

    def tell(self, what: str, **arguments: Any) -> Any:
        """Have it do something; what it says of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def call(self, name: str, **arguments: object) -> dict[str, Any]:
        """Have the handler do something."""
        query = "&".join(f"{key}={quote(str(value), safe='')}" for key, value in arguments.items())
        answer: dict[str, Any] = self.tell("call", target=f"/{name}?{query}")
        return answer

    def ask(self, head: str, rest: int = 0) -> str:
        """What the proxy says to this."""
        said = self.call("ask", head=quote(head.encode("latin-1")), rest=rest)
        assert "answer" in said, said
        answer: str = said["answer"]
        return answer

    def wait_logged(self, words: str, step: Callable[[], object]) -> None:
        """Take a step until these words are in the log: of what is refused not all is told."""

        def told() -> bool:
            step()
            return any(words in line for line in self.tell("log"))

        wait_until(told)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the host has died"
        return json.loads(line)


@pytest.fixture(scope="module", params=MODES)
def host(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The host of one mode."""
    host = Driver(*request.param)
    yield host
    host.close()


@pytest.fixture
def driver(host: Driver) -> Driver:
    """The same, with nothing seen yet."""
    host.tell("seen")
    return host


@as_root
def test_what_is_granted(driver: Driver) -> None:
    """S: clients that know HTTPS_PROXY get through, both ways, as large as it may be; each connection is logged."""
    assert driver.call("get", url="https://api.example.com/") == {"status": 200, "size": 12}
    assert driver.call("get", url="https://API.example.com/bytes/5000000")["size"] == 5_000_000
    assert driver.call("post", url="https://api.example.com/", size=5_000_000)["taken"] == 5_000_000
    assert driver.call("requests", url="https://api.example.com/") == {"status": 200, "text": "from outside"}
    assert driver.ask("CONNECT API.example.com.:443 HTTP/1.0\r\n\r\n").startswith(GRANTED)
    assert set(driver.tell("seen")["addresses"]) == {PUBLIC}
    wait_until(lambda: any(f"connected to api.example.com:443 ({PUBLIC})" in line for line in driver.tell("log")))
    told = driver.call("environment")
    assert told == {"HTTPS_PROXY": "http://127.0.0.1:3128", "https_proxy": "http://127.0.0.1:3128"}


@as_root
def test_names_that_are_not_granted(driver: Driver) -> None:
    """S: another name at the same address, another port, and what only looks like the name."""
    assert "403" in driver.call("get", url="https://other.example.com/")["error"]
    for target in (
        "other.example.com:443",
        "api.example.com:22",
        "api.example.com:0443",
        "api.example.com",
        "api.example.com:443@other.example.com:443",
        "other.example.com:443#api.example.com:443",
        "api.example.com.other.example.com:443",
        "xapi.example.com:443",
        "api.example.com..:443",
        "api.example.com:443:443",
        "api.example.com\x00.other.example.com:443",
        "[api.example.com]:443",
        "localhost:443",
        ":443",
    ):
        answer = driver.ask(f"CONNECT {target} HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n")
        assert answer.startswith(("HTTP/1.1 403", "HTTP/1.1 405")), (target, answer)
    assert driver.tell("seen")["addresses"] == []
    driver.wait_logged(
        "refused: other.example.com:443 is not among", lambda: driver.call("get", url="https://other.example.com/")
    )


@as_root
@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "0x5db8d822",
        "1572395042",
        "0135.0270.0330.042",
        "93.184.55330",
        f"[::ffff:{PUBLIC}]",
        "127.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "169.254.169.254",
    ],
)
def test_addresses_are_no_names(driver: Driver, address: str) -> None:
    """S: in none of their forms."""
    assert driver.ask(f"CONNECT {address}:443 HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 403")
    assert driver.tell("seen")["addresses"] == []


@as_root
@pytest.mark.parametrize("name", PRIVATE)
def test_names_of_private_addresses(driver: Driver, name: str) -> None:
    """S: a granted name that leads into the host's own networks (DNS rebinding) is refused, and says so."""
    assert "403" in driver.call("get", url=f"https://{name}/")["error"]
    assert driver.tell("seen")["addresses"] == []
    driver.wait_logged(f"{name} has private addresses only", lambda: driver.call("get", url=f"https://{name}/"))


@as_root
def test_the_host_itself_is_no_outside(driver: Driver) -> None:
    """S: a name of its own public address leads to what serves on this machine."""
    assert "403" in driver.call("get", url="https://own.example.com/")["error"]
    driver.wait_logged("own.example.com is this machine", lambda: driver.call("get", url="https://own.example.com/"))


@as_root
def test_a_flood_of_refusals_hides_no_connection(driver: Driver) -> None:
    """S: so many are logged a second, and the rest counted."""
    before = len(driver.tell("log"))
    driver.call("flood", count=500)
    driver.call("get", url="https://api.example.com/")
    wait_until(lambda: any("connected to api" in line for line in driver.tell("log")[before:]))
    refused = [line for line in driver.tell("log")[before:] if "refused: " in line]
    assert len(refused) <= 60


@as_root
def test_a_name_of_both_kinds(driver: Driver) -> None:
    """S: of a public and a private address only the public one is ever tried."""
    for _ in range(5):
        assert driver.call("get", url="https://both.example.com/")["status"] == 200
    assert set(driver.tell("seen")["addresses"]) == {PUBLIC}


@as_root
def test_past_the_proxy(driver: Driver) -> None:
    """S: no other address, no other port, no other kind of socket."""
    for host in (PUBLIC, "10.1.2.3", "169.254.169.254", "127.0.0.1", "8.8.8.8", "fd00::1", "::1"):
        for port in (443, 3128, 53):
            if (host, port) != ("127.0.0.1", 3128):
                assert "error" in driver.call("connect", host=host, port=port), (host, port)
    assert "made" not in driver.call("sockets").values()
    assert driver.tell("seen")["addresses"] == []


@as_root
def test_nonsense(driver: Driver) -> None:
    """S: what is no CONNECT is refused, what is endless is cut off, and the next one is served."""
    assert driver.ask("GET http://api.example.com/ HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 405")
    assert driver.ask("CONNECT api.example.com:443\r\n\r\n").startswith("HTTP/1.1 405")
    assert driver.ask("\r\n\r\n").startswith("HTTP/1.1 405")
    assert driver.ask("\x16\x03\x01 \x00\xff\r\n\r\n").startswith("HTTP/1.1 405")
    assert "200" not in driver.ask("CONNECT ", 3_000_000)
    assert driver.ask("CONNECT api.example.com:443 HTTP/1.1\r\nX: " + "y" * 9000 + "\r\n\r\n")[:12] in (
        "HTTP/1.1 431",
        "",
    )
    assert driver.call("get", url="https://api.example.com/")["status"] == 200


@as_root
def test_many_at_once(driver: Driver) -> None:
    """S: a worker has so many tunnels; one that holds them all holds up itself, as long as it holds them."""
    held = driver.call("hold", count=TUNNELS + 20, most=TUNNELS)
    assert held == {"granted": TUNNELS, "after": {"status": 200, "size": 12}}


@as_root
def test_a_worker_s_death_ends_its_tunnels(driver: Driver) -> None:
    """S, W11: nothing of them is left open outside."""
    assert "exited with code 3" in driver.call("hold_and_die")["failed"]
    wait_until(lambda: driver.tell("seen")["open"] == 0)
    assert driver.call("get", url="https://api.example.com/")["status"] == 200


@as_root
def test_the_proxy_s_death(driver: Driver) -> None:
    """S, D: its pool begins anew, with a new one; nobody goes on without."""
    pid = next(int(pid) for pid, title in driver.tell("children").items() if "blastdoor: egress" in title)
    driver.tell("kill", pid=pid)

    def works_again() -> bool:
        return driver.call("get", url="https://api.example.com/").get("status") == 200

    wait_until(lambda: str(pid) not in driver.tell("children"))
    wait_until(works_again)
    proxies = [title for title in driver.tell("children").values() if "blastdoor: egress" in title]
    assert len(proxies) == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::1", False),
        ("2001:0:a00:1::1", False),
        ("::7f00:1", False),
        ("::ffff:0:a9fe:a9fe", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("fec0::1", False),
        ("5f00::1", False),
        ("3fff::1", False),
        ("192.88.99.1", False),
        ("168.63.129.16", False),
        ("no address", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    """S: this machine's, private ones, and those that stand for one of these, are not."""
    assert is_public(address) is public


def test_every_private_range() -> None:
    """S: the first and the last address of each range that IANA has for special purposes."""
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.2.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
        "2001:db8::/32",
    ):
        found = ipaddress.ip_network(network)
        assert not is_public(str(found[0])), network
        assert not is_public(str(found[-1])), network


@pytest.mark.parametrize(
    "hosts",
    [
        ["api.example.com"],
        ["1.2.3.4:443"],
        ["0x7f.1:443"],
        ["[::1]:443"],
        ["https://api.example.com:443"],
        ["*.example.com:443"],
        ["api.example.com:0"],
        ["api.example.com:65536"],
        ["a b:443"],
        ["münchen.example:443"],
        [443],
        "api.example.com:443",
    ],
)
def test_hosts_that_make_no_sense(hosts: Any) -> None:
    """S, G11: they are refused where they are given."""
    with pytest.raises(ConfigurationError, match="connect_hosts"):
        Sandbox.default(connect_hosts=hosts)


def test_hosts_in_one_form() -> None:
    """S: names are compared in small letters, without the root's dot; ports as ports."""
    assert Sandbox.strict(connect_hosts=["API.Example.com.:443"]).connect_hosts == ("api.example.com:443",)
    assert parse_host("a_b-c.d:1") == ("a_b-c.d", 1)
    with pytest.raises(ConfigurationError, match="leave it out"):
        Sandbox.default(connect_hosts=["a.example:1"], connect=[443])
