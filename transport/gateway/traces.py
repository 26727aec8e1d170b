"""Requests at the gateway as OpenTelemetry spans, where a tracer provider is set; else `traceparent` passes unchanged.

Names follow the semantic conventions for HTTP servers. OpenTelemetry is never imported from here unless the process
has done so: without it nobody can have set a provider.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.wire.messages import Header, JobContext


class Span:
    """A request's span, of kind SERVER, below the one that the client tells of."""

    def __init__(self, method: str, path: str, headers: list[Header], mount: str, context: JobContext) -> None:
        from opentelemetry import propagate, trace

        self._trace: Any = trace
        self._propagate: Any = propagate
        self._span = trace.get_tracer("blastdoor").start_span(
            f"{method} {mount}",
            context=propagate.extract(dict(headers)),
            kind=trace.SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "http.route": mount,
                "url.path": path,
                "blastdoor.provider": context.provider,
                "blastdoor.source": context.source,
            },
        )

    def active(self) -> AbstractContextManager[object]:
        """In this block it is the current span: those of the job lie below it."""
        block: AbstractContextManager[object] = self._trace.use_span(self._span, record_exception=False)
        return block

    def pass_on(self, headers: list[Header]) -> list[Header]:
        """The headers with this span as the parent of what the handler does."""
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier, context=self._trace.set_span_in_context(self._span))
        return [header for header in headers if header[0].lower() not in carrier] + list(carrier.items())

    def end(self, status: int | None, job_id: str) -> None:
        """The request is over."""
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if job_id:
            self._span.set_attribute("blastdoor.job_id", job_id)
        if status is None or status >= 500:
            self._span.set_status(self._trace.StatusCode.ERROR)
        self._span.end()


def span_of(method: str, path: str, headers: list[Header], mount: str, context: JobContext) -> Span | None:
    """The span of a request that begins now; None where nobody traces."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return Span(method, path, headers, mount, context)
