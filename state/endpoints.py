"""Webhook endpoints: where an owner is told of all jobs at once, and of what.

A job may name a webhook of its own besides; in the outbox that one has the endpoint "".

An endpoint without a URL is a listener: nothing is sent to it. A program behind a firewall
(`stoker listen`) fetches what is owed to it, and says what became of it.

A secret that is replaced stays good for a while beside the new one, so that whoever verifies can
change over in their own time: until then deliveries carry a signature by each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from state.events import OutgoingStatus, Secret
from state.value import Value

#: What can be told, and when it is.
TYPES: Mapping[str, str] = {
    "job.pending_gpu": "its photographs are ready, and a GPU is looked for",
    "job.pending_images": "a machine has it and fetches the photographs",
    "job.pending_model": "the machine fetches the base model",
    "job.training": "the training began",
    "job.progress": "on whole per cents, at most every 5 seconds",
    "job.sample": "a sample image was made",
    "job.stalled": "it stands still; `reason` and `retry_at` say why and until when",
    "job.retrying": "its next attempt begins",
    "job.completed": "its weights were read back and are there to fetch",
    "job.failed": "no further attempt will be made",
    "job.cancelled": "it was cancelled",
    "webhook.test": "somebody tries the endpoint; of no job",
}
TEST = "webhook.test"
#: How many endpoints an owner may have: each is one more row for every webhook.
MOST = 16
#: How long the old secret stays good when nobody says otherwise, and at most.
OVERLAP, LONGEST_OVERLAP = timedelta(hours=24), timedelta(days=7)
#: For so long a listener may fetch what is owed to it; one unheard for as long is owed no more.
LISTEN = timedelta(hours=1)
#: A listener that is there is noted this often.
HEARD = timedelta(minutes=1)
#: The job that samples tell of; no real one has this id.
SAMPLE_JOB = "job_" + "0" * 26


@dataclass(frozen=True, kw_only=True)
class Endpoint(Value):
    """Where webhooks of an owner's jobs go. Its secrets lie beside it, sealed, oldest first."""

    id: str
    owner: str
    created_at: datetime
    #: "": a listener.
    url: str = ""
    #: Of `TYPES`; none: all.
    events: tuple[str, ...] = ()
    description: str = ""
    disabled_at: datetime | None = None
    disabled_why: str = ""
    #: When a listener last fetched.
    heard_at: datetime | None = None
    #: Until then the older of two secrets is good.
    old_secret_until: datetime | None = None
    #: Counts its own test webhooks, which are of no job.
    owed: int = 0

    @property
    def listener(self) -> bool:
        return not self.url

    def takes(self, kind: str, now: datetime) -> bool:
        """Whether it is to be told of an event of type `kind` that happens now."""
        if self.disabled_at is not None or (self.events and kind not in self.events):
            return False
        if not self.listener:
            return True
        return now - (self.heard_at or self.created_at) < LISTEN

    def disabled(self, now: datetime, why: str) -> Endpoint:
        """Nothing more is sent to it. The first reason stays."""
        if self.disabled_at is not None:
            return self
        return self.evolve(disabled_at=now, disabled_why=why)

    def due(self, now: datetime) -> datetime:
        """When a webhook that is owed to it now must be looked at."""
        return now + LISTEN if self.listener else now

    def in_force(self, secrets: Sequence[Secret], now: datetime) -> Sequence[Secret]:
        """Those of its secrets that are good at `now`, oldest first."""
        rotating = self.old_secret_until is not None and now < self.old_secret_until
        return secrets if rotating else secrets[-1:]


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Of one endpoint, how many webhooks stand in `status`, and since when the oldest of them:
    when it was owed, or, of those given up, when that was."""

    endpoint: str
    status: OutgoingStatus
    rows: int
    oldest: datetime


def sample(kind: str, endpoint: Endpoint, seq: int, timestamp: str) -> dict[str, Any]:
    """The payload of a test webhook: of type `webhook.test`, or as one of type `kind` looks.

    Raises:
        KeyError: there is no such type.
    """
    envelope = {"type": kind, "timestamp": timestamp}
    if kind == TEST:
        return {**envelope, "data": {"endpoint": endpoint.id, "seq": seq, "note": TYPES[kind]}}
    shown: dict[str, Any] = {
        "job": SAMPLE_JOB,
        "seq": seq,
        "attempt": 1,
        "livemode": False,
        "metadata": {"sample": "true"},
    }
    return {**envelope, "data": {**shown, **_SAMPLES[kind]}}


def _step(source: str, target: str, cause: str, **more: Any) -> dict[str, Any]:
    return {"status": target, "from": source, "to": target, "cause": cause, **more}


_REASON = {
    "code": "host.silent",
    "message": "nothing was heard of the machine for 120 s",
    "retryable": True,
}
_TRAINING = {"step": 300, "total": 1000, "loss": 0.1042, "steps_per_s": 2.1}
_SAMPLES: Mapping[str, Mapping[str, Any]] = {
    "job.pending_gpu": _step("pending", "pendingGpu", "dataset.ready"),
    "job.pending_images": _step("pendingGpu", "pendingImages", "gpu.ready"),
    "job.pending_model": _step("pendingImages", "pendingModel", "images.ready"),
    "job.training": _step("pendingModel", "training", "files.positioned"),
    "job.progress": {"status": "training", "progress": _TRAINING},
    "job.sample": {"status": "training", "sample": {"step": 300, "name": "sample-300-0.png"}},
    "job.stalled": _step(
        "training",
        "stalled",
        "stall",
        reason=_REASON,
        stalled_from="training",
        retry_at="2026-01-01T00:00:30.000Z",
    ),
    "job.retrying": _step("stalled", "pendingGpu", "retry"),
    "job.completed": _step("training", "completed", "weights.verified"),
    "job.failed": _step("stalled", "failed", "fail", reason={**_REASON, "retryable": False}),
    "job.cancelled": _step("training", "cancelled", "cancel"),
}
