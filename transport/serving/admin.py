"""What the operator asks: the page of status, its data, health, readiness, metrics. Served on an address of its own."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.requests import Request

    from transport.serving.status import Status

_FRESH: Final = {"cache-control": "no-store"}


def make_admin(status: Status, registry: CollectorRegistry, host: str) -> Starlette:
    """The app. On a loopback address only requests that name it are answered: no web page may ask by another name."""
    page = files("transport.serving").joinpath("status.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _policy(page), "x-content-type-options": "nosniff", **_FRESH}

    async def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    async def tell_status(request: Request) -> Response:
        told = await anyio.to_thread.run_sync(status.tell)  # it looks into /proc
        return Response(msgspec.json.encode(told), media_type="application/json", headers=_FRESH)

    async def tell_health(request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_FRESH)

    async def tell_readiness(request: Request) -> Response:
        ready = status.ready
        words = "ready\n" if ready else "draining\n" if status.draining else "no worker is ready\n"
        return PlainTextResponse(words, 200 if ready else 503, headers=_FRESH)

    async def tell_metrics(request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        content = await anyio.to_thread.run_sync(encode, registry)
        return Response(content, headers={"content-type": media_type, **_FRESH})

    async def go_to_page(request: Request) -> Response:
        return RedirectResponse("/-/status")

    names = {"/": go_to_page, "/-/status": show_page, "/-/status.json": tell_status, "/-/healthz": tell_health}
    names |= {"/-/readyz": tell_readiness, "/-/metrics": tell_metrics}
    loopback = ipaddress.ip_address(host).is_loopback
    hosts = ["localhost", "127.0.0.1", "[::1]", host] if loopback else ["*"]
    return Starlette(
        routes=[Route(path, endpoint) for path, endpoint in names.items()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )


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
