"""Applications for the bench's server: the real edge over a database, and a bare Flask."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from flask import Flask, Response, request

from gpu_agent import wire
from infra.crypto import SecretBox
from infra.settings import Settings
from infra.store import SqlStore
from orchestrator.app import create_app
from orchestrator.dashboard.aside import Aside
from orchestrator.deps import Deps
from orchestrator.rsgi import Server
from state.events import Secret
from state.job import JobRequest


class _Nothing:
    """Storage and bundle of a server that is only asked to take reports."""

    url, headers, bytes, sha256 = "", dict[str, str](), b"", ""

    def presign_put(self, key: str, *, bytes: int, expires_s: int) -> _Nothing:
        return self

    def presign_get(self, key: str, *, expires_s: int) -> str:
        return self.url

    def head(self, key: str) -> int | None:
        return None


def edge(env: Mapping[str, str] = os.environ) -> Flask:
    """The real edge and the real store; wake-ups go nowhere."""
    key = Secret(env["STOKER_SECRET_KEYS"])
    store = SqlStore(env["DATABASE_URL"], SecretBox([key]))

    def no_base(_: JobRequest) -> Sequence[wire.Download]:
        raise LookupError("the bench has no base models")

    return create_app(
        Deps(
            store=store,
            storage=_Nothing(),
            clock=lambda: datetime.now(UTC),
            wake=lambda task, subject: None,
            bundle=_Nothing(),
            resolve_base=no_base,
            settings=Settings(secret_keys=(key,)),
        )
    )


def server() -> Server:
    """The same as granian serves it."""
    app = edge()
    app.extensions["looker"] = Aside("orchestrator.bench.target:edge")
    return Server(app)


def bare() -> Flask:
    """What Flask itself costs: read the body, answer."""
    app = Flask("bare")

    @app.post("/agent/v1/jobs/<job>/attempts/<int:attempt>/reports")
    def take(job: str, attempt: int) -> Response:
        request.get_data()
        return Response(b'{"orders": []}', mimetype="application/json")

    return app
