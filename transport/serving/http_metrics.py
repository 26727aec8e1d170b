"""The gateway's requests as Prometheus metrics, by the names of OpenTelemetry's conventions for HTTP servers."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runner.metrics import SECONDS

if TYPE_CHECKING:
    from transport.gateway.finished import RequestFinished
    from transport.gateway.router import Router

METHODS: Final = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
"""Others are counted as `_OTHER`: a client must not make up labels."""


_STATUSES: Final = frozenset(HTTPStatus)
"""Others are counted by their class: a handler must not make up labels either."""


def _class_of(status: int | None) -> str | None:
    return None if status is None else f"{status // 100}xx"


class RequestMetrics:
    """Counts what a gateway has answered."""

    def __init__(self, gateway: Router, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "http_server_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("http_request_method", "http_response_status_code", "http_route"),
            buckets=SECONDS,
            registry=registry,
        )
        self._cut = Counter(
            "blastdoor_answers_cut_off_total",
            "Answers that were not sent whole: broken off, or left by their client.",
            ("http_route",),
            registry=registry,
        )
        self._sent = Counter(
            "blastdoor_answer_body_bytes_total", "Bytes of answers' bodies.", ("http_route",), registry=registry
        )
        # Looking a child up by its labels costs as much as counting does.
        self._children: dict[tuple[str, int | str | None, str], tuple[Histogram, Counter]] = {}
        active = Gauge("http_server_active_requests", "Requests under way.", registry=registry)
        active.set_function(lambda: gateway.active)
        gateway.subscribe(self._count)

    def _count(self, answered: RequestFinished) -> None:
        method = answered.method if answered.method in METHODS else "_OTHER"
        key = method, answered.status if answered.status in _STATUSES else _class_of(answered.status), answered.mount
        children = self._children.get(key)
        if children is None:
            status = "" if key[1] is None else str(key[1])
            duration = self._durations.labels(method, status, answered.mount)
            children = self._children[key] = duration, self._sent.labels(answered.mount)
        children[0].observe(answered.seconds)
        children[1].inc(answered.sent)
        if not answered.whole:
            self._cut.labels(answered.mount).inc()
