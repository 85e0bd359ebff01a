"""The OpenAPI description without a server: for `stoker openapi`, docs and generated clients."""

from __future__ import annotations

import json
from typing import Any, cast

from infra.settings import Settings
from infra.wiring import utc_now
from orchestrator.app import create_app, spec_of
from orchestrator.deps import Bundle, Deps, Storage
from state.memory import MemoryStore


def specification() -> dict[str, Any]:
    """As an installation at https://stoker.example.com serves it at `/openapi.json`."""
    deps = Deps(
        store=MemoryStore(),
        storage=cast(Storage, None),  # no request is ever made
        bundle=cast(Bundle, None),
        clock=utc_now,
        wake=lambda task, subject: None,
        resolve_base=lambda request: (),
        settings=Settings(public_url="https://stoker.example.com"),
    )
    return spec_of(create_app(deps))


def openapi_json() -> str:
    """The same as text: `docs/openapi.json`."""
    return json.dumps(specification(), indent=1, ensure_ascii=False) + "\n"
