"""The sandbox's other side: what its machines are in truth, what they cost, and what goes wrong.

A page and JSON below `/admin/api`, on a port of their own, for whoever runs the sandbox. It asks
for no key, so it belongs on an address that only they reach.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse

from infra.sandbox.contracts import Contract, MarketError
from infra.sandbox.faults import read_faults, told
from infra.sandbox.market import Market
from infra.sandbox.notify import Notifier

POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'"
#: What can be done to a machine by a button.
VERBS = ("outbid", "free", "lose", "regain", "crash", "abandon", "stick", "vanish")


def create_admin_app(market: Market, notifier: Notifier) -> Flask:
    """The page at `/`, and its JSON."""
    app = Flask("infra.sandbox.admin", static_folder="static", template_folder="templates")
    app.url_map.strict_slashes = False

    @app.before_request
    def own_pages_only() -> None:
        if request.method == "POST" and request.headers.get(
            "Sec-Fetch-Site", "same-origin"
        ) not in (
            "same-origin",
            "none",
        ):
            raise MarketError(403, "cross_site", "The order came from another site.")

    @app.after_request
    def locked_down(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(MarketError)
    def refused(error: MarketError) -> tuple[Response, int]:
        return jsonify(error.body), error.status

    @app.errorhandler(HTTPException)
    def wrong(error: HTTPException) -> tuple[Response, int]:
        body = {"success": False, "error": error.name, "msg": error.description}
        return jsonify(body), error.code or 500

    @app.get("/")
    def page() -> str:
        return render_template(
            "admin.html", **overview(market, notifier), verbs=VERBS, said=request.args.get("said")
        )

    @app.get("/admin/api/")
    def everything() -> Response:
        return jsonify(overview(market, notifier))

    @app.get("/admin/api/machines/")
    def machines() -> Response:
        return jsonify(overview(market, notifier)["machines"])

    @app.get("/admin/api/ledger/")
    def ledger() -> Response:
        return jsonify(overview(market, notifier)["ledger"])

    @app.get("/admin/api/faults/")
    def faults() -> Response:
        return jsonify(overview(market, notifier)["faults"])

    @app.post("/admin/api/faults/")
    def add_fault() -> BaseResponse:
        try:
            item = json.loads(request.form["fault"]) if request.form else _given()
            (fault,) = read_faults(json.dumps([item]))
        except (ValueError, KeyError) as error:
            raise MarketError(400, "invalid_fault", str(error)) from None
        market.faults.add(fault)
        return _done(f"planned: {fault.kind}")

    @app.post("/admin/api/credit/")
    def credit() -> BaseResponse:
        market.credit = _number("credit")
        return _done(f"the credit is {market.credit:.2f}")

    @app.post("/admin/api/notifications/test/")
    def test_notification() -> BaseResponse:
        notifier("webhook_test")
        return _done("a test notification is on its way")

    @app.post("/admin/api/machines/<int:number>/<verb>/")
    def act(number: int, verb: str) -> BaseResponse:
        verbs: dict[str, Callable[[], object]] = {
            "outbid": lambda: market.outbid(
                number,
                _number("price") if "price" in _given() else math.inf,
                seconds=_number("seconds") if "seconds" in _given() else None,
            ),
            "free": lambda: market.rival_leaves(market.need(number).host.machine_id),
            "lose": lambda: market.lose(number),
            "regain": lambda: market.regain(number),
            "crash": lambda: market.crash(number),
            "abandon": lambda: market.abandon(number),
            "stick": lambda: market.stick(number),
            "vanish": lambda: market.vanish(number),
            "charge": lambda: market.charge(number, str(_given().get("kind")), _number("gb")),
        }
        if verb not in verbs:
            raise MarketError(404, "no_such_verb", f"one of {', '.join(verbs)}")
        verbs[verb]()
        return _done(f"{verb}: {number}")

    return app


def overview(market: Market, notifier: Notifier) -> dict[str, Any]:
    """All that the page shows, as JSON."""
    with market.lock:
        now = market.now()
        alive, ended = list(market.contracts.values()), market.ended[-100:]
        return {
            "now": round(now, 3),
            "time_scale": market.time_scale,
            "machines": [
                *(_machine(item, now, "live") for item in alive),
                *(_machine(item, now, "stray") for item in market.strays.values()),
            ],
            "ledger": {
                "credit": market.credit,
                "total": market.ledger.total,
                "contracts": [
                    {"contract": item.id, "label": item.label, **item.charges, "total": item.cost}
                    for item in (*ended, *alive)
                ],
            },
            "rivals": {
                str(machine): None if price == math.inf else price
                for machine, price in market.rivals.items()
            },
            "faults": {
                "planned": [told(fault) for fault in market.faults.plan],
                "fired": market.faults.fired,
            },
            "notifications": notifier.sent,
        }


def _machine(contract: Contract, now: float, where: str) -> dict[str, Any]:
    return {
        "contract": contract.id,
        "machine": contract.host.machine_id,
        "gpu": contract.host.gpu_name,
        "truth": contract.truth.gpu_name,
        "label": contract.label,
        "where": where,
        "actual_status": contract.actual,
        "intended_status": contract.intended,
        "cur_state": contract.current,
        "next_state": contract.following,
        "status_msg": contract.message,
        "price": contract.gpu_price,
        "is_bid": contract.is_bid,
        "outbid": contract.outbid,
        "struck": sorted(contract.struck),
        "age_s": round(now - contract.created_at, 1),
        "cost": contract.cost,
    }


def _given() -> dict[str, Any]:
    """What the form or the JSON says; empty fields are left out."""
    read = request.get_json(silent=True)
    given = read if isinstance(read, dict) else request.form.to_dict()
    return {key: value for key, value in given.items() if value != ""}


def _number(name: str) -> float:
    """Raises: MarketError (400)."""
    try:
        value = float(_given()[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise MarketError(400, "invalid_args", f"{name} must be a number")
    return value


def _done(said: str) -> BaseResponse:
    """Back to the page for a form, else JSON."""
    if request.form or "text/html" in request.headers.get("Accept", ""):
        return redirect(url_for("page", said=said), 303)
    return jsonify({"success": True, "msg": said})
