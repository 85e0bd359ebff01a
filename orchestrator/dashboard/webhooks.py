"""Webhooks: whom we tell of jobs and of what, what became of each message, and once more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, flash, g, redirect, render_template, request, url_for
from pydantic import ValidationError
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response

from orchestrator.api import deliveries, jobs, webhook_endpoints
from orchestrator.api.deliveries import DeliveriesPage, DeliveriesQuery
from orchestrator.api.ids import new_id, plausible
from orchestrator.api.problems import Refusal, refusal_of
from orchestrator.api.webhook_endpoints import EndpointChange, EndpointIn, NewWebhook, Webhook
from orchestrator.dashboard.access import inside
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import endpoints as places
from state.endpoints import Backlog
from state.errors import NotFound, StokerError
from state.events import OutgoingStatus
from state.store import Transaction

#: Deliveries on a page.
PAGE = 30
#: What was given up is told of for so long.
GIVEN_UP = timedelta(days=7)
#: By its name in a page's address, what is asked for; url_for() keeps `endpoint` to itself.
FILTERS = {"job": "job", "to": "endpoint", "status": "status", "cursor": "cursor"}
#: A glyph beside every colour.
DELIVERY_GLYPHS = {"waiting": "◔", "delivered": "✔", "exhausted": "✖", "disabled": "■"}
DELIVERY_KINDS = {"waiting": "info", "delivered": "ok", "exhausted": "bad", "disabled": ""}


def asked(args: MultiDict[str, str]) -> DeliveriesQuery:
    """What the filters of a page's address ask for. Raises: Refusal 422."""
    found = {name: args[key] for key, name in FILTERS.items() if args.get(key)}
    try:
        return DeliveriesQuery.model_validate({**found, "limit": PAGE})
    except ValidationError as error:
        faults = [f"{name.strip('/')}: {why}" for name, why in _faults(error).items()]
        raise Refusal(422, "invalid", "; ".join(faults)) from None


def said(query: DeliveriesQuery) -> dict[str, Any]:
    """The same as a page's address says it."""
    return {key: value for key, name in FILTERS.items() if (value := getattr(query, name))}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What of the page changes by itself. Two are equal when nothing happened between them."""

    query: DeliveriesQuery
    endpoints: list[Webhook]
    backlog: list[Backlog]
    deliveries: DeliveriesPage
    now: datetime = field(compare=False)

    @property
    def urls(self) -> dict[str, str]:
        return {item.id: item.url or "a listener" for item in self.endpoints}

    @property
    def stands(self) -> dict[str, dict[str, Backlog]]:
        """By endpoint and status, what waits and what was given up."""
        found: dict[str, dict[str, Backlog]] = {}
        for item in self.backlog:
            found.setdefault(item.endpoint, {})[item.status.value] = item
        return found


def look(tx: Transaction, query: DeliveriesQuery, now: datetime) -> Look:
    """Everybody's endpoints, and those deliveries that are asked for."""
    return Look(
        query=query,
        endpoints=webhook_endpoints.all_of(tx, None, now),
        backlog=tx.webhook_backlog(now - GIVEN_UP),
        deliveries=deliveries.page(tx, None, query),
        now=now,
    )


def fragments(tx: Transaction, before: Look | None, after: Look) -> str:
    """What changed between two looks, as parts to be swapped out of band; all of it, for who
    had none."""
    html: list[str] = []
    same = before is not None and before.endpoints == after.endpoints
    if before is None or not same or before.backlog != after.backlog:
        html.append(render_template("webhooks_endpoints.html", oob=True, **_shown(after)))
    if before is None or not same or before.deliveries != after.deliveries:
        html.append(render_template("webhooks_deliveries.html", oob=True, **_shown(after)))
    return "".join(html)


def _shown(seen: Look) -> dict[str, Any]:
    """What the parts are rendered with."""
    return {
        "look": seen,
        "query": seen.query,
        "here": url_for("pages.webhooks", **said(seen.query)),
        "types": places.TYPES,
        "overlap": places.OVERLAP,
        "form_key": new_id("form", seen.now),
    }


