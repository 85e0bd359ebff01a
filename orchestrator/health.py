"""`/healthz`, `/readyz`, `/metrics`, `/version`, `/openapi.json`: for machines that watch us."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from flask import Blueprint, Response, jsonify, request

from gpu_agent import wire
from infra import logs
from orchestrator.api.problems import Refusal, respond
from orchestrator.checks import proof
from orchestrator.deps import Deps
from orchestrator.metrics import CONTENT_TYPE, Metrics

_log = logs.logger(__name__)
#: What a doctor sends to be proven; fresh each time.
CHALLENGE = re.compile(r"[0-9a-f]{32}")


def readiness(checks: Mapping[str, Callable[[], str | None]]) -> dict[str, dict[str, Any]]:
    """Each part's `ok`, and what is wrong with it where something is."""
    parts: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        try:
            fault = check()
        except Exception as error:  # noqa: BLE001 -- a check that breaks is a part that is down
            fault = f"{type(error).__name__}: {error}"
        parts[name] = {"ok": True} if fault is None else {"ok": False, "fault": logs.mask(fault)}
    return parts


def version_here() -> str:
    try:
        return metadata.version("stoker")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def health(deps: Deps, metrics: Metrics, spec: Callable[[], dict[str, Any]]) -> Blueprint:
    blueprint = Blueprint("health", __name__)

    @blueprint.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="alive")

    @blueprint.get("/readyz")
    def readyz() -> Response:
        parts = readiness(deps.ready_checks)
        faulty = [name for name, part in parts.items() if not part["ok"]]
        if not faulty:
            return jsonify(status="ready", parts=parts)
        _log.warning("not ready", parts=faulty)
        return respond(
            Refusal(
                503,
                "not_ready",
                "not ready: " + ", ".join(faulty),
                headers={"Retry-After": "5"},
                retryable=True,
                extra={"parts": parts},
            )
        )

    @blueprint.get("/metrics")
    def scrape() -> Response:
        settings = deps.settings
        text = metrics.render(deps.store, deps.clock, settings.limits, settings.kill_switch)
        return Response(text, content_type=CONTENT_TYPE)

    @blueprint.get("/version")
    def version() -> Response:
        known = {"version": version_here(), "wire": wire.VERSION}
        challenge, keys = request.args.get("challenge", ""), deps.settings.secret_keys
        if CHALLENGE.fullmatch(challenge) and keys:  # the doctor asks whether this is us
            known["proof"] = proof(keys[0], challenge)
        return jsonify(known)

    @blueprint.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(spec())

    return blueprint
