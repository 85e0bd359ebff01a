"""Vast's notification webhooks: signed, at least once, in no order. The format is in
docs/sandbox.md."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import requests

log = logging.getLogger(__name__)

MAX_URLS = 4
TIMEOUT_S = 10.0
#: Market seconds before each next attempt.
RETRY_AFTER_S = (1.0, 2.0, 5.0, 10.0, 30.0)
USER_ID = 4242
#: Subject and message of an event, in the words of the real ones as far as they are public.
WORDS: dict[str, tuple[str, str]] = {
    "instance_created": (
        "Instance #{instance_id} Was Created",
        "Instance {instance_id} was created on machine {machine_id}.",
    ),
    "instance_started": (
        "Instance #{instance_id} Has Started",
        "Instance {instance_id} on machine {machine_id} is running.",
    ),
    "instance_stopped": (
        "Instance #{instance_id} Has Stopped",
        "Instance {instance_id} on machine {machine_id} has stopped.",
    ),
    "instance_resumed": (
        "Instance #{instance_id} Has Resumed",
        "Instance {instance_id} on machine {machine_id} is running again.",
    ),
    "instance_offline": (
        "Instance #{instance_id} Is Offline",
        "Machine {machine_id} of instance {instance_id} has lost its connection.",
    ),
    "instance_deleted": (
        "Instance #{instance_id} Was Deleted",
        "Instance {instance_id} on machine {machine_id} was deleted.",
    ),
    "outbid": (
        "Your Interruptible Instance #{instance_id} Has Been Outbid",
        "Your instance {instance_id} on machine {machine_id} will be stopped. Your bid was "
        "${bid:.4g}/hr; the current minimum bid is ${min_bid:.4g}/hr.",
    ),
    "low_credit": (
        "Warning - Your Vast.ai Credit Balance Is Getting Low",
        "Your balance of ${balance:.2f} is below your threshold of ${threshold:.2f}.",
    ),
    "webhook_test": ("Webhook Test", "This is a test of your notification webhook."),
}


class Tell(Protocol):
    def __call__(self, event: str, **data: Any) -> None:
        """`event` happened; it is told, or not, without waiting."""


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """The value of `X-Vast-Signature-256`."""
    signed = f"{timestamp}.".encode() + body
    return "sha256=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    url: str
    event_id: str
    event: str
    body: bytes


class Notifier:
    """Tells `urls` of events, from a thread for each.

    Args:
        rate: chance that a delivery is lost, that it comes twice, and that `data` is null.
    """

    def __init__(
        self,
        urls: Sequence[str],
        secret: str,
        *,
        rate: float = 0.0,
        seed: int = 0,
        time_scale: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if len(urls) > MAX_URLS:
            raise ValueError(f"at most {MAX_URLS} webhooks")
        self._secret, self._rate, self._time_scale, self._clock = secret, rate, time_scale, clock
        self._random = random.Random(f"{seed}/notify")
        self._sent: deque[dict[str, Any]] = deque(maxlen=200)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._queues: dict[str, queue.SimpleQueue[_Delivery | None]] = {
            url: queue.SimpleQueue() for url in urls
        }
        self._threads = [
            threading.Thread(target=self._work, args=(line,), daemon=True, name="notify")
            for line in self._queues.values()
        ]
        for thread in self._threads:
            thread.start()

    def __call__(self, event: str, **data: Any) -> None:
        """See `Tell`."""
        subject, message = WORDS[event]
        for url, line in self._queues.items():
            lost, doubled, bare = (self._random.random() < self._rate for _ in range(3))
            event_id = secrets.token_hex(16)
            fields = {
                "event_id": event_id,
                "user_id": USER_ID,
                "notif_type": event,
                "subject": subject.format(**data),
                "message": message.format(**data),
                "data": None if bare or not data else data,
                "data_truncated": False,
                "timestamp": round(self._clock(), 3),
            }
            body = json.dumps(fields).encode()
            delivery = _Delivery(url=url, event_id=event_id, event=event, body=body)
            if lost:
                self._note(delivery, 0, "lost")
            else:
                for _ in range(2 if doubled else 1):
                    line.put(delivery)

    @property
    def sent(self) -> list[dict[str, Any]]:
        """The last ones, newest last: event, url, attempt and what came of it."""
        with self._lock:
            return list(self._sent)

    def close(self) -> None:
        self._over.set()
        for line in self._queues.values():
            line.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, line: queue.SimpleQueue[_Delivery | None]) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while (delivery := line.get()) is not None:
                self._deliver(session, delivery)

    def _deliver(self, session: requests.Session, delivery: _Delivery) -> None:
        for attempt, pause in enumerate((*RETRY_AFTER_S, None), 1):
            timestamp = int(self._clock())
            headers = {
                "Content-Type": "application/json",
                "X-Vast-Event-Id": delivery.event_id,
                "X-Vast-Delivery-Attempt": str(attempt),
                "X-Vast-Timestamp": str(timestamp),
                "X-Vast-Signature-256": signature(self._secret, timestamp, delivery.body),
            }
            try:
                status = session.post(
                    delivery.url,
                    data=delivery.body,
                    headers=headers,
                    timeout=TIMEOUT_S,
                    allow_redirects=False,
                ).status_code
            except requests.RequestException as error:
                status = 0
                self._note(delivery, attempt, type(error).__name__)
            else:
                self._note(delivery, attempt, status)
            again = status in (0, 408, 429) or status >= 500
            if not again or pause is None or self._over.wait(pause / self._time_scale):
                return

    def _note(self, delivery: _Delivery, attempt: int, outcome: object) -> None:
        what = {"event": delivery.event, "event_id": delivery.event_id, "url": delivery.url}
        with self._lock:
            self._sent.append({**what, "attempt": attempt, "outcome": outcome})
