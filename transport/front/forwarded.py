"""Who a request comes from, where a proxy stands in front: `X-Forwarded-For` and `-Proto`, believed for one hop only.

A proxy appends the address that it was asked from. So the last entry that no trusted proxy has is what the nearest
trusted proxy has seen; all before it is the client's word. Only IP addresses are taken: it goes into logs and to the
app as the client's address. On a unix socket the peer, who was let in by its directory, is the one trusted hop.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from runner.errors import ConfigurationError
from runner.wire.messages import Header

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_ip(text: str) -> Address | None:
    """An IP address, with a port or in brackets perhaps; None for anything else. One that is v4-mapped is v4."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    if "%" in text:
        return None  # a scope (RFC 4007) may be any text, and says nothing beyond its own host
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Forwarded:
    """Tells who the clients are whose requests proxies pass on. ConfigurationError for no address.

    `trusted` are the addresses of the proxies; on a unix socket the peer is.
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        self._all = False
        self._networks: list[Network] = []
        for entry in trusted:
            try:
                if entry == "*":
                    self._all = True
                else:
                    self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError as error:
                raise ConfigurationError(
                    f"trusted_proxies are IP addresses, networks, or '*', not {entry!r}: {error}"
                ) from None

    def trusts(self, address: Address | None) -> bool:
        """Whether the proxy at this address is believed."""
        if self._all:
            return True
        return address is not None and any(address in network for network in self._networks)

    def peer(self, peer: tuple[str, int] | None, *, unix: bool) -> tuple[tuple[str, int] | None, bool]:
        """The other end of a connection as it is shown, None on a unix socket; and whether it is a trusted proxy."""
        if unix:
            return None, True
        address = None
        if peer and (address := parse_ip(peer[0])) is not None:
            peer = str(address), peer[1]
        return peer, self.trusts(address)

    def resolve(
        self, client: tuple[str, int] | None, headers: Iterable[Header], scheme: str = "http"
    ) -> tuple[tuple[str, int] | None, str]:
        """The client's address and the scheme, as these headers of a trusted proxy tell.

        `client` is the proxy's address, None on a unix socket, and `scheme` what it has come by. Names of headers are
        in small letters.
        """
        hops: list[str] = []
        for name, value in headers:
            if name == "x-forwarded-for":
                hops += value.split(",")
            elif name == "x-forwarded-proto":
                told = value.rpartition(",")[2].strip().lower()
                scheme = told if told in ("http", "https") else "http"
        if hops and (found := self._client(hops, unix=client is None)) is not None:
            client = str(found), 0
        return client, scheme

    def _client(self, hops: list[str], *, unix: bool) -> Address | None:
        """The nearest address that is no trusted proxy's; where all are, the farthest. None where it is no address."""
        address = None
        for hop in reversed(hops):
            address = parse_ip(hop)
            if address is None or unix or self._all or not self.trusts(address):
                break
        return address
