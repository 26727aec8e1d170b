"""What the operator asks: the page of status, its data, health, readiness, metrics. Served on an address of its own."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import ipaddress
import logging
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from prometheus_client.exposition import choose_encoder

from runner.wire.messages import Header, ResponseHead
from transport.front.exchange import ConnectionProtocol, Exchange
from transport.front.server import MakeExchange
from transport.problem_details import refusal

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from transport.gateway.router import Answer, Asked

logger = logging.getLogger("blastdoor")

ADMIN_CONNECTIONS: Final = 32
ADMIN_PATIENCE: Final = 10.0
"""Connections to the admin address at once, and the seconds that one of them may take nothing of its answer."""

_FRESH: Final[Header] = ("cache-control", "no-store")

Page = Callable[["Asked"], "Answer"]
"""Answers a GET; in a thread, where it may take its time."""


class Tells(Protocol):
    """Whoever knows the state of the service."""

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    def tell(self) -> dict[str, Any]:
        """What the page of status shows; called in a thread of its own."""


def make_admin(status: Tells, registry: CollectorRegistry, host: str) -> MakeExchange:
    """What answers. On a loopback address only requests that name it are: no web page may ask by another name."""
    page = files("transport.serving").joinpath("status.html").read_text(encoding="utf-8")
    headers: list[Header] = [("content-security-policy", _policy(page)), ("x-content-type-options", "nosniff"), _FRESH]

    def show_page(asked: Asked) -> Answer:
        return _answer(200, "text/html; charset=utf-8", page.encode(), headers)

    def tell_status(asked: Asked) -> Answer:
        return _answer(200, "application/json", msgspec.json.encode(status.tell()))

    def tell_health(asked: Asked) -> Answer:
        return _answer(200, "text/plain; charset=utf-8", b"ok\n")

    def tell_readiness(asked: Asked) -> Answer:
        ready = status.ready
        words = b"ready\n" if ready else b"draining\n" if status.draining else b"no worker is ready\n"
        return _answer(200 if ready else 503, "text/plain; charset=utf-8", words)

    def tell_metrics(asked: Asked) -> Answer:
        encode, media_type = choose_encoder(asked.header("accept"))
        return _answer(200, media_type, encode(registry))

    def go_to_page(asked: Asked) -> Answer:
        return ResponseHead(307, [("location", "/-/status"), ("content-length", "0")]), b""

    pages: dict[str, tuple[Page, bool]] = {
        "/": (go_to_page, False),
        "/-/status": (show_page, False),
        "/-/status.json": (tell_status, True),  # it looks into /proc
        "/-/healthz": (tell_health, False),
        "/-/readyz": (tell_readiness, False),
        "/-/metrics": (tell_metrics, True),
    }
    loopback = ipaddress.ip_address(host).is_loopback
    hosts = frozenset(("localhost", "127.0.0.1", "[::1]", host)) if loopback else None
    return functools.partial(_AdminExchange, pages, hosts)


class _AdminExchange(Exchange):
    """Answers from one of the pages."""

    backlog = 0

    def __init__(
        self,
        pages: Mapping[str, tuple[Page, bool]],
        hosts: frozenset[str] | None,
        connection: ConnectionProtocol,
        asked: Asked,
    ) -> None:
        super().__init__(connection, asked)
        self._pages = pages
        self._hosts = hosts

    def begin(self) -> None:
        """Find the page, and have it made."""
        asked = self.asked
        if self._hosts is not None and _host_of(asked.header("host")) not in self._hosts:
            self._give(*_answer(400, "text/plain; charset=utf-8", b"Invalid host header"))
            return
        found = self._pages.get(asked.path)
        if found is None:
            self._give(*refusal(404, {"detail": "there is no such page"}))
        elif asked.method not in ("GET", "HEAD"):
            self._give(*refusal(405, {"detail": "pages are read"}, [("allow", "GET, HEAD")]))
        else:
            page, slow = found
            if slow:
                made = self.connection.loop.run_in_executor(None, page, asked)
                made.add_done_callback(self._on_made)
            else:
                self._give(*page(asked))

    def take_body(self, data: bytes) -> None:
        """It is for nobody."""

    def take_body_end(self) -> None:
        """It is for nobody."""

    def abandon(self) -> None:
        """The client has gone."""
        self.end()

    def _on_made(self, made: asyncio.Future[Answer]) -> None:
        if self.over:
            return
        error = made.exception()
        if error is not None:
            logger.error("a page of the admin address failed", exc_info=error)
            self._give(*refusal(500, {"detail": "the page can't be made: the log says why"}))
        else:
            self._give(*made.result())

    def _give(self, head: ResponseHead, body: bytes) -> None:
        self.answer(head, b"" if self.asked.method == "HEAD" else body, ended=True)


def _answer(status: int, media_type: str, body: bytes, headers: list[Header] | None = None) -> Answer:
    own = [_FRESH] if headers is None else headers
    return ResponseHead(status, [("content-type", media_type), ("content-length", str(len(body))), *own]), body


def _host_of(header: str) -> str:
    """The host without its port (RFC 9110, 7.2)."""
    return header.partition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]


def _policy(page: str) -> str:
    """Nothing runs in the page but its own script, by its hash: what handlers have printed is shown there."""
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
