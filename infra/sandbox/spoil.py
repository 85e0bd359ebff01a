"""The layer between clients and the market in which calls go wrong, and its rate limits.

Both are WSGI layers around the sandbox's app: the market itself knows nothing of what is lost or
garbled on the way, and is asked only where a fault is in what the service does.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from werkzeug.test import run_wsgi_app
from werkzeug.wrappers import Response

from infra.sandbox.contracts import MarketError, no_such_ask
from infra.sandbox.faults import Fault, Faults, operation
from infra.sandbox.market import Market

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Market seconds between two calls that Vast documents.
THRESHOLDS = {
    "search": 6.0,
    "create": 4.5,
    "show": 2.0,
    "list": 1.0,
    "manage": 1.0,
    "reboot": 1.0,
    "destroy": 3.0,
    "bid": 5.5,
    "execute": 1.5,
    "charges": 1.0,
}
#: What a refused create adds to its distance.
CREATE_PENALTY_S = 12.0
#: Of these the client's call always has its effect.
LATE = frozenset(
    {"delay", "truncate", "no_id", "read_lag", "never_ready", "price_change", "missing_row"}
    | {"doubled_row", "half_page", "stale_page", "statusless", "null_fields", "null_start_date"}
    | {"null_row"}
)
MAX_PAGES_KEPT = 100
STATUS_KEYS = ("actual_status", "intended_status", "cur_state", "next_state", "status_msg")
#: What Vast was seen to leave null, or may.
NULLABLE = (
    "label",
    "status_msg",
    "machine_id",
    "dph_total",
    "gpu_name",
    "cur_state",
    "uptime_mins",
)
REFUSALS = {
    "insufficient_credit": "Your account lacks credit; see the billing page.",
    "spend_rate_limit": "New accounts may spend only so much per hour.",
}


class FaultLayer:
    """Lets `faults` befall the calls of `app`."""

    def __init__(
        self,
        app: WSGIApplication,
        market: Market,
        faults: Faults,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._app, self._market, self._faults, self._sleep = app, market, faults, sleep
        #: What the last list calls answered, by query: for pages that are stale or doubled.
        self._before: dict[str, dict[str, Any]] = {}
        self._last_row: dict[str, Any] | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        op, named = operation(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        machine = self._market.machine_of(op, named)
        fault = self._faults.due(op, machine) if op else None
        if fault is None:
            if op != "list":
                return self._app(environ, start_response)
            answer = self._ask(environ)
            self._remember(environ, answer)
            return answer(environ, start_response)
        at = round(self._market.now(), 3)
        self._faults.note(fault, at=at, op=op, machine=machine, contract=named)
        return self._befall(fault, op, named, environ)(environ, start_response)

    def _befall(
        self, fault: Fault, op: str, named: int | None, environ: WSGIEnvironment
    ) -> Response:
        """What the client gets instead."""
        try:
            if fault.kind == "no_such_ask" and named is not None:
                self._market.take(named)
                raise no_such_ask(named, fault.answered)
            if fault.kind == "lingers" and named is not None:
                self._market.linger(named, fault.seconds)
                return _json({"success": True, "msg": "Instance destroyed successfully"})
        except MarketError as error:
            return _json(error.body, error.status)
        if fault.kind == "ignored":
            return _json({"success": True})
        if not fault.after and fault.kind not in LATE:
            return self._instead(fault, environ)
        answer = self._ask(environ)
        if fault.kind in ("delay", "truncate", "no_id", "never_ready", "price_change"):
            return self._late(fault, answer, environ)
        if op in ("list", "show") and fault.kind in LATE:
            return self._rows(fault, op, answer, environ)
        return self._instead(fault, environ, answer)

    def _instead(
        self, fault: Fault, environ: WSGIEnvironment, answer: Response | None = None
    ) -> Response:
        """An answer of another kind; `answer` is the one to a call that had its effect."""
        kind = fault.kind
        if kind == "drop":
            connection = environ.get("werkzeug.socket")
            if isinstance(connection, socket.socket):
                connection.shutdown(socket.SHUT_RDWR)
            return Response(status=500)
        if kind == "html":
            return Response("<html><body>Please try again later</body></html>", 200)
        if kind == "empty":
            return Response("", 200, mimetype="application/json")
        if kind == "throttle":
            return throttled(fault.shape, 2.0)
        if kind == "auth":
            return _json(_no("auth_error", "Invalid user key"), fault.answered)
        if kind in REFUSALS:
            return _json(_no(kind, REFUSALS[kind]), 400)
        if kind == "deprecated":
            words = "/api/v1/instances/ is deprecated. Use /api/v2/instances/ instead."
            return _json(_no("deprecated_endpoint", words), 410)
        if kind == "refuse":
            return self._refusal(fault, answer)
        return _json(fault.body, fault.answered) if fault.body is not None else _bare(fault)

    def _refusal(self, fault: Fault, answer: Response | None) -> Response:
        """`success: false`; of a create that had its effect, with the id of what was made."""
        body = _no("invalid_args", "error 400/3467: Invalid args: the request was not carried out")
        made = _read(answer).get("new_contract") if answer is not None else None
        if isinstance(made, int):
            self._market.refuse(made)
            body["new_contract"] = made
        return _json(body, fault.answered)

    def _late(self, fault: Fault, answer: Response, environ: WSGIEnvironment) -> Response:
        body = _read(answer)
        if fault.kind == "delay":
            self._sleep(fault.seconds)
        elif fault.kind == "truncate":
            data = answer.get_data()
            return Response(data[: len(data) // 2], answer.status, mimetype="application/json")
        elif fault.kind == "no_id" and "new_contract" in body:
            return _json({"success": True})
        elif fault.kind == "never_ready" and "result_url" in body:
            nowhere = f"instance_logs/{secrets.token_hex(32)}.log"
            url = re.sub(r"instance_logs/.*", nowhere, str(body["result_url"]))
            return _json({**body, "result_url": url})
        elif fault.kind == "price_change":
            for offer in body.get("offers", ()):
                if fault.machine in (None, offer["machine_id"]):
                    self._market.reprice(offer["machine_id"], fault.factor)
        return answer

    def _rows(self, fault: Fault, op: str, answer: Response, environ: WSGIEnvironment) -> Response:
        """A list or a record that is not as it should be."""
        body = _read(answer)
        if op == "show":
            row = body.get("instances")
            if isinstance(row, dict):
                old = self._older(fault, row)
                body["instances"] = _spoilt(fault.kind, row) if old else None
            return _json(body, answer.status_code)
        rows = body.get("instances")
        if not isinstance(rows, list):
            return answer
        if fault.kind == "stale_page":
            body = self._before.get(environ.get("QUERY_STRING", ""), body)
        elif fault.kind == "half_page":
            body |= {"instances": rows[: len(rows) // 2], "next_token": None}
        elif fault.kind == "doubled_row":
            twice = self._last_row if "after_token" in environ.get("QUERY_STRING", "") else None
            body["instances"] = [*([twice] if twice else rows[-1:]), *rows]
        elif fault.kind in ("missing_row", "read_lag"):
            gone = [row for row in rows if not self._older(fault, row)]
            if fault.kind == "missing_row":
                gone = [row for row in rows if _is_of(fault, row)][-1:]
            body["instances"] = [row for row in rows if row not in gone]
            body["instances_found"] -= len(gone)
            body["total_instances"] -= len(gone)
        else:
            chosen = [row for row in rows if _is_of(fault, row)][-1:]
            body["instances"] = [_spoilt(fault.kind, row) if row in chosen else row for row in rows]
        self._last_row = rows[-1] if rows else None
        return _json(body, answer.status_code)

    def _older(self, fault: Fault, row: dict[str, Any]) -> bool:
        """Whether reads show it, with the lag of this fault."""
        contract = self._market.contracts.get(row["id"])
        if fault.kind != "read_lag" or contract is None:
            return True
        return self._market.now() - contract.created_at >= fault.seconds

    def _ask(self, environ: WSGIEnvironment) -> Response:
        body, status, headers = run_wsgi_app(self._app, environ, buffered=True)
        return Response(b"".join(body), status, headers)

    def _remember(self, environ: WSGIEnvironment, answer: Response) -> None:
        body = _read(answer)
        rows = body.get("instances")
        if isinstance(rows, list):
            for old in list(self._before)[:-MAX_PAGES_KEPT]:
                del self._before[old]
            self._before[environ.get("QUERY_STRING", "")] = body
            self._last_row = rows[-1] if rows else None


class LimitLayer:
    """Vast's minimum distance between calls, per operation and key; refused in three shapes."""

    def __init__(self, app: WSGIApplication, now: Callable[[], float]) -> None:
        self._app, self._now = app, now
        self._free_at: dict[tuple[str, str], float] = {}
        self._refused = 0
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        op, _ = operation(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        threshold = THRESHOLDS.get(op, 0.0)
        who = (op, environ.get("HTTP_AUTHORIZATION", ""))
        with self._lock:
            now = self._now()
            early = now < self._free_at.get(who, 0.0)
            if not early:
                self._free_at[who] = now + threshold
            elif op == "create":
                self._free_at[who] = now + threshold + CREATE_PENALTY_S
            self._refused += early
            shape = ("text", "detail", "json")[self._refused % 3]
        if early:
            return throttled(shape, threshold)(environ, start_response)
        return self._app(environ, start_response)


def throttled(shape: str, threshold: float) -> Response:
    """A 429 in one of the shapes that were seen."""
    words = f"API requests too frequent endpoint threshold={threshold}"
    if shape == "text":
        text = f"API requests too frequent: endpoint threshold={threshold}"
        return Response(text, 429, mimetype="text/plain")
    return _json({"detail": words} if shape == "detail" else _no("rate_limit_exceeded", words), 429)


def _is_of(fault: Fault, row: dict[str, Any]) -> bool:
    return fault.machine in (None, row["machine_id"])


def _spoilt(kind: str, row: dict[str, Any]) -> dict[str, Any] | None:
    if kind == "statusless":
        return {key: value for key, value in row.items() if key not in STATUS_KEYS}
    if kind == "null_fields":
        return row | dict.fromkeys(NULLABLE)
    if kind == "null_start_date":
        return row | {"start_date": None}
    return None if kind == "null_row" else row


def _no(error: str, msg: str) -> dict[str, Any]:
    return {"success": False, "error": error, "msg": msg}


def _bare(fault: Fault) -> Response:
    return Response("", fault.answered, mimetype="application/json")


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


def _read(answer: Response) -> dict[str, Any]:
    try:
        read = json.loads(answer.get_data())
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
