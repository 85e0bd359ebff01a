"""`Idempotency-Key`: the same request twice does once.

The key's row, what the request does and the stored answer commit together. So a second request
with the same key waits for the first's transaction and then finds its answer, and a process that
dies in between leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from orchestrator.api.problems import Refusal
from state.events import Idempotent
from state.store import Transaction


def begin(
    tx: Transaction, owner: str, key: str, body: object, now: datetime
) -> Mapping[str, Any] | None:
    """None when this request is the first with `key`; else the answer stored for it.

    Raises:
        Refusal: 422 the first request had another body; 409 it is still under way.
    """
    text = json.dumps(body, sort_keys=True)
    row = Idempotent(
        owner=owner,
        key=key,
        body_hash=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        created_at=now,
    )
    stored = tx.begin_idempotent(row)
    if stored is None:
        return None
    if stored.body_hash != row.body_hash:
        raise Refusal(
            422, "idempotency_key_reused", "this Idempotency-Key came with another body before"
        )
    if stored.answer is None:
        raise Refusal(
            409,
            "idempotency_in_flight",
            "the first request with this Idempotency-Key is still under way",
            headers={"Retry-After": "1"},
            retryable=True,
        )
    return stored.answer
