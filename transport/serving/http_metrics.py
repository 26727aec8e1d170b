"""The gateway's requests as Prometheus metrics, by the names of OpenTelemetry's conventions for HTTP servers."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge

from runner.metric_families import Counters, Histograms

if TYPE_CHECKING:
    from transport.gateway.finished import RequestFinished
    from transport.gateway.router import Router

METHODS: Final = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
"""Others are counted as `_OTHER`: a client must not make up labels."""


_STATUSES: Final = {status.value: str(status.value) for status in HTTPStatus}
"""Others are counted by their class: a handler must not make up labels either."""


class RequestMetrics:
    """Counts what a gateway has answered."""

    def __init__(self, gateway: Router, registry: CollectorRegistry) -> None:
        self._durations = Histograms(
            registry,
            "http_server_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("http_request_method", "http_response_status_code", "http_route"),
        )
        self._cut = Counters(
            registry,
            "blastdoor_answers_cut_off_total",
            "Answers that were not sent whole: broken off, or left by their client.",
            ("http_route",),
        )
        self._sent = Counters(
            registry, "blastdoor_answer_body_bytes_total", "Bytes of answers' bodies.", ("http_route",)
        )
        active = Gauge("http_server_active_requests", "Requests under way.", registry=registry)
        active.set_function(lambda: gateway.active)
        gateway.subscribe(self._count)

    def _count(self, answered: RequestFinished) -> None:
        status = answered.status
        labels = (
            answered.method if answered.method in METHODS else "_OTHER",
            "" if status is None else _STATUSES.get(status) or f"{status // 100}xx",
            answered.mount,
        )
        self._durations.of(labels).observe(answered.seconds)
        self._sent.add((answered.mount,), answered.sent)
        if not answered.whole:
            self._cut.add((answered.mount,))
