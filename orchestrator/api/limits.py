"""How often somebody may ask: so many requests within any minute, counted for each API key.

Redis counts, so that all web processes count together. It is no part of what the API needs to
answer: while it does not answer, nobody is limited, and no request waits for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flask import Flask, Response, current_app, g, request
from limits.errors import ConfigurationError, StorageError
from limits.storage import RedisStorage
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra import logs
from infra.settings import Settings
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps

#: Seconds of a window.
WINDOW = 60
#: Seconds that an answer of Redis is waited for, before it counts as gone; and between two looks
#: whether it is back.
PATIENCE, AGAIN = 0.05, 2.0
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_EXTENSION = "stoker.limits"
_log = logs.logger(__name__)
T = TypeVar("T")


class Counter(Protocol):
    """Counts within moving windows. Seconds of the clock that it counts by."""

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count one more under `key`, unless there are `limit` within `expiry` seconds."""

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest that counts was counted, and how many count."""


class HereCounter:
    """Counts in this process: for one alone, and for tests."""

    #: So many keys are looked through for those that nobody uses any more.
    MANY = 10_000

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._entries: dict[str, deque[float]] = {}

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        with self._lock:
            entries = self._live(key, expiry)
            if len(entries) + amount > limit:
                return False
            if key not in self._entries and len(self._entries) >= self.MANY:
                self._entries = {
                    name: left for name in list(self._entries) if (left := self._live(name, expiry))
                }
            entries.extend([self._clock()] * amount)
            self._entries[key] = entries
            return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        with self._lock:
            entries = self._live(key, expiry)
            return (entries[0] if entries else self._clock()), min(len(entries), limit)

    def _live(self, key: str, expiry: int) -> deque[float]:
        entries, since = self._entries.get(key, deque()), self._clock() - expiry
        while entries and entries[0] <= since:
            entries.popleft()
        return entries


class Circuit:
    """Asks what may be gone. Once it was, nobody asks it before it answers a look at it: a thread
    of its own looks, so that no request waits for names or connections."""

    def __init__(self, is_well: Callable[[], bool]) -> None:
        self._is_well, self._lock = is_well, threading.Lock()
        self._well, self._thread = False, threading.Thread()

    def __call__(self, ask: Callable[[], T]) -> T | None:
        """The answer; None while there is none to be had."""
        if self._well:
            try:
                return ask()
            except StorageError as error:
                self._well = False
                _log.warning("nobody is limited: Redis does not answer", error=str(error))
        with self._lock:
            # At the first need, not before: the server may fork in between.
            if not self._well and not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="limits", daemon=True)
                self._thread.start()
        return None

    def _look(self) -> None:
        while not self._is_well():
            time.sleep(AGAIN)
        self._well = True


@dataclass(frozen=True)
class Left:
    """What remains of a quota: requests, and seconds until one more may be made."""

    name: str
    per_minute: int
    remaining: int
    reset_s: int
    refused: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """As in draft-ietf-httpapi-ratelimit-headers."""
        return {
            "RateLimit-Policy": f'"{self.name}";q={self.per_minute};w={WINDOW}',
            "RateLimit": f'"{self.name}";r={self.remaining};t={self.reset_s}',
        }


class Limits:
    """Quotas by name and minute; 0 is none."""

    def __init__(
        self,
        settings: Settings,
        counter: Counter,
        clock: Callable[[], float],
        circuit: Callable[[Callable[[], Left]], Left | None] = lambda ask: ask(),
    ) -> None:
        self._counter, self._clock, self._circuit = counter, clock, circuit
        self._quotas = {
            "reads": settings.rate_reads,
            "writes": settings.rate_writes,
            "logins": settings.rate_logins,
        }

    def take(self, name: str, who: str) -> Left | None:
        """Count one request of `who`, if it may be made; None where nobody counts."""
        return self._ask(name, who, take=True)

    def look(self, name: str, who: str) -> Left | None:
        """What `who` has left, without counting."""
        return self._ask(name, who, take=False)

    def _ask(self, name: str, who: str, *, take: bool) -> Left | None:
        most = self._quotas[name]
        if not most:
            return None

        def ask() -> Left:
            key = f"{name}/{who}"
            taken = self._counter.acquire_entry(key, most, WINDOW) if take else None
            oldest, count = self._counter.get_moving_window(key, most, WINDOW)
            reset = max(1, math.ceil(oldest + WINDOW - self._clock()))
            refused = count >= most if taken is None else not taken
            return Left(name, most, 0 if refused else most - count, reset, refused)

        return self._circuit(ask)


def of_settings(settings: Settings, clock: Callable[[], float]) -> Limits:
    """Counted by Redis, where the settings name one; else in this process, by `clock`."""
    url = settings.redis_url.reveal()
    if not url:
        return Limits(settings, HereCounter(clock), clock)
    try:
        storage = RedisStorage(
            url,
            key_prefix=f"stoker/{settings.deployment}/rate",
            wrap_exceptions=True,
            socket_timeout=PATIENCE,
            socket_connect_timeout=PATIENCE,
            retry=Retry(NoBackoff(), 0),  # type: ignore[arg-type]  # handed on to Redis as it is
        )
    except (ConfigurationError, ValueError):
        # its text would tell the address, and the password in it
        _log.warning("nobody is limited: REDIS_URL is none that can count")
        return Limits(settings, HereCounter(clock), clock, circuit=lambda ask: None)
    return Limits(settings, storage, time.time, Circuit(storage.check))


def install(app: Flask, deps: Deps) -> None:
    """Let `app` count requests, and say on every answer what remains."""
    app.extensions[_EXTENSION] = of_settings(deps.settings, lambda: deps.clock().timestamp())

    @app.after_request
    def tell(response: Response) -> Response:
        left: Left | None = g.get("rate")
        if left is not None:
            response.headers.update(left.headers)
        return response


def of_app() -> Limits:
    """Those of the application that answers now."""
    known: Limits = current_app.extensions[_EXTENSION]
    return known


def count(key: str) -> None:
    """Count the present request of an API key.

    Raises:
        Refusal: 429, when it has made as many within the last minute as it may.
    """
    g.rate = of_app().take("reads" if request.method in _READING else "writes", key)
    if g.rate is not None and g.rate.refused:
        raise too_many(g.rate, f"this key may make {g.rate.per_minute} {g.rate.name} per minute")


def too_many(left: Left, words: str) -> Refusal:
    return Refusal(
        429,
        "rate_limited",
        f"{words}; again in {left.reset_s} s",
        headers={"Retry-After": str(left.reset_s), **left.headers},
        retryable=True,
    )
