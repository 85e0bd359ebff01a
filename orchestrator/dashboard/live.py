"""Pages that stay true while somebody looks: one stream per page, parts swapped by their ids.

A page module gives `look(tx, …)`, all that it shows as a value, and `fragments(tx, before, after)`,
the HTML of what differs. All who look at the same thing are sent the same bytes, so there is
nothing of one session in them. Whoever connects, or comes back, is sent all of it.

A look at many jobs is tens of milliseconds of Python, in which reports would wait for the
interpreter; so under granian a `Looker` lives in a process beside (`orchestrator.dashboard.aside`).
"""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode

from flask import Blueprint, Flask, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from werkzeug.datastructures import MultiDict

from orchestrator import streams
from orchestrator.api import auth, problems
from orchestrator.api.jobs import visible
from orchestrator.api.problems import Refusal
from orchestrator.dashboard import access, fleet, job, money, webhooks
from orchestrator.deps import Deps
from orchestrator.streams import Channel, Entry, News
from state.job import Job
from state.store import Transaction

#: Looks that are kept to be compared with later ones; a reader of an older one is sent all.
KEPT = 256


@dataclass(frozen=True)
class Page:
    """What is looked at: `fleet`, `money` or `webhooks` with the query string of its view, or `job`
    with an id."""

    name: str
    what: str


class Looker(Protocol):
    """Looks at pages, and remembers what it saw by numbers."""

    def look(self, tx: Transaction, page: Page) -> int:
        """The number of what the page shows now; the last one's, where nothing happened."""

    def fragments(self, tx: Transaction, page: Page, before: int | None, after: int) -> str:
        """HTML of what differs between two looks; of all, for who had none that is known."""

    def close(self) -> None:
        """Look no more."""


class LocalLooker:
    """Looks here. Only ever used by one thread at a time."""

    def __init__(self, app: Flask, deps: Deps) -> None:
        self._app, self.deps = app, deps
        # no number means something to the looker that comes after this one
        self._numbers = itertools.count(secrets.randbits(48))
        self._kept: OrderedDict[tuple[Page, int], Any] = OrderedDict()
        self._last: dict[Page, int] = {}

    def look(self, tx: Transaction, page: Page) -> int:
        seen = self._seen(tx, page)
        last = self._last.get(page, 0)
        if self._kept.get((page, last)) == seen:
            self._kept.move_to_end((page, last))
            return last
        number = self._last[page] = next(self._numbers)
        self._kept[page, number] = seen
        while len(self._kept) > KEPT:
            (old, told), _ = self._kept.popitem(last=False)
            if self._last.get(old) == told:
                del self._last[old]
        return number

    def fragments(self, tx: Transaction, page: Page, before: int | None, after: int) -> str:
        known = self._kept.get((page, before or 0))
        with self._app.test_request_context(base_url=self.deps.settings.public_url or None):
            return _SHOWS[page.name](tx, known, self._kept[page, after])

    def close(self) -> None:
        """Nothing runs between two looks."""

    def _seen(self, tx: Transaction, page: Page) -> Any:
        return _SEES[page.name](tx, page.what, self.deps)


def _args(what: str) -> MultiDict[str, str]:
    return MultiDict(parse_qsl(what))


#: By page, what it shows now.
_SEES: Mapping[str, Callable[[Transaction, str, Deps], Any]] = {
    "fleet": lambda tx, what, deps: fleet.look(tx, fleet.View.of(_args(what)), deps),
    "job": lambda tx, what, deps: job.look(tx, tx.job(what), deps),
    "money": lambda tx, what, deps: money.look(tx, money.View.of(_args(what)), deps),
    "webhooks": lambda tx, what, deps: webhooks.look(tx, webhooks.asked(_args(what)), deps.clock()),
}
#: By page, what differs between two of these.
_SHOWS: Mapping[str, Callable[[Transaction, Any, Any], str]] = {
    "fleet": fleet.fragments,
    "job": job.fragments,
    "money": money.fragments,
    "webhooks": webhooks.fragments,
}


@dataclass(frozen=True)
class LivePage:
    """A page as a channel; positions are a looker's numbers."""

    page: Page
    looker: Looker = field(repr=False, compare=False)

    @property
    def jobs(self) -> Collection[str]:
        return ()

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> int:
        return self.looker.look(tx, self.page)

    def news(self, tx: Transaction, since: int | None, head: int) -> News:
        html = "" if since == head else self.looker.fragments(tx, self.page, since, head)
        return News(data=streams.message(html) if html else b"", at=head)


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the streams of the pages into `pages`."""

    def here(state: BlueprintSetupState) -> None:
        app: Any = state.app
        app.extensions["looker"] = LocalLooker(app, deps)

    def follow(page: Page) -> Response:
        channel: Channel = LivePage(page, current_app.extensions["looker"])
        entry, owner = Entry(access.key_hash(), auth.OPERATOR), auth.caller().owner
        try:
            return streams.hub().open(channel, entry=entry, owner=owner).response()
        except Refusal as refusal:
            return problems.respond(refusal)  # a script asks, and wants Retry-After

    pages.record(here)

    @pages.get("/live/fleet")
    def live_fleet() -> Response:
        return follow(Page("fleet", fleet.View.of(request.args).query()))

    @pages.get("/live/money")
    def live_money() -> Response:
        return follow(Page("money", money.View.of(request.args).query()))

    @pages.get("/live/webhooks")
    def live_webhooks() -> Response:
        return follow(Page("webhooks", urlencode(webhooks.said(webhooks.asked(request.args)))))

    @pages.get("/live/jobs/<job_id>")
    def live_job(job_id: str) -> Response:
        with deps.store.transaction() as tx:
            known = visible(tx, job_id, auth.caller())
        return follow(Page("job", known.id))
