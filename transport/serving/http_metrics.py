"""The gateway's requests as Prometheus metrics, by the names of OpenTelemetry's conventions for HTTP servers."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge

from runner.events import Batch
from runner.metric_families import Counters, Histograms

if TYPE_CHECKING:
    from transport.gateway.finished import RequestTime
    from transport.gateway.router import Router

METHODS: Final = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
"""Others are counted as `_OTHER`: a client must not make up labels."""


_STATUSES: Final = {status.value: str(status.value) for status in HTTPStatus}
"""Others are counted by their class: a handler must not make up labels either."""


class RequestMetrics:
    """Counts what a gateway has answered."""

    def __init__(self, gateway: Router, registry: CollectorRegistry) -> None:
        batch: Batch[RequestTime] = Batch(self._count)
        self._durations = Histograms(
            registry,
            "http_server_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("http_request_method", "http_response_status_code", "http_route"),
            batch.flush,
        )
        self._cut = Counters(
            registry,
            "blastdoor_answers_cut_off_total",
            "Answers that were not sent whole: broken off, or left by their client.",
            ("http_route",),
            batch.flush,
        )
        self._sent = Counters(
            registry, "blastdoor_answer_body_bytes_total", "Bytes of answers' bodies.", ("http_route",), batch.flush
        )
        active = Gauge("http_server_active_requests", "Requests under way.", registry=registry)
        active.set_function(lambda: gateway.active)
        gateway.note_times(batch)

    def _count(self, request: RequestTime) -> None:
        mount, method, status, sent, whole, seconds, _ = request
        labels = (
            method if method in METHODS else "_OTHER",
            "" if status is None else _STATUSES.get(status) or f"{status // 100}xx",
            mount,
        )
        self._durations.of(labels).observe(seconds)
        self._sent.add((mount,), sent)
        if not whole:
            self._cut.add((mount,))
