"""The HTTP edge, put together: `create_app(deps)`."""

from __future__ import annotations

import time
from typing import Any

from flask import Response, g, request
from flask.json.provider import DefaultJSONProvider
from flask_openapi.models.info import Info
from flask_openapi.models.security_scheme import SecurityScheme
from flask_openapi.models.server import Server
from flask_openapi.openapi import OpenAPI
from flask_openapi.types import ResponseDict

from infra import telemetry
from orchestrator import dashboard, streams
from orchestrator.agent_api import agent_api
from orchestrator.api import limits, problems
from orchestrator.api.bases import bases
from orchestrator.api.datasets import datasets
from orchestrator.api.deliveries import deliveries
from orchestrator.api.estimates import Estimates
from orchestrator.api.hosts import hosts
from orchestrator.api.jobs import jobs
from orchestrator.api.operators import operators
from orchestrator.api.reads import reads
from orchestrator.api.streams import describe as describe_streams
from orchestrator.api.webhook_endpoints import webhook_endpoints
from orchestrator.attempt_auth import AttemptAuth
from orchestrator.deps import Deps
from orchestrator.health import health
from orchestrator.metrics import Metrics
from orchestrator.vast_hints import vast_hints
from orchestrator.waker import Waker
from orchestrator.webhook import Receiver, ReportTaker, WsgiReceiver, request_id

__all__ = ["Deps", "create_app"]

#: Longest body of the public interface: a dataset of ten thousand announced files.
MAX_BODY = 4 * 2**20
#: What every public route may answer besides its own.
PROBLEMS: ResponseDict = {
    status: problems.Problem
    for status in (
        "400",
        "401",
        "403",
        "404",
        "405",
        "409",
        "410",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
    )
}


def create_app(deps: Deps) -> OpenAPI:
    """The WSGI application: `/v1`, `/agent/v1`, health and metrics.

    The receiver of reports stands in front of Flask (see `orchestrator.webhook`).
    """
    app = OpenAPI(
        "orchestrator",
        info=Info(title="Stoker", version="1", description="Fine-tuning on rented GPUs."),
        servers=[Server(url=deps.settings.public_url)],
        security_schemes={"key": SecurityScheme(type="http", scheme="bearer")},
        responses=PROBLEMS,
        validation_error_model=problems.Problem,
        validation_error_callback=problems.invalid,
        doc_ui=False,
    )
    app.openapi_version = "3.1.0"  # the default, 3.2.0, is refused by client generators
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.json = _Json(app)
    metrics, waker = Metrics(deps.metrics_dir), Waker(deps.wake)
    auth, estimates = AttemptAuth(deps.store, deps.clock), Estimates(deps)
    problems.install(app)
    limits.install(app, deps)
    _watch_requests(app, metrics)
    streams.install(app, deps)
    app.register_api(datasets(deps, waker))
    app.register_api(jobs(deps, waker, estimates))
    app.register_api(reads(deps))
    app.register_api(bases(deps))
    app.register_api(webhook_endpoints(deps, waker))
    app.register_api(deliveries(deps, waker))
    app.register_api(hosts(deps))
    app.register_api(operators(deps))
    app.register_blueprint(agent_api(deps, auth, waker))
    app.register_blueprint(vast_hints(deps, waker))
    app.register_blueprint(health(deps, metrics, lambda: spec_of(app)))
    dashboard.install(app, deps, waker, estimates)
    receiver = Receiver(auth, ReportTaker(deps.store, deps.clock, waker, metrics), metrics)
    app.wsgi_app = WsgiReceiver(app.wsgi_app, receiver)  # type: ignore[method-assign]
    return app


class _Json(DefaultJSONProvider):
    """JSON as JSON Schema understands it: 300.0 is an integer. Keys keep their order."""

    sort_keys = False

    def loads(self, s: str | bytes, **options: Any) -> Any:
        return super().loads(s, parse_float=_number, **options)


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def spec_of(app: OpenAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 description. flask-openapi leaves the answers that are common to all out of
    blueprints, and takes a validation error for a list: both are put right here."""
    spec: dict[str, Any] = app.api_doc
    schema = {"$ref": "#/components/schemas/Problem"}
    common = {
        status: {
            "description": problems.title_of(int(status)),
            "content": {problems.MIMETYPE: {"schema": schema}},
        }
        for status in PROBLEMS
    }
    for path in spec["paths"].values():
        for operation in path.values():
            operation["responses"] = dict(sorted((operation["responses"] | common).items()))
    describe_streams(spec)
    return spec


def _watch_requests(app: OpenAPI, metrics: Metrics) -> None:
    @app.before_request
    def begin() -> None:
        g.began = time.perf_counter()
        g.request_id = request_id(request.headers.get("X-Request-Id", ""))
        route = request.url_rule.rule if request.url_rule else "unmatched"
        job = (request.view_args or {}).get("job_id", "")
        g.span = telemetry.span(f"{request.method} {route}", job=job, request_id=g.request_id)
        g.span.__enter__()

    @app.teardown_request
    def close(error: BaseException | None) -> None:
        if "span" in g:
            g.pop("span").__exit__(type(error) if error else None, error, None)

    @app.after_request
    def end(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "unmatched"
        seconds = time.perf_counter() - g.began
        metrics.answered(request.method, route, response.status_code, seconds)
        response.headers["X-Request-Id"] = g.request_id
        return response
