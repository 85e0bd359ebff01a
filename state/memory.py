"""The store in memory: for tests, and for simulations of a hundred thousand jobs.

Transactions run one at a time under a lock, so nobody sees half of one. Every change notes what
was there before, and a transaction that raises puts it all back, newest first: what a transaction
costs depends on what it touches, never on how much is stored. What is due is found through heaps.

Values are kept as they are given, not copied: whoever stores a mapping leaves it alone afterwards.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Generic, TypeVar

from state.endpoints import Backlog, Endpoint
from state.errors import Conflict, NotFound
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
    parts_of,
    queue_of,
)
from state.job import TERMINAL, Job, Status
from state.lease import Lease
from state.orphan import Orphan

K = TypeVar("K")
V = TypeVar("V")

_ABSENT: Any = object()


class Rows(dict[K, V]):
    """Rows by key. Written only by way of `_Transaction`, which can take the writing back."""

    def moved(self, key: K, old: V, new: V) -> None:
        """`key` held `old` and holds `new` now; either may be absent."""


class DueRows(Rows[str, V], Generic[V]):
    """Rows with a due time, the earliest at hand.

    The heap may hold entries that are no longer true; they are dropped when they come up, and all
    at once when they are the larger part.
    """

    def __init__(self, due: Callable[[V], datetime | None]) -> None:
        super().__init__()
        self._due = due
        self._heap: list[tuple[datetime, str]] = []

    def moved(self, key: str, old: V, new: V) -> None:
        when = self._when(new)
        if when is not None and when != self._when(old):
            self.push(key, when)

    def push(self, key: str, when: datetime) -> None:
        heapq.heappush(self._heap, (when, key))
        if len(self._heap) > 2 * len(self) + 64:
            self._heap = [
                (due, name) for name, row in self.items() if (due := self._due(row)) is not None
            ]
            heapq.heapify(self._heap)

    def take(self, now: datetime, limit: int) -> list[str]:
        """Keys of rows due by `now`, earliest first. The caller gives each a new due time."""
        taken: dict[str, None] = {}
        while self._heap and self._heap[0][0] <= now and len(taken) < limit:
            when, key = heapq.heappop(self._heap)
            if self._when(self.get(key, _ABSENT)) == when:
                taken[key] = None
        return list(taken)

    def first(self) -> datetime | None:
        """When the earliest row is due."""
        while self._heap:
            when, key = self._heap[0]
            if self._when(self.get(key, _ABSENT)) == when:
                return when
            heapq.heappop(self._heap)
        return None

    def _when(self, row: V) -> datetime | None:
        return None if row is _ABSENT else self._due(row)


def _due_at(row: Any) -> datetime | None:
    due: datetime | None = row.due_at
    return due


def _itself(due: datetime | None) -> datetime | None:
    return due


class _Data:
    """All tables, and the indexes over them. An index maps a key to the rows under it."""

    def __init__(self) -> None:
        self.jobs: DueRows[Job] = DueRows(_due_at)
        self.jobs_by_status: dict[Status, Rows[str, None]] = defaultdict(Rows)
        self.jobs_by_owner: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.jobs_by_dataset: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.webhook_secrets: Rows[str, list[Secret]] = Rows()
        self.attempts: dict[str, Rows[int, Attempt]] = defaultdict(Rows)
        #: by token: the lease that it was made for
        self.tokens: Rows[str, str] = Rows()
        self.leases: DueRows[Lease] = DueRows(_due_at)
        self.leases_by_job: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.labels: Rows[str, str] = Rows()
        self.open_leases: Rows[tuple[str, int, bool], str] = Rows()
        self.orphans: Rows[str, Orphan] = Rows()
        self.open_orphans: Rows[str, None] = Rows()
        self.orphans_by_label: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.events: dict[str, Rows[int, Event]] = defaultdict(Rows)
        self.reports: Rows[tuple[str, int, int], None] = Rows()
        self.webhook_ids: Rows[str, None] = Rows()
        self.outgoing: Rows[str, Outgoing] = Rows()
        self.outgoing_by_job: dict[str, Rows[tuple[int, str], str]] = defaultdict(Rows)
        #: by queue
        self.waiting: dict[str, Rows[int, str]] = defaultdict(Rows)
        #: by queue: when its first waiting row is due
        self.next_due: DueRows[datetime | None] = DueRows(_itself)
        self.deliveries: dict[str, Rows[int, Delivery]] = defaultdict(Rows)
        self.numbers = itertools.count()
        self.endpoints: Rows[str, Endpoint] = Rows()
        self.endpoints_by_owner: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.datasets: DueRows[Dataset] = DueRows(_due_at)
        self.artefacts: dict[str, Rows[str, Artefact]] = defaultdict(Rows)
        self.api_keys: Rows[str, ApiKey] = Rows()
        self.key_hashes: Rows[str, str] = Rows()
        self.idempotent: Rows[tuple[str, str], Idempotent] = Rows()
        self.hosts: Rows[str, HostRecord] = Rows()
        self.spend: Rows[str, _Spend] = Rows()
        self.spend_by_job: dict[str, Rows[str, None]] = defaultdict(Rows)
        self.spend_by_hour: dict[int, Rows[str, None]] = defaultdict(Rows)
        self.spend_sums: Rows[int, int] = Rows()
        self.beats: Rows[str, tuple[datetime, Mapping[str, Any]]] = Rows()


#: job, time, micro-USD
_Spend = tuple[str, datetime, int]


def _hour(when: datetime) -> int:
    return int(when.timestamp()) // 3600


#: What a commit changed: each row as it was and as it is; None where it was or is absent.
Changes = list[tuple[Any, Any]]


class MemoryStore:
    """Everything that must not be lost, until the process ends.

    Args:
        watch: told of each commit's changes, in the order of writing, before anybody else sees
            them; whatever it raises leaves the commit as it is.
    """

    def __init__(self, watch: Callable[[Changes], None] | None = None) -> None:
        self._data = _Data()
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._watch = watch

    def transaction(self) -> AbstractContextManager[MemoryTransaction]:
        """One transaction; others wait until it ends.

        Raises:
            RuntimeError: this thread is within a transaction already, and would wait for itself.
        """
        return _Opened(self)

    def begin(self) -> MemoryTransaction:
        """Wait for one's turn. `finish` must follow."""
        if self._holder == threading.get_ident():
            raise RuntimeError("a transaction inside a transaction would wait for itself")
        self._lock.acquire()
        self._holder = threading.get_ident()
        return MemoryTransaction(self._data)

    def finish(self, transaction: MemoryTransaction, *, commit: bool) -> None:
        """End what `begin` began."""
        try:
            if not commit:
                transaction.roll_back()
            elif self._watch is not None:
                self._watch(transaction.changes())
        finally:
            transaction.end()
            self._holder = None
            self._lock.release()

    def next_due(self) -> datetime | None:
        """When the first row of any kind is due; None when nothing is."""
        data, first = self._data, None
        for rows in (data.jobs, data.leases, data.datasets, data.next_due):
            due: datetime | None = rows.first()
            if due is not None and (first is None or due < first):
                first = due
        return first

    def close(self) -> None:
        """Nothing is open."""


