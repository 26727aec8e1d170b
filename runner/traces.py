"""The jobs of a pool as OpenTelemetry spans: one for each, with its wait, its worker's time and its stream below it.

    trace_jobs(pool)

A job's span lies below the span that is current where the request is made. Needs opentelemetry-api; without a tracer
provider the spans are none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry import trace

from .events import Event, JobAnswered, JobEnded, JobRefused, JobStarted

if TYPE_CHECKING:
    from .protocols import AnyPool


def trace_jobs(pool: AnyPool) -> Callable[[], None]:
    """Have each job of a pool be a span; gives what ends that."""
    return pool.subscribe(_Spans().take)


class _Spans:
    """The spans of the jobs under way: `blastdoor.job`, and below it `queue`, `worker` and `stream`."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("blastdoor")
        self._jobs: dict[str, trace.Span] = {}
        self._steps: dict[str, trace.Span] = {}

    def take(self, event: Event) -> None:
        now = time.time_ns()
        if isinstance(event, JobStarted):
            job = self._jobs[event.job_id] = self._begin(event, now)
            if event.worker is not None:
                job.set_attribute("blastdoor.worker.pid", event.worker)
            self._steps[event.job_id] = self._step("blastdoor.worker", job, now)
        elif isinstance(event, JobAnswered):
            if (step := self._steps.get(event.job_id)) is not None:
                step.end(now)
                self._steps[event.job_id] = self._step("blastdoor.stream", self._jobs[event.job_id], now)
        elif isinstance(event, JobEnded):
            span = self._jobs.pop(event.job_id, None)
            if span is None:
                return  # it began before anybody traced
            self._steps.pop(event.job_id).end(now)
            span.set_attribute("blastdoor.outcome", event.outcome)
            if event.status is not None:
                span.set_attribute("http.response.status_code", event.status)
            if event.outcome not in ("ok", "left"):
                span.set_status(trace.StatusCode.ERROR, event.detail)
            span.end(now)
        elif isinstance(event, JobRefused):
            span = self._begin(event, now)
            span.set_status(trace.StatusCode.ERROR, event.detail)
            span.end(now)

    def _begin(self, event: JobStarted | JobRefused, now: int) -> trace.Span:
        asked = now - int(event.waited * 1e9)
        attributes = {
            "blastdoor.job_id": event.job_id,
            "blastdoor.provider": event.provider,
            "blastdoor.source": event.source,
        }
        job = self._tracer.start_span("blastdoor.job", start_time=asked, attributes=attributes)
        self._step("blastdoor.queue", job, asked).end(now)
        return job

    def _step(self, name: str, job: trace.Span, began: int) -> trace.Span:
        return self._tracer.start_span(name, trace.set_span_in_context(job), start_time=began)
