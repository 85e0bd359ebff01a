"""API keys: `Authorization: Bearer stk_live_…`, kept as SHA-256, with scopes.

A test key (`stk_test_…`) acts for an owner of its own, `acme~test` beside `acme`: so whatever it
makes is seen by test keys of the same owner, by operators, and by nobody else; and what is real is
out of its sight. This is decided here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flask import g, request

from orchestrator.api import limits
from orchestrator.api.keys import TEST_OWNER, TEST_PREFIX, hash_of, is_test
from orchestrator.api.problems import Refusal
from state.store import Store

READ, WRITE, OPERATOR = "jobs:read", "jobs:write", "operator"
_BEARER = re.compile(r"bearer +(stk_(?:live|test)_[A-Za-z0-9_-]{16,128})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks, by which key (its id). An operator has every scope and sees every owner's
    things; a test key is never one."""

    owner: str
    scopes: frozenset[str]
    key: str = ""

    @property
    def operator(self) -> bool:
        return OPERATOR in self.scopes

    @property
    def test(self) -> bool:
        """Whether it asks with a test key."""
        return is_test(self.owner)

    def may(self, scope: str) -> bool:
        return self.operator or scope in self.scopes

    def sees(self, owner: str) -> bool:
        return self.operator or owner == self.owner


def authenticate(store: Store, header: str) -> Caller:
    """The caller behind an `Authorization` header.

    Raises:
        Refusal: 401, with the same words for every unknown, malformed or revoked key.
    """
    found = _BEARER.fullmatch(header.strip())
    if found is not None:
        with store.transaction() as tx:
            key = tx.api_key_by_hash(hash_of(found[1]))
        if key is not None and key.revoked_at is None:
            if found[1].startswith(TEST_PREFIX):
                scopes = key.scopes - {OPERATOR}
                return Caller(owner=key.owner + TEST_OWNER, scopes=scopes, key=key.id)
            return Caller(owner=key.owner, scopes=key.scopes, key=key.id)
    raise Refusal(
        401, "unauthorized", "send Authorization: Bearer with an API key that is not revoked"
    )


def admit(store: Store) -> None:
    """Before each request of `/v1`: GET needs `jobs:read`, everything else `jobs:write`.

    Raises:
        Refusal: 401, 403 or 429.
    """
    caller = authenticate(store, request.headers.get("Authorization", ""))
    limits.count(caller.key)
    scope = READ if request.method in ("GET", "HEAD") else WRITE
    if not caller.may(scope):
        raise Refusal(403, "forbidden", f"this key lacks the scope {scope}")
    g.caller = caller


def admit_operator(store: Store) -> None:
    """As `admit`, for what only operators may see and do. Raises: Refusal 401 or 403."""
    admit(store)
    if not caller().operator:
        raise Refusal(403, "forbidden", f"this key lacks the scope {OPERATOR}")


def caller() -> Caller:
    """Who asks, after `admit`."""
    known: Caller = g.caller
    return known