def register(pages: Blueprint, deps: Deps, waker: Waker) -> None:
    """Put the page's views into `pages`."""
    pages.add_app_template_global(DELIVERY_GLYPHS, "DELIVERY_GLYPHS")  # type: ignore[arg-type]
    pages.add_app_template_global(DELIVERY_KINDS, "DELIVERY_KINDS")  # type: ignore[arg-type]

    def show(*, fresh: NewWebhook | None = None, faults: dict[str, str] | None = None) -> str:
        query = asked(request.args)
        with deps.store.transaction() as tx:
            seen = look(tx, query, deps.clock())
        return render_template(
            "webhooks.html",
            **_shown(seen),
            live=urlencode(said(query)),
            statuses=[status.value for status in OutgoingStatus],
            form=request.form,
            fresh=fresh,
            faults=faults or {},
        )

    def done(words: str) -> Response:
        flash(words, "ok")
        return redirect(url_for("pages.webhooks"), 303)

    def attempt(move: Callable[[], Response | str]) -> Response | str:
        """What `move` answers; a refusal is said on the page, which shows things as they are."""
        try:
            return move()
        except NotFound:
            raise
        except (Refusal, StokerError) as error:
            flash(_words(refusal_of(error)), "error")
            return redirect(url_for("pages.webhooks"), 303)

    @pages.get("/webhooks")
    def webhooks() -> str:
        return show()

    @pages.post("/webhooks", endpoint="add_webhook")
    def add() -> Response | str | tuple[str, int]:
        try:
            body = EndpointIn(
                url=request.form.get("url", "").strip(),
                events=request.form.getlist("events"),
                description=request.form.get("description", "").strip(),
            )
            fresh, again = webhook_endpoints.create(deps, g.caller, body, _form_key())
        except ValidationError as error:
            return show(faults=_faults(error)), 422
        except Refusal as refusal:
            return show(faults=dict(refusal.errors) or {"": refusal.detail}), refusal.status
        if again:
            return done(f"{fresh.url} was added already; its secret was shown then.")
        return show(fresh=fresh)

    @pages.post("/webhooks/<endpoint_id>", endpoint="change_webhook")
    def change(endpoint_id: str) -> Response | str:
        def move() -> Response:
            said = {
                "events": request.form.getlist("events"),
                "description": request.form.get("description", "").strip(),
            }
            url = request.form.get("url", "").strip()
            try:
                body = EndpointChange(**said, **({"url": url} if url else {}))  # type: ignore[arg-type]
            except ValidationError as error:
                raise Refusal(422, "invalid", "; ".join(_faults(error).values())) from None
            webhook_endpoints.change(deps, g.caller, endpoint_id, body)
            return done("Changed.")

        return attempt(move)

    @pages.post("/webhooks/<endpoint_id>/enable", endpoint="enable_webhook")
    def enable(endpoint_id: str) -> Response | str:
        def move() -> Response:
            body = EndpointChange(enabled=True)
            webhook_endpoints.change(deps, g.caller, endpoint_id, body)
            return done("Enabled. What it missed can be replayed, one by one.")

        return attempt(move)

    @pages.post("/webhooks/<endpoint_id>/disable", endpoint="disable_webhook")
    def disable(endpoint_id: str) -> Response | str:
        def move() -> Response:
            body = EndpointChange(enabled=False)
            webhook_endpoints.change(deps, g.caller, endpoint_id, body)
            return done("Disabled: nothing is sent to it until you enable it.")

        return attempt(move)

    @pages.post("/webhooks/<endpoint_id>/test", endpoint="test_webhook")
    def test(endpoint_id: str) -> Response | str:
        def move() -> Response:
            kind = request.form.get("type", places.TEST)
            if kind not in places.TYPES:
                raise Refusal(422, "invalid", f"there is no event {kind[:60]!r}")
            sent = webhook_endpoints.send_test(deps, waker, g.caller, endpoint_id, kind)
            flash(f"A {kind} is on its way.", "ok")
            return redirect(url_for("pages.delivery", delivery_id=sent.id), 303)

        return attempt(move)

    @pages.post("/webhooks/<endpoint_id>/rotate", endpoint="rotate_webhook")
    def rotate(endpoint_id: str) -> Response | str:
        def move() -> Response | str:
            overlap = timedelta() if request.form.get("now") else places.OVERLAP
            try:
                fresh, again = webhook_endpoints.rotate(
                    deps, g.caller, endpoint_id, overlap, _form_key()
                )
            except Refusal as refusal:
                if refusal.code != "rotating":
                    raise
                words = "It was rotated lately, and both secrets are good; “It leaked” ends both."
                raise Refusal(409, refusal.code, words) from None
            if again:
                return done("The secret was rotated already; the new one was shown then.")
            return show(fresh=fresh)

        return attempt(move)

    @pages.post("/webhooks/<endpoint_id>/delete", endpoint="delete_webhook")
    def delete(endpoint_id: str) -> Response | str:
        webhook_endpoints.remove(deps, g.caller, endpoint_id)
        return done("Deleted. What was sent to it stays in the log.")

    @pages.get("/webhooks/deliveries/<delivery_id>")
    def delivery(delivery_id: str) -> str:
        found = deliveries.one(deps, g.caller, delivery_id)
        endpoint = url = None
        if found.endpoint:
            try:
                endpoint = webhook_endpoints.one(deps, g.caller, found.endpoint)
                url = endpoint.url
            except NotFound:
                pass
        elif found.job:
            try:
                with deps.store.transaction() as tx:
                    url = jobs.visible(tx, found.job, g.caller).request.webhook_url
            except NotFound:
                pass
        return render_template(
            "webhooks_delivery.html",
            delivery=found,
            endpoint=endpoint,
            url=url,
            payload=json.dumps(found.payload, indent=2, ensure_ascii=False),
        )

    @pages.post("/webhooks/deliveries/<delivery_id>/replay", endpoint="replay_delivery")
    def replay(delivery_id: str) -> Response:
        try:
            deliveries.replay(deps, waker, g.caller, delivery_id)
        except Refusal as refusal:
            flash(refusal.detail, "error")
        else:
            flash(f"{delivery_id} goes out once more, under the same webhook-id.", "ok")
        back = request.form.get("back")
        here = url_for("pages.delivery", delivery_id=delivery_id)
        return redirect(inside(back) if back else here, 303)


def _form_key() -> str | None:
    """What makes a form that is sent twice do once; a strange one is none of ours."""
    key = request.form.get("form_key", "")
    return key if plausible(key) else None


def _faults(error: ValidationError) -> dict[str, str]:
    """By the first part of the pointer."""
    return {
        f"/{item['loc'][0]}" if item["loc"] else "": item["msg"].removeprefix("Value error, ")
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    }


def _words(refusal: Refusal) -> str:
    return "; ".join(why for _, why in refusal.errors) or refusal.detail
