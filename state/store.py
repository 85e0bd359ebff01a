"""The door to what must not be lost. `state.memory` and `infra.store` go through it.

All writes happen inside `Store.transaction()`: everything in the block commits together or not
at all, and nobody outside sees half of it. Rows taken with `lock=True` stay this transaction's
until it ends. Times are aware UTC datetimes handed in by the caller; a store has no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol

from state.endpoints import Backlog, Endpoint
from state.events import (
    ApiKey,
    Artefact,
    Attempt,
    Dataset,
    Delivery,
    Event,
    HostRecord,
    Idempotent,
    Outgoing,
    OutgoingStatus,
    Secret,
)
from state.job import Job, Status
from state.lease import Lease
from state.orphan import Orphan


class Transaction(Protocol):
    """What can be read and written within one transaction."""

    # jobs
    def add_job(self, job: Job, *, webhook_secrets: Sequence[Secret] = ()) -> None:
        """Raises `Conflict` when the id exists. Secrets are encrypted at rest."""

    def job(self, job_id: str, *, lock: bool = False) -> Job:
        """Raises `NotFound`."""

    def jobs(self, ids: Collection[str], *, lock: bool = False) -> dict[str, Job]:
        """Those of `ids` that exist; locked in id order, so that two callers cannot deadlock."""

    def save_job(self, job: Job) -> None: ...

    def save_jobs(self, jobs: Sequence[Job]) -> None: ...

    def list_jobs(
        self,
        *,
        owner: str | None = None,
        statuses: Collection[Status] = (),
        metadata: Mapping[str, str] | None = None,
        dataset: str | None = None,
        text: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Newest id first, those with an id below `before`. With `text`, those that have it in
        their id, their base or their metadata, in whatever case, or had a machine of that id."""

    def count_jobs(self) -> dict[Status, int]:
        """How many jobs stand in each status; a status without any may be missing."""

    def claim_due_jobs(self, now: datetime, until: datetime, limit: int) -> list[Job]:
        """Jobs with `due_at <= now`, oldest due first; their stored `due_at` becomes `until`,
        so that no other worker takes them meanwhile (values returned show the new `due_at`)."""

    def webhook_secrets(self, owner_id: str) -> list[Secret]:
        """Of a job or an endpoint, oldest first; empty when the job has no webhook."""

    def set_webhook_secrets(self, owner_id: str, secrets: Sequence[Secret]) -> None:
        """In place of those that were there. Encrypted at rest."""

    # attempts
    def add_attempt(self, attempt: Attempt) -> None: ...
    def save_attempt(self, attempt: Attempt) -> None: ...
    def attempt(self, job_id: str, number: int, *, lock: bool = False) -> Attempt:
        """Raises `NotFound`."""

    def list_attempts(self, job_id: str) -> list[Attempt]: ...
    def attempts_over(self, when: datetime, limit: int) -> list[Attempt]:
        """Not cleared, of jobs that ended before `when`; oldest first."""

    # leases
    def add_lease(self, lease: Lease) -> None:
        """Raises `Conflict` when the label or the token exists, or the attempt has an open lease
        already: one, and one `hedge` beside it."""

    def save_lease(self, lease: Lease) -> None: ...
    def lease(self, lease_id: str, *, lock: bool = False) -> Lease:
        """Raises `NotFound`."""

    def leases_of(self, job_id: str) -> list[Lease]:
        """All of a job, oldest first."""

    def leases_of_jobs(self, ids: Collection[str]) -> dict[str, list[Lease]]:
        """For each of `ids`, its leases, oldest first."""

    def lease_by_token(self, token_hash: str, *, lock: bool = False) -> Lease | None: ...
    def lease_by_label(self, label: str, *, lock: bool = False) -> Lease | None: ...
    # Only of real machines, as is all that counts money: what is rehearsed costs none.
    def leases_since(self, when: datetime) -> list[Lease]:
        """Created at `when` or later, oldest first."""

    def leases_between(
        self,
        start: datetime,
        end: datetime,
        *,
        after: tuple[datetime, str] | None = None,
        limit: int = 1000,
    ) -> list[Lease]:
        """Created at `start` or later and before `end`, oldest first; a page at a time: those
        behind `after`, the last one's `created_at` and id."""

    def open_leases(self) -> list[Lease]: ...
    def open_rehearsals(self) -> list[Lease]:
        """Open leases of machines that only pretend."""

    def offers_taken(self, offer_ids: Collection[str]) -> set[str]:
        """Those of these offers that an open lease is for."""

    def claim_due_leases(self, now: datetime, until: datetime, limit: int) -> list[Lease]: ...

    # orphans
    def save_orphan(self, orphan: Orphan) -> None:
        """Adds; one with the same id is replaced."""

    def orphan(self, orphan_id: str) -> Orphan | None: ...
    def open_orphans(self) -> list[Orphan]:
        """Those that nobody saw gone, oldest first."""

    def orphans_between(self, start: datetime, end: datetime) -> list[Orphan]:
        """Started at `start` or later and before `end`, oldest first."""

    def orphans_labelled(self, label: str) -> list[Orphan]:
        """With this label, oldest first."""

    # events
    def add_events(self, events: Sequence[Event]) -> list[bool]:
        """Which of them were new: a known (job, attempt, agent_seq) or webhook_id adds nothing."""

    def events(
        self, job_id: str, *, after: int = 0, limit: int = 100, type: str | None = None
    ) -> list[Event]:
        """By seq, those above `after`; with `type`, only those of it."""

    def transitions_of(self, ids: Collection[str]) -> dict[str, list[Event]]:
        """For each of `ids`, its events of type `transition`, by seq."""

    def known_reports(self, webhook_ids: Collection[str]) -> set[str]:
        """Those of `webhook_ids` that are stored already."""

    # webhook endpoints
    def add_endpoint(self, endpoint: Endpoint, *, secrets: Sequence[Secret] = ()) -> None: ...
    def save_endpoint(self, endpoint: Endpoint) -> None: ...
    def endpoint(self, endpoint_id: str, *, lock: bool = False) -> Endpoint:
        """Raises `NotFound`."""

    def endpoints(self, owner: str | None = None) -> list[Endpoint]:
        """All, or an owner's; by id, which is oldest first."""

    def delete_endpoint(self, endpoint_id: str) -> None:
        """With its secrets; what it was sent stays in the outbox."""

    # what goes out
    def add_outgoing(self, rows: Sequence[Outgoing]) -> None: ...
    def save_outgoing(self, row: Outgoing) -> None: ...
    def outgoing(self, outgoing_id: str, *, lock: bool = False) -> Outgoing:
        """Raises `NotFound`."""

    def next_outgoing(self, queue: str) -> Outgoing | None:
        """The waiting row of this queue with the smallest seq."""

    def queues_of(self, job_id: str) -> list[str]:
        """Names of the job's queues in which something waits."""

    def claim_due_outgoing(self, now: datetime, until: datetime, limit: int) -> list[str]:
        """Names of queues whose *first* waiting row is due; that row's `due_at` becomes `until`."""

    def waiting_outgoing(self, endpoint_id: str, limit: int) -> list[Outgoing]:
        """What waits for an endpoint, whatever its due time, oldest first."""

    def disable_outgoing(self, endpoint_id: str, now: datetime) -> int:
        """Whatever waits for an endpoint will not go out; how many rows that were."""

    def page_outgoing(
        self,
        *,
        owner: str | None = None,
        job: str | None = None,
        endpoint: str | None = None,
        status: OutgoingStatus | None = None,
        before: tuple[datetime, str] | None = None,
        limit: int = 50,
    ) -> list[Outgoing]:
        """Newest first by (created_at, id), those below `before`."""

    def webhook_backlog(self, since: datetime) -> list[Backlog]:
        """What waits, and what was given up at `since` or later, by endpoint; of listeners
        too."""

    def log_delivery(self, delivery: Delivery) -> None: ...
    def deliveries(self, job_id: str, *, limit: int = 100) -> list[Delivery]:
        """Newest first."""

    def tries_of(self, outgoing_ids: Collection[str]) -> list[Delivery]:
        """All tries at sending these rows, oldest first."""

    def list_outgoing(self, job_id: str) -> list[Outgoing]:
        """By seq, then endpoint."""

    # datasets and artefacts
    def add_dataset(self, dataset: Dataset) -> None: ...
    def save_dataset(self, dataset: Dataset) -> None: ...
    def dataset(self, dataset_id: str, *, lock: bool = False) -> Dataset:
        """Raises `NotFound`."""

    def claim_due_datasets(self, now: datetime, until: datetime, limit: int) -> list[Dataset]: ...
    def datasets_before(self, when: datetime, limit: int) -> list[Dataset]:
        """Created before `when`, and used by no job that is not terminal; oldest first."""

    def delete_dataset(self, dataset_id: str) -> None: ...
    def put_artefacts(self, rows: Sequence[Artefact]) -> None:
        """Adds; a row with the same job and name is replaced."""

    def artefacts(self, job_id: str) -> list[Artefact]: ...
    def artefacts_before(self, when: datetime, limit: int) -> list[Artefact]:
        """Created before `when` and not expired, oldest first."""

    # keys
    def add_api_key(self, key: ApiKey) -> None: ...
    def save_api_key(self, key: ApiKey) -> None: ...
    def api_key_by_hash(self, key_hash: str) -> ApiKey | None: ...
    def api_keys(self) -> list[ApiKey]: ...

    def begin_idempotent(self, row: Idempotent) -> Idempotent | None:
        """Stores `row` and returns None, or returns what is stored under its owner and key.

        Two callers at once: the second waits for the first's transaction to end.
        """

    def finish_idempotent(self, owner: str, key: str, answer: Mapping[str, Any]) -> None: ...
    def drop_idempotent_before(self, when: datetime, limit: int) -> int:
        """Forgets keys that were first used before `when`; how many rows went."""

    # hosts and money
    def host(self, machine_id: str) -> HostRecord | None: ...
    def hosts(self) -> list[HostRecord]: ...
    def save_host(self, record: HostRecord) -> None: ...
    def add_spend(self, *, lease: str, job: str, at: datetime, amount: int) -> None:
        """Micro-USD; one row per lease, or whatever else costs (a second call replaces it)."""

    def spend_since(self, when: datetime) -> int: ...
    def spend_of(self, job_id: str) -> int: ...
    def reserved(self) -> int:
        """Micro-USD set aside for open leases."""

    # beats: small facts with a time, such as the last sweep or a worker's sign of life
    def beat(self, name: str, at: datetime, data: Mapping[str, Any] | None = None) -> None: ...
    def beats(self) -> dict[str, tuple[datetime, Mapping[str, Any]]]: ...

    def lock(self, name: str) -> None:
        """Wait for, and hold until the end of this transaction, the lock `name`."""

    # retention
    def drop_events_before(self, when: datetime, limit: int) -> int:
        """Deletes events, outgoing rows and deliveries of terminal jobs, and of tests of
        endpoints; how many rows went."""


class Store(Protocol):
    def transaction(self) -> AbstractContextManager[Transaction]: ...

    def close(self) -> None: ...
