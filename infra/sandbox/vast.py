"""Vast's REST over a `Market`."""

from __future__ import annotations

import hmac
import json
import secrets
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, request

from infra.sandbox.contracts import Contract, MarketError
from infra.sandbox.market import Market
from infra.sandbox.notify import USER_ID

#: How often a log's address answers 404 before the upload is there.
LOG_MISSES = 2
#: Older ones can no longer be fetched.
MAX_UPLOADS = 100
#: What `execute` runs, and how long it may be.
COMMANDS, MAX_COMMAND, COMMAND_S = ("ls", "rm", "du"), 512, 10.0


def vast_blueprint(market: Market, account_key: str) -> Blueprint:
    """The routes below `/api`, and `/instance_logs` where logs are fetched from."""
    api = Blueprint("vast", __name__)
    uploads: dict[str, tuple[list[int], str]] = {}
    keys: list[dict[str, Any]] = []

    def authorise(number: int | None = None) -> None:
        """The account's key may do all; an instance's key only what concerns itself.

        Raises: MarketError (401, 403).
        """
        key = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not key:
            key = request.args.get("api_key", "")
        if account_key and hmac.compare_digest(key.encode(), account_key.encode()):
            return
        owner = next(
            (
                contract.id
                for contract in list(market.contracts.values())
                if hmac.compare_digest(contract.key.encode(), key.encode())
            ),
            None,
        )
        if owner is None:
            raise MarketError(401, "auth_error", "Invalid user key")
        if owner != number:
            raise MarketError(403, "not_authorized", "This key is for its own instance only")
        weak = "weak_key" in market.contracts[number].struck
        if weak and request.method == "DELETE":
            raise MarketError(403, "not_authorized", "This key may not destroy instances")

    @api.errorhandler(MarketError)
    def refused(error: MarketError) -> tuple[Response, int]:
        return jsonify(error.body), error.status

    def upload(text: str) -> str:
        """Where `text` can be fetched, after a while."""
        name = secrets.token_hex(32)
        for old in list(uploads)[:-MAX_UPLOADS]:
            del uploads[old]
        uploads[name] = ([LOG_MISSES], text)
        return f"{request.host_url}instance_logs/{name}.log"

    def answer(**fields: Any) -> Response:
        return jsonify({"success": True, **fields})

    # offers

    @api.post("/api/v0/bundles/")
    def bundles() -> Response:
        authorise()
        return jsonify({"offers": market.search(_body())})

    @api.put("/api/v0/search/asks/")
    def search_asks() -> Response:
        authorise()
        query = _body().get("q")
        return jsonify({"offers": market.search(query if isinstance(query, dict) else {})})

    @api.put("/api/v0/asks/<int:ask>/")
    def create(ask: int) -> Response:
        authorise()
        contract = market.create(ask, _body())
        return answer(new_contract=contract.id, instance_api_key=contract.key)

    # instances

    @api.get("/api/v1/instances/")
    def instances() -> Response:
        authorise()
        args = request.args
        filters = _query(args.get("select_filters"), {})
        order = _query(args.get("order_by"), [])
        limit = args.get("limit", 25, type=int)
        return jsonify(market.page(filters, order, limit, args.get("after_token")))

    @api.get("/api/v0/instances/")
    def dead_list() -> Response:
        authorise()
        msg = "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead."
        raise MarketError(410, "deprecated_endpoint", msg)

    @api.get("/api/v0/instances/<int:number>/")
    def show(number: int) -> Response:
        authorise(number)
        contract = market.get(number)
        return jsonify({"instances": None if contract is None else market.row(contract)})

    @api.put("/api/v0/instances/<int:number>/")
    def manage(number: int) -> Response:
        authorise(number)
        return _manage(market, number, _body(), answer)

    @api.put("/api/v0/instances/")
    def manage_many() -> Response:
        authorise()
        body = _body()
        for number in _numbers(body.get("ids")):
            _manage(market, number, body, answer)
        return answer()

    @api.delete("/api/v0/instances/<int:number>/")
    def destroy(number: int) -> Response:
        authorise(number)
        market.destroy(number)
        return answer(msg="Instance destroyed successfully")

    @api.delete("/api/v0/instances/")
    def destroy_many() -> Response:
        authorise()
        for number in _numbers(_body().get("instance_ids")):
            market.destroy(number)
        return answer()

    @api.put("/api/v0/instances/bid_price/<int:number>/")
    def bid(number: int) -> Response:
        authorise()
        price = _body().get("price")
        if not isinstance(price, int | float):
            raise MarketError(400, "invalid_price", "price is required")
        market.bid(number, float(price))
        return answer()

    @api.put("/api/v0/instances/reboot/<int:number>/")
    def reboot(number: int) -> Response:
        authorise(number)
        market.reboot(number)
        return answer()

    @api.put("/api/v0/instances/recycle/<int:number>/")
    def recycle(number: int) -> Response:
        authorise(number)
        market.reboot(number, recycle=True)
        return answer()

    @api.put("/api/v0/instances/request_logs/<int:number>/")
    def request_logs(number: int) -> Response:
        authorise()
        contract = market.get(number)
        if contract is None:
            raise MarketError(404, "invalid_id", f"Instance {number} not found.")
        url = upload(_log(market, contract, _body()))
        return answer(result_url=url, msg="Requested logs")

    @api.get("/instance_logs/<name>.log")
    def uploaded(name: str) -> Response:
        misses, text = uploads.get(name, ([1], ""))
        if misses[0] > 0:
            misses[0] -= 1
            return Response("<Error><Code>AccessDenied</Code></Error>", 403)
        return Response(text, mimetype="text/plain")

    @api.put("/api/v0/instances/command/<int:number>/")
    def execute(number: int) -> Response:
        authorise()
        market.need(number)
        home = market.machines.directory(str(number))
        url = upload(_run(home, str(_body().get("command") or "")))
        return answer(result_url=url, writeable_path=f"{home}/", msg="Command requested")

    @api.post("/api/v0/instances/<int:number>/ssh/")
    def attach_ssh(number: int) -> Response:
        authorise()
        market.need(number)
        return answer(msg="SSH key added to instance.")

    # account

    @api.get("/api/v0/users/current/")
    def user() -> Response:
        authorise()
        balance = {"credit": market.credit, "balance": 0.0, "ssh_key": None}
        who = {"id": USER_ID, "username": "sandbox", "email": "sandbox@example.com"}
        return jsonify({**who, **balance})

    @api.get("/api/v0/charges/")
    def charges() -> Response:
        authorise()
        args = request.args
        filters = _query(args.get("select_filters"), {})
        limit = args.get("limit", 25, type=int)
        return jsonify(market.bill(filters, limit, args.get("after_token")))

    @api.get("/api/v0/ssh/")
    def ssh_keys() -> tuple[Response, int]:
        authorise()
        if not keys:
            raise MarketError(404, "not_found", "No SSH keys found.")
        return jsonify(keys), 200

    @api.post("/api/v0/ssh/")
    def add_ssh_key() -> Response:
        authorise()
        key = {"id": len(keys) + 1, "user_id": USER_ID, "public_key": _body().get("ssh_key")}
        keys.append(key | {"created_at": market.date(market.now()), "deleted_at": None})
        return answer(key=keys[-1])

    @api.get("/api/v0/secrets/")
    def account_secrets() -> Response:
        authorise()
        return answer(secrets=dict.fromkeys(market.secrets, "*****"))

    @api.post("/api/v0/secrets/")
    def add_secret() -> Response:
        authorise()
        body = _body()
        market.secrets[str(body.get("key"))] = str(body.get("value"))
        return answer(msg="Environment variable created")

    return api


