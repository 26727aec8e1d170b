"""OpenTelemetry: spans of requests and of jobs, and `traceparent` on its way through."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from runner import LeaseTimeout, Pool, Request, WorkerDied
from runner.traces import trace_jobs
from tests.serving import Served
from tests.waiting import wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is traced in this test; the process may set a provider only once, so that is put back."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def hexadecimal(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def test_a_request_s_spans(spans: InMemorySpanExporter) -> None:
    """G10: below the client's span one of the server, below that the job's, with queue, worker and stream."""
    mount = {"app": "tests.handlers:app", "provider": "openai", "source": "agents", "key_id": "key-1"}
    with Served({"/ai": mount}, drain=0) as served:
        url = f"{served.url}/ai/stream?count=3&pause=0.01"
        assert requests.get(url, headers={"traceparent": PARENT}, timeout=20).ok
        seen = requests.get(f"{served.url}/ai/echo", headers={"traceparent": PARENT}, timeout=20).json()
        wait_until(lambda: sum(span.name == "GET /ai" for span in spans.get_finished_spans()) == 2)
    echo = [span for span in spans.get_finished_spans() if span.name == "GET /ai"][1]
    told = [value for name, value in seen["headers"] if name == "traceparent"]
    assert told == [f"00-0af7651916cd43dd8448eb211c80319c-{hexadecimal(echo)}-01"]
    first = list(spans.get_finished_spans())[:5]
    found = {span.name: span for span in first}
    assert set(found) == {"GET /ai", "blastdoor.job", "blastdoor.queue", "blastdoor.worker", "blastdoor.stream"}
    server, job = found["GET /ai"], found["blastdoor.job"]
    assert server.kind is trace.SpanKind.SERVER
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == "b7ad6b7169203331"
    assert job.parent == server.context
    for name in ("blastdoor.queue", "blastdoor.worker", "blastdoor.stream"):
        assert found[name].parent == job.context
    for span in (server, job):
        assert span.attributes is not None
        assert span.attributes["blastdoor.provider"] == "openai"
        assert span.attributes["blastdoor.source"] == "agents"
        assert span.attributes["http.response.status_code"] == 200
    order = [found[f"blastdoor.{name}"] for name in ("queue", "worker", "stream")]
    for before, after in itertools.pairwise(order):
        assert before.end_time == after.start_time
    stream = order[-1]
    assert (stream.end_time or 0) - (stream.start_time or 0) > 10e6


def test_spans_of_jobs(pool: Pool, spans: InMemorySpanExporter) -> None:
    """G10: whatever the way in: a job's span lies below the current one, and says how it ended."""
    end = trace_jobs(pool)
    with trace.get_tracer("test").start_as_current_span("mine") as mine:
        with pool.open(Request("GET", "/hello")) as job:
            assert b"".join(job) == b"hello"
        with pytest.raises(WorkerDied):
            pool.open(Request("GET", "/die"))
    jobs = [span for span in spans.get_finished_spans() if span.name == "blastdoor.job"]
    outcomes = [(span.attributes or {})["blastdoor.outcome"] for span in jobs]
    assert outcomes == ["ok", "died"]
    assert [span.status.status_code.name for span in jobs] == ["UNSET", "ERROR"]
    assert "SIGSEGV" in (jobs[1].status.description or "")
    assert [span.parent for span in jobs] == [mine.get_span_context()] * 2
    end()
    spans.clear()
    with pool.open(Request("GET", "/hello")) as job:
        job.read()
    assert not spans.get_finished_spans()


def test_spans_of_callers_that_got_no_worker(start: Any, spans: InMemorySpanExporter) -> None:
    """G10, F7: a caller that has waited in vain has a span, and it is an error."""
    pool = start(workers=1)
    trace_jobs(pool)
    with pool.open(Request("GET", "/endless")):
        with pytest.raises(LeaseTimeout):
            pool.open(Request("GET", "/hello"), lease_timeout=0.02)
        job = by_name(spans)["blastdoor.job"]
    assert job.status.status_code is trace.StatusCode.ERROR
    assert (job.end_time or 0) - (job.start_time or 0) > 15e6


def test_nobody_traces() -> None:
    """G10: without a provider the header goes through unchanged, and OpenTelemetry is not even imported."""
    code = (
        "import json, sys, requests\n"
        "from tests.serving import Served\n"
        "with Served(drain=0) as served:\n"
        f"    seen = requests.get(served.url + '/echo', headers={{'traceparent': {PARENT!r}}}, timeout=20).json()\n"
        "told = [value for name, value in seen['headers'] if name == 'traceparent']\n"
        "print(json.dumps([told, any(name.startswith('opentelemetry') for name in sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [[PARENT], False]
