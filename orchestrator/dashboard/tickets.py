"""A link that logs in: good once and for two minutes, for whoever runs everything on one machine.

Only who knows one of STOKER_SECRET_KEYS can make one. It names an operator's key by its hash, and
says nothing to others: the key is in no link, no process list and no browser's history.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC
from urllib.parse import quote

from itsdangerous import BadData, URLSafeTimedSerializer

from orchestrator.deps import Deps
from state.events import Idempotent, Secret

#: Seconds between making a link and following it.
GOOD_S = 120
#: Whose idempotency keys remember which tickets were used; no customer is called so.
_OWNER = "\N{SECTION SIGN}login"


def issue(keys: Sequence[Secret], key_hash: str, where: str = "/") -> str:
    """The path that logs in with the API key of that hash, and leads to `where`."""
    ticket = _signer(keys[:1]).dumps([key_hash, secrets.token_hex(16)])
    return f"/login?next={quote(where)}&ticket={ticket!s}"


def redeem(deps: Deps, ticket: str) -> str | None:
    """The hash of the API key that `ticket` logs in with; None when it is none, old or used."""
    keys, now = deps.settings.secret_keys, deps.clock()
    if not keys or len(ticket) > 500:
        return None
    try:
        (key_hash, number), made = _signer(keys).loads(ticket, return_timestamp=True)
    except (BadData, ValueError, TypeError):
        return None
    age = (now - made.astimezone(UTC)).total_seconds()
    if not -GOOD_S <= age <= GOOD_S:
        return None
    used = Idempotent(owner=_OWNER, key=str(number), body_hash="", created_at=now)
    with deps.store.transaction() as tx:
        return None if tx.begin_idempotent(used) is not None else str(key_hash)


def _signer(keys: Sequence[Secret]) -> URLSafeTimedSerializer:
    derived = [
        hmac.new(key.reveal().encode(), b"stoker login ticket", hashlib.sha256).digest()
        for key in reversed(keys)  # it wants the newest last
    ]
    return URLSafeTimedSerializer(derived, salt="login")
