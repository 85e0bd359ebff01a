"""The edge with real services.

`granian --interface rsgi --factory orchestrator.wsgi:make_server` is how it is run; any WSGI
server can run `make_app`, with a thread for each report that waits for its commit.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from infra import logs, telemetry
from infra.wiring import Services, services
from orchestrator.app import create_app
from orchestrator.checks import ready_checks
from orchestrator.dashboard.aside import Aside
from orchestrator.deps import Deps
from orchestrator.rsgi import Server
from tasks.app import wake
from tasks.life import live
from tasks.reconcile import RECEIVER

if TYPE_CHECKING:
    from flask import Flask


def make_app() -> Flask:
    """The WSGI application of this process."""
    have = services()
    telemetry.trace_to(have.settings.otlp_endpoint, "stoker-web")
    live(have.store, have.clock, RECEIVER, threading.Event())
    return _app(have)


def make_pages() -> Flask:
    """The same for a process that takes no reports, and only looks at pages."""
    return _app(services())


def _app(have: Services) -> Flask:
    logs.configure()
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return create_app(
        Deps(
            store=have.store,
            storage=have.storage,
            clock=have.clock,
            wake=lambda task, subject: wake(task, [subject]),
            bundle=have.bundle,
            resolve_base=have.resolve_base,
            settings=have.settings,
            ready_checks=ready_checks(have),
            market=lambda: have.provider,
            look_up_base=lambda link: have.bases.look_up(link),
            metrics_dir=Path(shared) if shared else None,
        )
    )


def make_server() -> Server:
    """The RSGI application of this process."""
    app = make_app()
    app.extensions["looker"] = Aside("orchestrator.wsgi:make_pages")
    return Server(app)
