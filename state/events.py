"""Records that a job leaves behind: its events, what goes out to the customer, its files."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from state.value import Value


class Secret(str):
    """A text that must not be shown: its repr and its format are stars. Encrypted at rest."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret('***')"

    def __format__(self, spec: str) -> str:
        return "***"

    def __str__(self) -> str:
        return "***"

    def reveal(self) -> str:
        """The text itself, for the one place that needs it."""
        return str.__str__(self)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a job's history.

    `seq` is the job's own count without gaps. For an agent's report `agent_seq` and `webhook_id`
    are set, and (job, attempt, agent_seq) and webhook_id are each unique: a repeat is no event.
    """

    job: str
    seq: int
    attempt: int
    #: A `Fact` value, or `transition`, or what an operator did.
    type: str
    at: datetime
    data: Mapping[str, Any] = field(default_factory=dict)
    agent_seq: int | None = None
    webhook_id: str | None = None


class OutgoingStatus(enum.StrEnum):
    WAITING = "waiting"
    DELIVERED = "delivered"
    #: The whole retry schedule was used up.
    EXHAUSTED = "exhausted"
    #: The endpoint answered 410, or it may not be called (SSRF guard).
    DISABLED = "disabled"


@dataclass(frozen=True, kw_only=True)
class Outgoing(Value):
    """A webhook owed to a customer: a row of the outbox. `id` is its webhook-id on every try.

    There is one for each endpoint that is to be told, all with the same `seq` and payload. A test
    is of no job: its `job` is the endpoint itself.
    """

    id: str
    job: str
    #: Counts the job's webhooks from 1 without gaps; receivers order by it.
    seq: int
    type: str
    created_at: datetime
    payload: Mapping[str, Any]
    status: OutgoingStatus = OutgoingStatus.WAITING
    tries: int = 0
    due_at: datetime | None = None
    #: "": the job's own webhook.
    endpoint: str = ""
    #: Whose job it is.
    owner: str = ""
    #: When it was delivered, given up, or its endpoint refused for good.
    ended_at: datetime | None = None

    @property
    def queue(self) -> str:
        """Those with the same go out one after the other; no queue waits for another."""
        return queue_of(self.job, self.endpoint)


def queue_of(job: str, endpoint: str) -> str:
    """The name of what a job owes to an endpoint; for its own webhook, the job's id."""
    return f"{job}/{endpoint}" if endpoint else job


def parts_of(queue: str) -> tuple[str, str]:
    """Job and endpoint of a queue."""
    job, _, endpoint = queue.partition("/")
    return job, endpoint


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One try at sending an `Outgoing`. `answer` is an HTTP status, or 0 when there was none."""

    outgoing: str
    job: str
    tried_at: datetime
    answer: int
    took_ms: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt(Value):
    """One try of a job: by which secret the agent that has it is known.

    `nonce` is what that agent sent with its hello: the same nonce within a minute gets the same
    answer again. The token that a hello is made with is the machine's (`Lease.token_hash`).
    `cleared` says that what it uploaded is deleted, and its secret forgotten.
    """

    job: str
    number: int
    created_at: datetime
    secret: Secret | None = None
    nonce: str | None = None
    hello_at: datetime | None = None
    cleared: bool = False


class DatasetStatus(enum.StrEnum):
    #: Uploads may still arrive.
    OPEN = "open"
    #: Sealed; the zip is being checked and built.
    BUILDING = "building"
    READY = "ready"
    #: Nothing usable in it; `report` says why.
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Dataset(Value):
    """Photographs for training. `files` is what the customer announced: name, bytes, sha256."""

    id: str
    owner: str
    created_at: datetime
    status: DatasetStatus = DatasetStatus.OPEN
    files: tuple[Mapping[str, Any], ...] = ()
    #: kept, warned and refused images, each with its reason
    report: Mapping[str, Any] = field(default_factory=dict)
    zip_key: str = ""
    zip_bytes: int = 0
    zip_sha256: str = ""
    due_at: datetime | None = None
    tries: int = 0


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A file that a job made. `verified` ones were read back by the server."""

    job: str
    name: str
    attempt: int
    key: str
    bytes: int
    sha256: str
    created_at: datetime
    verified: bool = False
    expired: bool = False


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A customer's or operator's key; only its SHA-256 is kept."""

    id: str
    owner: str
    name: str
    hash: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Idempotent:
    """A stored answer. `answer` is None while the first request is still being worked on."""

    owner: str
    key: str
    body_hash: str
    created_at: datetime
    answer: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class HostRecord:
    """What we know of a machine: counts of outcomes, when it last failed, what was measured.

    `lies` counts how often it was not what its offer said. `blocked` is an operator's word, and
    holds until it is taken back.
    """

    machine_id: str
    gpu_name: str = ""
    geo: str = ""
    good: int = 0
    bad: int = 0
    lies: int = 0
    blocked: bool = False
    blocked_why: str = ""
    last_failed_at: datetime | None = None
    last_seen_at: datetime | None = None
    last_reason: str = ""
    boot_s: float | None = None
    download_mbps: float | None = None
    steps_per_s: float | None = None