def _manage(market: Market, number: int, body: Mapping[str, Any], answer: Any) -> Response:
    state, label = body.get("state"), body.get("label")
    market.need(number)
    reply: Response = answer()
    if isinstance(label, str):
        market.label(number, label)
        reply = answer(msg=f"label for {number} set to '{label}'")
    if state == "stopped":
        market.stop(number)
    elif state == "running":
        market.start(number)
    elif state is not None:
        raise MarketError(400, "invalid_args", "state must be running or stopped")
    return reply


def _log(market: Market, contract: Contract, body: Mapping[str, Any]) -> str:
    """What the container (or, for `daemon_logs`, its host) printed: the tail that was asked for."""
    if body.get("daemon_logs") == "true":
        text = f"{contract.image}: {contract.message or 'waiting'}\n"
    else:
        text = market.machines.log(str(contract.id))
    lines = [line for line in text.splitlines() if str(body.get("filter") or "") in line]
    tail = str(body.get("tail") or "1000")
    return "\n".join(lines[-int(tail) :] if tail.isdigit() and int(tail) else lines) + "\n"


def _run(home: Path, command: str) -> str:
    """What one of the few commands that Vast runs prints, in a machine's own directory.

    Raises: MarketError (400).
    """
    try:
        program, *words = shlex.split(command)
    except ValueError:
        program, words = "", []
    if program not in COMMANDS or len(command) > MAX_COMMAND:
        raise MarketError(400, "invalid_args", f"only {', '.join(COMMANDS)} are allowed")
    argv = [program]
    for word in words:
        path = (home / word.lstrip("/")).resolve()
        if not word.startswith("-") and not path.is_relative_to(home.resolve()):
            raise MarketError(400, "invalid_args", f"{word} is outside")
        argv.append(word if word.startswith("-") else str(path))
    try:
        done = subprocess.run(argv, cwd=home, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}\n"
    return done.stdout + done.stderr


def _body() -> dict[str, Any]:
    """The JSON object of the request. Raises: MarketError (400)."""
    try:
        read = json.loads(request.get_data() or b"{}")
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise MarketError(400, "invalid_request", "Invalid json body")
    return read


def _query(text: str | None, empty: Any) -> Any:
    """A query argument that is JSON of the same kind as `empty`. Raises: MarketError (400)."""
    try:
        read = json.loads(text) if text else empty
    except ValueError:
        read = None
    if not isinstance(read, type(empty)):
        raise MarketError(400, "invalid_request", "Error in query parameters")
    return read


def _numbers(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(isinstance(number, int) for number in ids):
        raise MarketError(400, "invalid_args", "a list of instance ids is required")
    return ids
