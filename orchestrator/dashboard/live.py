"""Pages that stay true while somebody looks: one stream per page, parts swapped by their ids.

A page module gives `look(tx, …)`, all that it shows as a value, and `fragments(tx, before, after)`,
the HTML of what differs. All who look at the same thing are sent the same bytes, so there is
nothing of one session in them. Whoever connects, or comes back, is sent all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Blueprint, Flask, Response, current_app, request

from orchestrator import streams
from orchestrator.api import auth, problems
from orchestrator.api.jobs import visible
from orchestrator.api.problems import Refusal
from orchestrator.dashboard import access, fleet, job
from orchestrator.deps import Deps
from orchestrator.streams import Channel, Entry, News
from state.job import Job
from state.store import Transaction

Fragments = Callable[[Transaction, Any, Any], str]


@dataclass(frozen=True, eq=False)
class Seen:
    """A look as a position: the same one or another one, whatever is in it."""

    look: Any


@dataclass(frozen=True)
class _Page:
    """What the channels of pages share; the application renders, outside any request."""

    app: Flask = field(repr=False, compare=False)
    deps: Deps = field(repr=False, compare=False)

    @property
    def jobs(self) -> Collection[str]:
        return ()

    def _news(self, tx: Transaction, since: Seen | None, head: Seen, fragments: Fragments) -> News:
        before = since.look if since else None
        if before == head.look:
            return News(at=head)
        with self.app.test_request_context(base_url=self.deps.settings.public_url or None):
            html = fragments(tx, before, head.look)
        return News(data=streams.message(html) if html else b"", at=head)


@dataclass(frozen=True)
class FleetPage(_Page):
    view: fleet.View

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> Seen:
        return Seen(fleet.look(tx, self.view, self.deps))

    def news(self, tx: Transaction, since: Seen | None, head: Seen) -> News:
        return self._news(tx, since, head, fleet.fragments)


@dataclass(frozen=True)
class JobPage(_Page):
    job: str

    @property
    def jobs(self) -> Collection[str]:
        return (self.job,)

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> Seen:
        return Seen(job.look(tx, jobs[self.job], self.deps))

    def news(self, tx: Transaction, since: Seen | None, head: Seen) -> News:
        return self._news(tx, since, head, job.fragments)


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the streams of the pages into `pages`."""

    def follow(channel: Channel) -> Response:
        entry, owner = Entry(access.key_hash(), auth.OPERATOR), auth.caller().owner
        try:
            return streams.hub().open(channel, entry=entry, owner=owner).response()
        except Refusal as refusal:
            return problems.respond(refusal)  # a script asks, and wants Retry-After

    def app() -> Flask:
        found: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        return found

    @pages.get("/live/fleet")
    def live_fleet() -> Response:
        return follow(FleetPage(app(), deps, fleet.View.of(request.args)))

    @pages.get("/live/jobs/<job_id>")
    def live_job(job_id: str) -> Response:
        with deps.store.transaction() as tx:
            known = visible(tx, job_id, auth.caller())
        return follow(JobPage(app(), deps, known.id))
