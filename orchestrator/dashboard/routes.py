"""Every page, gathered into one blueprint."""

from __future__ import annotations

from flask import Blueprint, Flask

from orchestrator.api.estimates import Estimates
from orchestrator.dashboard import access, actions, fleet, job, live, money, new, webhooks, words
from orchestrator.deps import Deps
from orchestrator.waker import Waker

#: What the frame's navigation names, in order.
PAGES = (
    ("pages.fleet", "Fleet"),
    ("pages.money", "Money & hosts"),
    ("pages.webhooks", "Webhooks"),
    ("pages.new", "New training"),
)


def install(app: Flask, deps: Deps, waker: Waker, estimates: Estimates) -> None:
    """Add the pages to `app`."""
    pages = Blueprint(
        "pages",
        __name__,
        template_folder="templates",
        static_folder="static",
        static_url_path="/assets",
    )
    access.install(pages, deps, access.secure(app, deps))
    words.install(pages)
    fleet.register(pages, deps)
    job.register(pages, deps)
    actions.register(pages, deps, waker)
    money.register(pages, deps)
    new.register(pages, deps, waker, estimates)
    webhooks.register(pages, deps, waker)
    live.register(pages, deps)
    pages.add_app_template_global(PAGES, "PAGES")  # type: ignore[arg-type]  # any value will do
    app.register_blueprint(pages)