class _Opened:
    """A transaction as a context. A generator would cost as much again as most transactions."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def __enter__(self) -> MemoryTransaction:
        self._tx = self._store.begin()
        return self._tx

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._store.finish(self._tx, commit=kind is None)


class MemoryTransaction:
    """One transaction of a `MemoryStore`; `state.store.Transaction` says what each call means."""

    def __init__(self, data: _Data) -> None:
        self._data = data
        self._undo: list[tuple[Rows[Any, Any], Any, Any]] = []
        self._ended = False

    def roll_back(self) -> None:
        """Put back all that was changed."""
        for rows, key, old in reversed(self._undo):
            now = rows.get(key, _ABSENT)
            if old is _ABSENT:
                del rows[key]
            else:
                rows[key] = old
            rows.moved(key, now, old)

    def end(self) -> None:
        self._ended = True

    def changes(self) -> Changes:
        """What was written so far. A row that was written twice comes twice, last as it is."""
        return [(None if old is _ABSENT else old, rows.get(key)) for rows, key, old in self._undo]

    # the only two ways of writing

    def _put(self, rows: Rows[K, V], key: K, value: V) -> None:
        old = rows.get(key, _ABSENT)
        self._note(rows, key, old)
        rows[key] = value
        rows.moved(key, old, value)

    def _drop(self, rows: Rows[K, V], key: K) -> None:
        if key in rows:
            self._note(rows, key, rows[key])
            del rows[key]

    def _note(self, rows: Rows[K, V], key: K, old: V) -> None:
        if self._ended:
            raise RuntimeError("this transaction has ended")
        self._undo.append((rows, key, old))

    # the same few things for every table

    def _add(self, rows: Rows[K, V], key: K, value: V, what: str) -> None:
        if key in rows:
            raise Conflict(f"{what} exists already")
        self._put(rows, key, value)

    def _claim(
        self, rows: DueRows[Any], now: datetime, until: datetime, limit: int
    ) -> list[tuple[str, Any]]:
        claimed = []
        for key in rows.take(now, limit):
            before = rows[key]
            row = before.evolve(due_at=until)
            self._put(rows, key, row)
            if before.due_at == until:
                rows.push(key, until)
            claimed.append((key, row))
        return claimed

    # jobs

    def add_job(self, job: Job, *, webhook_secrets: Sequence[Secret] = ()) -> None:
        data = self._data
        self._add(data.jobs, job.id, job, f"job {job.id}")
        self._put(data.jobs_by_status[job.status], job.id, None)
        self._put(data.jobs_by_owner[job.owner], job.id, None)
        self._put(data.jobs_by_dataset[job.request.dataset_id], job.id, None)
        self._put(data.webhook_secrets, job.id, list(webhook_secrets))

    def job(self, job_id: str, *, lock: bool = False) -> Job:
        return _found(self._data.jobs, job_id, f"job {job_id}")

    def jobs(self, ids: Collection[str], *, lock: bool = False) -> dict[str, Job]:
        jobs = self._data.jobs
        return {job_id: jobs[job_id] for job_id in sorted(set(ids)) if job_id in jobs}

    def save_job(self, job: Job) -> None:
        data = self._data
        old = self.job(job.id)
        self._put(data.jobs, job.id, job)
        if job.status is not old.status:
            self._drop(data.jobs_by_status[old.status], job.id)
            self._put(data.jobs_by_status[job.status], job.id, None)

    def save_jobs(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.save_job(job)

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
        data = self._data

        def is_wanted(job: Job) -> bool:
            return (
                (owner is None or job.owner == owner)
                and (not statuses or job.status in statuses)
                and (dataset is None or job.request.dataset_id == dataset)
                and (before is None or job.id < before)
                and all(job.request.metadata.get(k) == v for k, v in (metadata or {}).items())
                and (text is None or self._says(job, text))
            )

        among: Collection[str] = data.jobs
        if dataset is not None:
            among = data.jobs_by_dataset.get(dataset, ())
        elif statuses:
            among = [job for status in statuses for job in data.jobs_by_status.get(status, ())]
        elif owner is not None:
            among = data.jobs_by_owner.get(owner, ())
        ids = heapq.nlargest(limit, (job_id for job_id in among if is_wanted(data.jobs[job_id])))
        return [data.jobs[job_id] for job_id in ids]

    def _says(self, job: Job, text: str) -> bool:
        request = job.request
        words = (job.id, request.base, *request.metadata, *request.metadata.values())
        machines = (lease.machine_id for lease in self.leases_of(job.id))
        return any(text.lower() in word.lower() for word in words) or text in machines

    def count_jobs(self) -> dict[Status, int]:
        return {status: len(ids) for status, ids in self._data.jobs_by_status.items() if ids}

    def claim_due_jobs(self, now: datetime, until: datetime, limit: int) -> list[Job]:
        return [job for _, job in self._claim(self._data.jobs, now, until, limit)]

    def webhook_secrets(self, owner_id: str) -> list[Secret]:
        return list(self._data.webhook_secrets.get(owner_id, ()))

    def set_webhook_secrets(self, owner_id: str, secrets: Sequence[Secret]) -> None:
        self._put(self._data.webhook_secrets, owner_id, list(secrets))

    # attempts

    def add_attempt(self, attempt: Attempt) -> None:
        data = self._data
        what = f"attempt {attempt.number} of job {attempt.job}"
        self._add(data.attempts[attempt.job], attempt.number, attempt, what)

    def save_attempt(self, attempt: Attempt) -> None:
        self.attempt(attempt.job, attempt.number)
        self._put(self._data.attempts[attempt.job], attempt.number, attempt)

    def attempt(self, job_id: str, number: int, *, lock: bool = False) -> Attempt:
        of_job: Mapping[int, Attempt] = self._data.attempts.get(job_id, _NOTHING)
        return _found(of_job, number, f"attempt {number} of job {job_id}")

    def list_attempts(self, job_id: str) -> list[Attempt]:
        of_job = self._data.attempts.get(job_id, _NOTHING)
        return [of_job[number] for number in sorted(of_job)]

    def attempts_over(self, when: datetime, limit: int) -> list[Attempt]:
        kept = (item for rows in self._data.attempts.values() for item in rows.values())
        over = [item for item in kept if not item.cleared and self._job_ended(item.job, when)]
        return sorted(over, key=lambda item: (item.created_at, item.job, item.number))[:limit]

    def _job_ended(self, job_id: str, when: datetime) -> bool:
        finished = self._data.jobs[job_id].finished_at
        return finished is not None and finished < when

    # leases

    def add_lease(self, lease: Lease) -> None:
        data = self._data
        if lease.label in data.labels:
            raise Conflict(f"lease label {lease.label} exists already")
        self._check_open(lease)
        self._add(data.leases, lease.id, lease, f"lease {lease.id}")
        self._put(data.labels, lease.label, lease.id)
        if lease.token_hash is not None:
            self._add(data.tokens, lease.token_hash, lease.id, "a lease with this token")
        self._put(data.leases_by_job[lease.job], lease.id, None)
        self._index_open(lease)

    def save_lease(self, lease: Lease) -> None:
        self.lease(lease.id)
        self._check_open(lease)
        self._put(self._data.leases, lease.id, lease)
        self._index_open(lease)

    def _check_open(self, lease: Lease) -> None:
        key = (lease.job, lease.attempt, lease.hedge)
        other = self._data.open_leases.get(key, lease.id)
        if lease.open and other != lease.id:
            raise Conflict(f"attempt {lease.attempt} of job {lease.job} has an open lease: {other}")

    def _index_open(self, lease: Lease) -> None:
        leases, key = self._data.open_leases, (lease.job, lease.attempt, lease.hedge)
        if lease.open:
            self._put(leases, key, lease.id)
        elif leases.get(key) == lease.id:
            self._drop(leases, key)

    def lease(self, lease_id: str, *, lock: bool = False) -> Lease:
        return _found(self._data.leases, lease_id, f"lease {lease_id}")

    def leases_of(self, job_id: str) -> list[Lease]:
        return self._leases(self._data.leases_by_job.get(job_id, ()))

    def leases_of_jobs(self, ids: Collection[str]) -> dict[str, list[Lease]]:
        return {job_id: self.leases_of(job_id) for job_id in ids}

    def lease_by_token(self, token_hash: str, *, lock: bool = False) -> Lease | None:
        lease_id = self._data.tokens.get(token_hash)
        return None if lease_id is None else self.lease(lease_id)

    def lease_by_label(self, label: str, *, lock: bool = False) -> Lease | None:
        lease_id = self._data.labels.get(label)
        return None if lease_id is None else self.lease(lease_id)

    def leases_since(self, when: datetime) -> list[Lease]:
        found: list[Lease] = []
        # Newest last: leases are stored as they are made.
        for lease in reversed(self._data.leases.values()):
            if lease.created_at < when:
                break
            found.append(lease)
        return self._by_age(lease for lease in found if not lease.rehearsed)

    def leases_between(
        self,
        start: datetime,
        end: datetime,
        *,
        after: tuple[datetime, str] | None = None,
        limit: int = 1000,
    ) -> list[Lease]:
        found = (lease for lease in self.leases_since(start) if lease.created_at < end)
        behind = (lease for lease in found if after is None or (lease.created_at, lease.id) > after)
        return list(itertools.islice(behind, limit))

    def open_leases(self) -> list[Lease]:
        opened = self._leases(self._data.open_leases.values())
        return [lease for lease in opened if not lease.rehearsed]

    def open_rehearsals(self) -> list[Lease]:
        opened = self._leases(self._data.open_leases.values())
        return [lease for lease in opened if lease.rehearsed]

    def offers_taken(self, offer_ids: Collection[str]) -> set[str]:
        opened = (self._data.leases[lease_id] for lease_id in self._data.open_leases.values())
        return {lease.offer_id for lease in opened} & set(offer_ids)

    def _leases(self, ids: Collection[str]) -> list[Lease]:
        return self._by_age(self._data.leases[lease_id] for lease_id in ids)

    @staticmethod
    def _by_age(leases: Iterable[Lease]) -> list[Lease]:
        return sorted(leases, key=lambda lease: (lease.created_at, lease.id))

    def claim_due_leases(self, now: datetime, until: datetime, limit: int) -> list[Lease]:
        return [lease for _, lease in self._claim(self._data.leases, now, until, limit)]

    # orphans

    def save_orphan(self, orphan: Orphan) -> None:
        data, old = self._data, self.orphan(orphan.id)
        if old is not None:
            self._drop(data.orphans_by_label[old.label], old.id)
        self._put(data.orphans, orphan.id, orphan)
        self._put(data.orphans_by_label[orphan.label], orphan.id, None)
        if orphan.gone_at is None:
            self._put(data.open_orphans, orphan.id, None)
        else:
            self._drop(data.open_orphans, orphan.id)

    def orphan(self, orphan_id: str) -> Orphan | None:
        return self._data.orphans.get(orphan_id)

    def open_orphans(self) -> list[Orphan]:
        return self._orphans(self._data.open_orphans)

    def orphans_between(self, start: datetime, end: datetime) -> list[Orphan]:
        found = self._orphans(self._data.orphans)
        return [orphan for orphan in found if start <= orphan.started_at < end]

    def orphans_labelled(self, label: str) -> list[Orphan]:
        return self._orphans(self._data.orphans_by_label.get(label, ()))

    def _orphans(self, ids: Collection[str]) -> list[Orphan]:
        found = (self._data.orphans[orphan_id] for orphan_id in ids)
        return sorted(found, key=lambda orphan: (orphan.started_at, orphan.id))

    # events

    def add_events(self, events: Sequence[Event]) -> list[bool]:
        return [self._add_event(event) for event in events]

    def _add_event(self, event: Event) -> bool:
        data = self._data
        report = None if event.agent_seq is None else (event.job, event.attempt, event.agent_seq)
        if report in data.reports or event.webhook_id in data.webhook_ids:
            return False
        what = f"event {event.seq} of job {event.job}"
        self._add(data.events[event.job], event.seq, event, what)
        if report is not None:
            self._put(data.reports, report, None)
        if event.webhook_id is not None:
            self._put(data.webhook_ids, event.webhook_id, None)
        return True

    def events(
        self, job_id: str, *, after: int = 0, limit: int = 100, type: str | None = None
    ) -> list[Event]:
        of_job = self._data.events.get(job_id, _NOTHING)
        numbers = sorted(
            seq
            for seq, event in of_job.items()
            if seq > after and (type is None or event.type == type)
        )
        return [of_job[seq] for seq in numbers[:limit]]

    def transitions_of(self, ids: Collection[str]) -> dict[str, list[Event]]:
        no_limit = 2**31
        return {job_id: self.events(job_id, limit=no_limit, type="transition") for job_id in ids}

    def known_reports(self, webhook_ids: Collection[str]) -> set[str]:
        return {name for name in webhook_ids if name in self._data.webhook_ids}

    # webhook endpoints

    def add_endpoint(self, endpoint: Endpoint, *, secrets: Sequence[Secret] = ()) -> None:
        data = self._data
        self._add(data.endpoints, endpoint.id, endpoint, f"webhook endpoint {endpoint.id}")
        self._put(data.endpoints_by_owner[endpoint.owner], endpoint.id, None)
        self.set_webhook_secrets(endpoint.id, secrets)

    def save_endpoint(self, endpoint: Endpoint) -> None:
        self.endpoint(endpoint.id)
        self._put(self._data.endpoints, endpoint.id, endpoint)

    def endpoint(self, endpoint_id: str, *, lock: bool = False) -> Endpoint:
        return _found(self._data.endpoints, endpoint_id, f"webhook endpoint {endpoint_id}")

    def endpoints(self, owner: str | None = None) -> list[Endpoint]:
        data = self._data
        ids = data.endpoints if owner is None else data.endpoints_by_owner.get(owner, ())
        return [data.endpoints[endpoint_id] for endpoint_id in sorted(ids)]

    def delete_endpoint(self, endpoint_id: str) -> None:
        data = self._data
        if endpoint_id in data.endpoints:
            owner = data.endpoints[endpoint_id].owner
            self._drop(data.endpoints_by_owner[owner], endpoint_id)
        self._drop(data.endpoints, endpoint_id)
        self._drop(data.webhook_secrets, endpoint_id)

    # what goes out

    def add_outgoing(self, rows: Sequence[Outgoing]) -> None:
        data = self._data
        for row in rows:
            self._add(data.outgoing, row.id, row, f"outgoing webhook {row.id}")
            what = f"webhook {row.seq} of job {row.job}"
            self._add(data.outgoing_by_job[row.job], (row.seq, row.endpoint), row.id, what)
            self._queue(row)

    def save_outgoing(self, row: Outgoing) -> None:
        self.outgoing(row.id)
        self._put(self._data.outgoing, row.id, row)
        self._queue(row)

    def _queue(self, row: Outgoing) -> None:
        """Keep what is waiting in this row's queue, and when the first of it is due."""
        data, queue = self._data, row.queue
        waiting = data.waiting[queue]
        if row.status is OutgoingStatus.WAITING:
            self._put(waiting, row.seq, row.id)
        else:
            self._drop(waiting, row.seq)
        first = self.next_outgoing(queue)
        if first is None:
            self._drop(data.next_due, queue)
        else:
            self._put(data.next_due, queue, first.due_at)

    def outgoing(self, outgoing_id: str, *, lock: bool = False) -> Outgoing:
        return _found(self._data.outgoing, outgoing_id, f"outgoing webhook {outgoing_id}")

    def next_outgoing(self, queue: str) -> Outgoing | None:
        waiting = self._data.waiting.get(queue)
        return self._data.outgoing[waiting[min(waiting)]] if waiting else None

    def claim_due_outgoing(self, now: datetime, until: datetime, limit: int) -> list[str]:
        queues = self._data.next_due.take(now, limit)
        for queue in queues:
            first = self.next_outgoing(queue)
            if first is not None:
                self.save_outgoing(first.evolve(due_at=until))
                if first.due_at == until:
                    self._data.next_due.push(queue, until)
        return queues

    def queues_of(self, job_id: str) -> list[str]:
        data = self._data
        endpoints = {endpoint for _, endpoint in data.outgoing_by_job.get(job_id, ())}
        queues = sorted(queue_of(job_id, endpoint) for endpoint in endpoints)
        return [queue for queue in queues if data.waiting.get(queue)]

    def waiting_outgoing(self, endpoint_id: str, limit: int) -> list[Outgoing]:
        data = self._data
        ids = (
            name
            for queue, rows in data.waiting.items()
            if parts_of(queue)[1] == endpoint_id
            for name in rows.values()
        )
        waiting = [data.outgoing[name] for name in ids]
        return sorted(waiting, key=lambda row: (row.created_at, row.job, row.seq))[:limit]

    def disable_outgoing(self, endpoint_id: str, now: datetime) -> int:
        waiting = self.waiting_outgoing(endpoint_id, len(self._data.outgoing))
        for row in waiting:
            self.save_outgoing(
                row.evolve(status=OutgoingStatus.DISABLED, due_at=None, ended_at=now)
            )
        return len(waiting)

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
        wanted = [
            row
            for row in self._data.outgoing.values()
            if (owner is None or row.owner == owner)
            and (job is None or row.job == job)
            and (endpoint is None or row.endpoint == endpoint)
            and (status is None or row.status is status)
            and (before is None or (row.created_at, row.id) < before)
        ]
        return heapq.nlargest(limit, wanted, key=lambda row: (row.created_at, row.id))

    def webhook_backlog(self, since: datetime) -> list[Backlog]:
        oldest: dict[tuple[str, OutgoingStatus], list[datetime]] = defaultdict(list)
        for row in self._data.outgoing.values():
            if row.status is OutgoingStatus.WAITING:
                oldest[row.endpoint, row.status].append(row.created_at)
            elif row.status is OutgoingStatus.EXHAUSTED and row.ended_at and row.ended_at >= since:
                oldest[row.endpoint, row.status].append(row.ended_at)
        return [
            Backlog(endpoint=endpoint, status=status, rows=len(times), oldest=min(times))
            for (endpoint, status), times in sorted(oldest.items())
        ]

    def log_delivery(self, delivery: Delivery) -> None:
        self._put(self._data.deliveries[delivery.job], next(self._data.numbers), delivery)

    def deliveries(self, job_id: str, *, limit: int = 100) -> list[Delivery]:
        of_job = self._data.deliveries.get(job_id, _NOTHING)
        newest = sorted(of_job, key=lambda number: (of_job[number].tried_at, number), reverse=True)
        return [of_job[number] for number in newest[:limit]]

    def tries_of(self, outgoing_ids: Collection[str]) -> list[Delivery]:
        data, wanted = self._data, set(outgoing_ids)
        jobs = {data.outgoing[name].job for name in wanted if name in data.outgoing}
        tries = sorted(
            (item.tried_at, number, item)
            for job in jobs
            for number, item in data.deliveries.get(job, _NOTHING).items()
            if item.outgoing in wanted
        )
        return [item for *_, item in tries]

    def list_outgoing(self, job_id: str) -> list[Outgoing]:
        of_job = self._data.outgoing_by_job.get(job_id, _NOTHING)
        return [self._data.outgoing[of_job[key]] for key in sorted(of_job)]

    # datasets and artefacts

    def add_dataset(self, dataset: Dataset) -> None:
        self._add(self._data.datasets, dataset.id, dataset, f"dataset {dataset.id}")

    def save_dataset(self, dataset: Dataset) -> None:
        self.dataset(dataset.id)
        self._put(self._data.datasets, dataset.id, dataset)

    def dataset(self, dataset_id: str, *, lock: bool = False) -> Dataset:
        return _found(self._data.datasets, dataset_id, f"dataset {dataset_id}")

    def claim_due_datasets(self, now: datetime, until: datetime, limit: int) -> list[Dataset]:
        return [dataset for _, dataset in self._claim(self._data.datasets, now, until, limit)]

    def datasets_before(self, when: datetime, limit: int) -> list[Dataset]:
        data = self._data

        def is_used(dataset_id: str) -> bool:
            jobs = data.jobs_by_dataset.get(dataset_id, ())
            return any(not data.jobs[job_id].terminal for job_id in jobs)

        old = [row for row in data.datasets.values() if row.created_at < when]
        old.sort(key=lambda row: (row.created_at, row.id))
        return list(itertools.islice((row for row in old if not is_used(row.id)), limit))

    def delete_dataset(self, dataset_id: str) -> None:
        self._drop(self._data.datasets, dataset_id)

    def put_artefacts(self, rows: Sequence[Artefact]) -> None:
        for row in rows:
            self._put(self._data.artefacts[row.job], row.name, row)

    def artefacts(self, job_id: str) -> list[Artefact]:
        rows = self._data.artefacts.get(job_id, _NOTHING).values()
        return sorted(rows, key=lambda row: (row.created_at, row.name))

    def artefacts_before(self, when: datetime, limit: int) -> list[Artefact]:
        rows = itertools.chain.from_iterable(
            of_job.values() for of_job in self._data.artefacts.values()
        )
        old = [row for row in rows if row.created_at < when and not row.expired]
        return sorted(old, key=lambda row: (row.created_at, row.job, row.name))[:limit]

    # keys

    def add_api_key(self, key: ApiKey) -> None:
        data = self._data
        if key.hash in data.key_hashes:
            raise Conflict(f"API key {key.id} exists already")
        self._add(data.api_keys, key.id, key, f"API key {key.id}")
        self._put(data.key_hashes, key.hash, key.id)

    def save_api_key(self, key: ApiKey) -> None:
        old = _found(self._data.api_keys, key.id, f"API key {key.id}")
        if key.hash != old.hash:
            self._drop(self._data.key_hashes, old.hash)
            self._add(self._data.key_hashes, key.hash, key.id, "an API key with this hash")
        self._put(self._data.api_keys, key.id, key)

    def api_key_by_hash(self, key_hash: str) -> ApiKey | None:
        key_id = self._data.key_hashes.get(key_hash)
        return None if key_id is None else self._data.api_keys[key_id]

    def api_keys(self) -> list[ApiKey]:
        return sorted(self._data.api_keys.values(), key=lambda key: (key.created_at, key.id))

    def begin_idempotent(self, row: Idempotent) -> Idempotent | None:
        stored = self._data.idempotent.get((row.owner, row.key))
        if stored is None:
            self._put(self._data.idempotent, (row.owner, row.key), row)
        return stored

    def finish_idempotent(self, owner: str, key: str, answer: Mapping[str, Any]) -> None:
        row = _found(self._data.idempotent, (owner, key), "such idempotency key")
        self._put(self._data.idempotent, (owner, key), replace(row, answer=answer))

    def drop_idempotent_before(self, when: datetime, limit: int) -> int:
        rows = self._data.idempotent
        old = list(itertools.islice((k for k, row in rows.items() if row.created_at < when), limit))
        for key in old:
            self._drop(rows, key)
        return len(old)

    # hosts and money

    def host(self, machine_id: str) -> HostRecord | None:
        return self._data.hosts.get(machine_id)

    def hosts(self) -> list[HostRecord]:
        return [self._data.hosts[machine_id] for machine_id in sorted(self._data.hosts)]

    def save_host(self, record: HostRecord) -> None:
        self._put(self._data.hosts, record.machine_id, record)

    def add_spend(self, *, lease: str, job: str, at: datetime, amount: int) -> None:
        data = self._data
        if lease in data.spend:
            old_job, old_at, old_amount = data.spend[lease]
            self._drop(data.spend_by_job[old_job], lease)
            self._drop(data.spend_by_hour[_hour(old_at)], lease)
            self._sum(_hour(old_at), -old_amount)
        self._put(data.spend, lease, (job, at, amount))
        self._put(data.spend_by_job[job], lease, None)
        self._put(data.spend_by_hour[_hour(at)], lease, None)
        self._sum(_hour(at), amount)

    def _sum(self, hour: int, amount: int) -> None:
        sums = self._data.spend_sums
        self._put(sums, hour, sums.get(hour, 0) + amount)

    def spend_since(self, when: datetime) -> int:
        data, first = self._data, _hour(when)
        # Whole hours by their sums; of the first one only what came after `when`.
        begun = (data.spend[lease] for lease in data.spend_by_hour.get(first, ()))
        whole = sum(amount for hour, amount in data.spend_sums.items() if hour > first)
        return whole + sum(amount for _, at, amount in begun if at >= when)

    def spend_of(self, job_id: str) -> int:
        leases = self._data.spend_by_job.get(job_id, ())
        return sum(self._data.spend[lease][2] for lease in leases)

    def reserved(self) -> int:
        return sum(lease.reserved for lease in self.open_leases())

    # beats and locks

    def beat(self, name: str, at: datetime, data: Mapping[str, Any] | None = None) -> None:
        self._put(self._data.beats, name, (at, data or {}))

    def beats(self) -> dict[str, tuple[datetime, Mapping[str, Any]]]:
        return dict(self._data.beats)

    def lock(self, name: str) -> None:
        """Held already: there is never a second transaction."""

    # retention

    def drop_events_before(self, when: datetime, limit: int) -> int:
        old = list(itertools.islice(self._old_history(when), limit))
        for drop in old:
            drop()
        return len(old)

    def _old_history(self, when: datetime) -> Iterator[Callable[[], None]]:
        """For each row that may go, in no promised order: what lets it go."""
        data = self._data
        ended = [job for status in TERMINAL for job in data.jobs_by_status.get(status, ())]
        # tests of endpoints, which are of no job
        ended += [name for name in data.outgoing_by_job if name.startswith("we_")]
        for job in ended:
            for event in data.events.get(job, _NOTHING).values():
                if event.at < when:
                    yield partial(self._drop_event, event)
        for job in ended:
            for outgoing_id in data.outgoing_by_job.get(job, _NOTHING).values():
                row = data.outgoing[outgoing_id]
                # what is still waiting is still owed
                if row.created_at < when and row.status is not OutgoingStatus.WAITING:
                    yield partial(self._drop_outgoing, row)
        for job in ended:
            of_job = data.deliveries.get(job, _NOTHING)
            for number, delivery in of_job.items():
                if delivery.tried_at < when:
                    yield partial(self._drop, of_job, number)

    def _drop_event(self, event: Event) -> None:
        self._drop(self._data.events[event.job], event.seq)
        if event.agent_seq is not None:
            self._drop(self._data.reports, (event.job, event.attempt, event.agent_seq))
        if event.webhook_id is not None:
            self._drop(self._data.webhook_ids, event.webhook_id)

    def _drop_outgoing(self, row: Outgoing) -> None:
        self._drop(self._data.outgoing, row.id)
        self._drop(self._data.outgoing_by_job[row.job], (row.seq, row.endpoint))


_NOTHING: Rows[Any, Any] = Rows()


def _found(rows: Mapping[K, V], key: K, what: str) -> V:
    try:
        return rows[key]
    except KeyError:
        raise NotFound(f"there is no {what}") from None
