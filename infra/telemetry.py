"""What the processes tell of their work beside logs: counters for Prometheus, spans for a tracer.

Counters of all processes on one machine meet in PROMETHEUS_MULTIPROC_DIR, and the web server shows
them; a worker elsewhere can show its own (`STOKER_METRICS_BIND`). Spans are made only where
OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` is installed. All spans that a job is named
in belong to one trace, whichever process made them: its id is made of the job's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram, start_http_server

from infra import logs

_log = logs.logger(__name__)
_TASK_SECONDS = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_CALL_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counters:
    """What workers count."""

    def __init__(self) -> None:
        self.tasks = Counter(
            "stoker_tasks", "Celery tasks, by what became of them.", ("task", "outcome")
        )
        self.task_seconds = Histogram(
            "stoker_task_seconds", "How long they ran.", ("task",), buckets=_TASK_SECONDS
        )
        self.market_calls = Counter(
            "stoker_market_calls", "Calls to the GPU market.", ("call", "outcome")
        )
        self.market_seconds = Histogram(
            "stoker_market_call_seconds",
            "How long those took, without the wait for their turn.",
            ("call",),
            buckets=_CALL_SECONDS,
        )


@cache
def counters() -> Counters:
    """This process's own."""
    return Counters()


def show(bind: str) -> None:
    """Serve this process's counters at `http://HOST:PORT/metrics`. Raises: OSError, ValueError."""
    host, _, port = bind.rpartition(":")
    start_http_server(int(port), addr=host or "127.0.0.1")


@contextmanager
def task(name: str, job: str = "") -> Iterator[None]:
    """A Celery task runs in this block."""
    began, outcome = time.perf_counter(), "failed"
    try:
        with span(f"task {name}", job=job):
            yield
        outcome = "done"
    finally:
        counters().tasks.labels(name, outcome).inc()
        counters().task_seconds.labels(name).observe(time.perf_counter() - began)


class MarketCall:
    """One call to the market; `outcome` is an HTTP status, or what came instead of one."""

    outcome = "no answer"


@contextmanager
def market_call(name: str) -> Iterator[MarketCall]:
    """A call to the GPU market is made in this block, which sets its outcome."""
    call, began = MarketCall(), time.perf_counter()
    try:
        with span(f"market {name}"):
            yield call
    finally:
        counters().market_calls.labels(name, call.outcome).inc()
        counters().market_seconds.labels(name).observe(time.perf_counter() - began)


# --- traces -----------------------------------------------------------------------------------


class _Tracing:
    provider: Any = None
    tracer: Any = None


def trace_to(endpoint: str, service: str) -> bool:
    """Send spans to the OTLP collector at `endpoint` from now on; whether that is possible.

    The exporter reads the rest of the OTEL_* variables itself.
    """
    if not endpoint:
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning(
            "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, and the extra otel is not there"
        )
        return False
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _Tracing.provider, _Tracing.tracer = provider, provider.get_tracer("stoker")
    return True


def flush() -> None:
    """Send what is not sent yet."""
    if _Tracing.provider is not None:
        _Tracing.provider.force_flush()


def trace_no_more() -> None:
    """Send what is left, and make no spans from now on."""
    if _Tracing.provider is not None:
        _Tracing.provider.shutdown()
    _Tracing.provider = _Tracing.tracer = None


@contextmanager
def span(name: str, *, job: str = "", **attributes: str | int | float | bool) -> Iterator[None]:
    """A span around the block; inside another one it is its child, else the job's trace has it.

    Costs nothing where nobody collects traces.
    """
    if _Tracing.tracer is None:
        yield
        return
    from opentelemetry import trace

    told = {"stoker.job": job, **attributes} if job else attributes
    inside = trace.get_current_span().get_span_context().is_valid
    context = _trace_of(job) if job and not inside else None
    with _Tracing.tracer.start_as_current_span(name, context=context, attributes=told):
        yield


def _trace_of(job: str) -> Any:
    """A context whose trace is the job's own."""
    from opentelemetry import trace

    digest = hashlib.sha256(job.encode()).digest()
    parent = trace.SpanContext(
        trace_id=int.from_bytes(digest[:16], "big"),
        span_id=int.from_bytes(digest[16:24], "big"),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))
