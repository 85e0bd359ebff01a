"""Counters and spans: what is told of tasks, calls to the market, and a job's way."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from prometheus_client import REGISTRY

from infra import telemetry

pytest.importorskip("opentelemetry.sdk")


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_task_that_raises_counts_as_failed() -> None:
    done = counted("stoker_tasks_total", task="sweep", outcome="done")
    failed = counted("stoker_tasks_total", task="sweep", outcome="failed")
    with telemetry.task("sweep"):
        pass
    with pytest.raises(ValueError, match="broken"), telemetry.task("sweep"):
        raise ValueError("broken")
    assert counted("stoker_tasks_total", task="sweep", outcome="done") == done + 1
    assert counted("stoker_tasks_total", task="sweep", outcome="failed") == failed + 1


def test_a_call_that_nobody_answered_says_so() -> None:
    before = counted("stoker_market_calls_total", call="create", outcome="no answer")
    with pytest.raises(TimeoutError), telemetry.market_call("create"):
        raise TimeoutError
    assert counted("stoker_market_calls_total", call="create", outcome="no answer") == before + 1


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An OTLP collector on a socket; the spans that it got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            got.extend(
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    assert telemetry.trace_to(endpoint, "stoker-test")
    yield got
    telemetry.trace_no_more()
    server.shutdown()
    server.server_close()
    thread.join()


def test_all_that_happens_to_a_job_is_one_trace(collector: list[Any]) -> None:
    with telemetry.task("allocate_gpu", "job_1"), telemetry.market_call("create") as call:
        call.outcome = "200"
    with telemetry.span("POST /v1/jobs/<job_id>/cancel", job="job_1"):
        pass
    with telemetry.span("GET /v1/jobs"):
        pass
    telemetry.flush()
    by_name = {span.name: span for span in collector}
    assert set(by_name) == {
        "task allocate_gpu",
        "market create",
        "POST /v1/jobs/<job_id>/cancel",
        "GET /v1/jobs",
    }
    of_job = {span.trace_id for name, span in by_name.items() if name != "GET /v1/jobs"}
    assert len(of_job) == 1
    assert by_name["GET /v1/jobs"].trace_id not in of_job
    assert by_name["market create"].parent_span_id == by_name["task allocate_gpu"].span_id


def test_without_a_collector_nothing_is_traced() -> None:
    assert not telemetry.trace_to("", "stoker-test")
    with telemetry.span("GET /", job="job_1"):
        pass
