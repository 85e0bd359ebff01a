"""Is every part there? One list, for `/readyz` and for `stoker doctor`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import timedelta

import redis

from infra.wiring import Services
from state.events import Secret

Check = Callable[[], str | None]
#: A worker or beat unheard for so long is down.
STALE = timedelta(seconds=30)


def ready_checks(have: Services) -> Mapping[str, Check]:
    """By part: None when it is well, else what is wrong."""
    return {
        "database": lambda: _database(have),
        "redis": lambda: _redis(have),
        "s3": lambda: _storage(have),
        "worker": lambda: _heard(have, "worker"),
        "beat": lambda: _heard(have, "reconcile"),
    }


def _database(have: Services) -> str | None:
    with have.store.transaction() as tx:
        tx.beats()
    return None


def _redis(have: Services) -> str | None:
    url = have.settings.redis_url.reveal()
    with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
        try:
            client.ping()
        except redis.AuthenticationError:
            return "Redis refuses the password"
        except redis.RedisError as error:
            return f"Redis does not answer ({type(error).__name__})"
    return None


def _storage(have: Services) -> str | None:
    have.storage.check()
    return None


def _heard(have: Services, name: str) -> str | None:
    with have.store.transaction() as tx:
        beats = tx.beats()
    if name not in beats:
        return "was never heard of; is `stoker worker` and `stoker beat` running?"
    age = have.clock() - beats[name][0]
    return f"was last heard {age.total_seconds():.0f} s ago" if age > STALE else None


def proof(key: Secret, challenge: str) -> str:
    """What shows whoever knows `key`, one of STOKER_SECRET_KEYS, that the answer comes from an
    installation that knows it too; to others it says nothing."""
    mine = hmac.new(key.reveal().encode(), b"stoker doctor", hashlib.sha256).digest()
    return hmac.new(mine, challenge.encode(), hashlib.sha256).hexdigest()
