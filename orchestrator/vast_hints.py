"""Vast.ai's own notifications, taken as hints and as nothing more.

They come at least once, late, in any order, or never, so no lease and no job is changed by one:
a good one has the account looked at now instead of at the next tick, and where it says that a
machine of ours is about to be taken, its agent is told to save. The format is in `docs/sandbox.md`.
"""

from __future__ import annotations

import hmac
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from flask import Blueprint, Response, jsonify, request

from gpu_agent.wire import TOLERANCE, Order, SignatureError
from infra import logs
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from orchestrator.webhook import read_body
from state import record
from state.errors import IllegalMove
from state.events import Idempotent
from state.store import Transaction

_log = logs.logger(__name__)
#: After these the account is not what it was. Subscriptions name them `client:<word>`.
WAKING = frozenset(
    {
        "outbid",
        "low_credit",
        "instance_created",
        "instance_started",
        "instance_stopped",
        "instance_resumed",
        "instance_offline",
        "instance_deleted",
    }
)
#: Of many notifications at once (the credit is gone, all stop) one has the account looked at.
PAUSE = timedelta(seconds=5)
#: Under this owner the ids that came already are kept; no customer has a name like it.
SENDER = "/vast"
#: How a subject names an instance, where there is no data to do so.
_NUMBER = re.compile(r"#([1-9][0-9]{0,17})\b", re.ASCII)
_WORD = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, kw_only=True)
class Hint:
    """`kind` is the short word; `instance` is empty where the notification names none."""

    event: str
    kind: str
    instance: str

    @classmethod
    def from_bytes(cls, body: bytes) -> Hint:
        """Raises: Refusal 422."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise _unclear() from None
        if not isinstance(value, dict):
            raise _unclear()
        event, kind, data = (value.get(key) for key in ("event_id", "notif_type", "data"))
        if not isinstance(event, str) or not _WORD.fullmatch(event):
            raise _unclear()
        if not isinstance(kind, str) or not _WORD.fullmatch(kind):
            raise _unclear()
        number = data.get("instance_id") if isinstance(data, dict) else None
        named = str(number) if type(number) is int and 0 < number < 2**63 else ""
        if data is None and (found := _NUMBER.search(str(value.get("subject"))[:1000])):
            named = found[1]
        return cls(event=event, kind=kind.removeprefix("client:"), instance=named)


def _unclear() -> Refusal:
    return Refusal(422, "invalid", "the body is no notification")


def verify(body: bytes, stamp: str, signature: str, *, secret: str, now: float) -> None:
    """Check the two headers of a notification. Raises: SignatureError, for whatever garbage."""
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise SignatureError("X-Vast-Timestamp is not whole seconds since the epoch")
    if abs(now - int(stamp)) > TOLERANCE:
        raise SignatureError(f"X-Vast-Timestamp is more than {TOLERANCE} s from now")
    wanted = "sha256=" + hmac.digest(secret.encode(), f"{stamp}.".encode() + body, "sha256").hex()
    if not hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "replace")):
        raise SignatureError("the signature does not match")


def take(tx: Transaction, hint: Hint, now: datetime) -> bool:
    """Note `hint`; whether to look at the account now. One that came before does nothing."""
    row = Idempotent(owner=SENDER, key=hint.event, body_hash="", created_at=now, answer={})
    if tx.begin_idempotent(row) is not None:
        return False
    if hint.kind == "outbid" and hint.instance:
        _save_now(tx, hint.instance, now)
    tx.lock("vast.hints")
    last = tx.beats().get("vast.hint")
    if hint.kind not in WAKING or (last is not None and now - last[0] < PAUSE):
        return False
    tx.beat("vast.hint", now, {"kind": hint.kind})
    return True


def _save_now(tx: Transaction, instance: str, now: datetime) -> None:
    """Have whoever trains on `instance` write a checkpoint, while there is time."""
    for lease in tx.open_leases():
        if lease.instance_id != instance:
            continue
        job = tx.job(lease.job, lock=True)
        if job.attempt != lease.attempt:
            continue
        try:
            record.order(tx, job.id, Order.CHECKPOINT_NOW, now)
        except IllegalMove:
            continue  # it does not train, so there is nothing to save
        _log.info("an outbid machine is told to save", job=job.id, instance=instance)


def vast_hints(deps: Deps, waker: Waker) -> Blueprint:
    """`POST /vast/v1/notifications`; not part of the public description."""
    blueprint = Blueprint("vast_hints", __name__, url_prefix="/vast/v1")

    @blueprint.post("/notifications")
    def notifications() -> Response:
        secret = deps.settings.vast_webhook_secret.reveal()
        if not secret:
            raise Refusal(404, "not_found", "notifications of Vast.ai are not set up here")
        raw = read_body(request.environ)
        stamp = request.headers.get("X-Vast-Timestamp", "")
        signature = request.headers.get("X-Vast-Signature-256", "")
        verify(raw, stamp, signature, secret=secret, now=deps.clock().timestamp())
        hint = Hint.from_bytes(raw)
        with deps.store.transaction() as tx:
            look = take(tx, hint, deps.clock())
        _log.info("Vast.ai notifies", kind=hint.kind, instance=hint.instance)
        if look:
            waker("account", ["sweep"])
        return jsonify(taken=True)

    return blueprint
