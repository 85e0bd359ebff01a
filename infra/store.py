"""`state.store.Store` on PostgreSQL.

Every transaction begins with its own BEGIN, which is also the question whether the pooled
connection still lives: when the database was restarted meanwhile, the answer is another connection,
before anything was done that could be lost.

Rows in numbers go out as one statement, so that a hundred of them cost one round trip.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from sqlalchemy import Connection, Select, Table, delete, select, tuple_
from sqlalchemy.engine import Engine

from infra import codecs, schema, statements
from infra.codecs import Codec, Row
from infra.crypto import SecretBox
from infra.database import STATEMENT_TIMEOUT, make_engine, outages_translated
from infra.statements import Sql
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
from state.job import Job, JobRequest, Status
from state.lease import Lease
from state.orphan import Orphan

T = TypeVar("T")


class SqlStore:
    """Everything that must not be lost, in PostgreSQL.

    Nothing is connected before the first transaction. A process that was forked off opens its
    own connections and leaves its parent's alone.

    Args:
        database_url: `postgresql://…`.
        box: seals and opens the secrets at rest.
        pool_size: most transactions at once in this process; one more waits up to 10 s.
        statement_timeout: longest that a statement may take, waiting for locks included (ms).

    Raises:
        ValueError: the URL is not one of PostgreSQL.
    """

    def __init__(
        self,
        database_url: str,
        box: SecretBox,
        *,
        pool_size: int = 10,
        statement_timeout: int = STATEMENT_TIMEOUT,
    ) -> None:
        self._make_engine = partial(
            make_engine, database_url, pool_size=pool_size, statement_timeout=statement_timeout
        )
        self._pool_size = pool_size
        self._attempts = codecs.attempts(box)
        self._requests = RequestCache()
        self._box = box
        self._guard = threading.Lock()
        self._engine = self._make_engine()
        self._pid = os.getpid()

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """One transaction, on a connection of its own.

        Raises:
            StoreUnavailable: the database cannot be reached, or broke off; nothing of the
                transaction counts, unless the connection was lost during the commit itself.
            ValueError: a value cannot be stored (a NUL in a text, say).
        """
        with outages_translated():
            connection = self._begin()
            raw = _raw(connection)
            try:
                yield SqlTransaction(connection, raw, self._box, self._attempts, self._requests)
                _commit(raw)
            except BaseException:
                _roll_back(connection, raw)
                raise
            finally:
                connection.close()

    def close(self) -> None:
        """Close the idle connections; the next transaction opens new ones."""
        self._own_engine().dispose()

    def _own_engine(self) -> Engine:
        if self._pid != os.getpid():
            with self._guard:
                if self._pid != os.getpid():
                    # the parent's connections stay open, for they are the parent's
                    self._engine.dispose(close=False)
                    self._engine = self._make_engine()
                    self._pid = os.getpid()
        return self._engine

    def _begin(self) -> Connection:
        engine = self._own_engine()
        # each failure takes one dead connection out of the pool; then comes a fresh one
        for _ in range(self._pool_size):
            connection = engine.connect()
            try:
                _say(_raw(connection), b"BEGIN")
                return connection
            except psycopg.OperationalError:
                connection.invalidate()
                connection.close()
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
        connection = engine.connect()
        _say(_raw(connection), b"BEGIN")
        return connection


def _raw(connection: Connection) -> psycopg.Connection[Any]:
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def _say(raw: psycopg.Connection[Any], command: bytes) -> None:
    """Run a command without values or rows; the cursor that others need costs five times this."""
    result = raw.pgconn.exec_(command)
    if result.status == ExecStatus.COMMAND_OK:
        return
    if raw.pgconn.status != ConnStatus.OK:
        raise psycopg.OperationalError(raw.pgconn.error_message.decode(errors="replace").strip())
    raise psycopg.errors.error_from_result(result)


def _commit(raw: psycopg.Connection[Any]) -> None:
    if raw.info.transaction_status is not TransactionStatus.INTRANS:
        # COMMIT would answer "ROLLBACK" and be taken for a success
        raise RuntimeError("an error inside this transaction was swallowed: nothing is committed")
    _say(raw, b"COMMIT")


def _roll_back(connection: Connection, raw: psycopg.Connection[Any]) -> None:
    """Never raises, for it would hide what went wrong first."""
    try:
        if raw.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            _say(raw, b"ROLLBACK")
            return
    except psycopg.Error:
        pass
    # broken, or interrupted in mid-statement: the server rolls back when it is gone
    connection.invalidate()


class RequestCache:
    """The requests of jobs that this process met lately. They never change."""

    LIMIT = 10_000

    def __init__(self) -> None:
        self._requests: dict[str, JobRequest] = {}

    def known(self, ids: Collection[str]) -> dict[str, JobRequest]:
        requests = self._requests
        return {job_id: requests[job_id] for job_id in ids if job_id in requests}

    def keep(self, fresh: Mapping[str, JobRequest]) -> None:
        # A new dictionary instead of a lock: who reads meanwhile sees the old one.
        kept = self._requests if len(self._requests) < self.LIMIT else {}
        self._requests = {**kept, **fresh}


class SqlTransaction:
    """One transaction of an `SqlStore`. See `state.store.Transaction` for what each call means."""

    def __init__(
        self,
        core: Connection,
        raw: psycopg.Connection[Any],
        box: SecretBox,
        attempts: Codec[Attempt],
        requests: RequestCache,
    ) -> None:
        self._core, self._raw, self._box, self._attempts = core, raw, box, attempts
        self._requests = requests
        #: jobs as they were read and locked by this transaction: nobody else can have changed them
        self._locked: dict[str, Job] = {}

    # running statements

    def _run(self, sql: Sql, values: Mapping[str, Any]) -> psycopg.Cursor[Any]:
        try:
            return self._raw.execute(sql, values)
        except psycopg.errors.UniqueViolation as error:
            raise Conflict(f"another one has the same {error.diag.constraint_name}") from None
        except (psycopg.DataError, UnicodeEncodeError) as error:
            raise ValueError(f"this cannot be stored: {type(error).__name__}") from error

    def _run_all(self, sql: Sql, values: Sequence[Mapping[str, Any]]) -> int:
        """Runs `sql` for each of `values` in one round trip; how many rows it touched."""
        if not values:
            return 0
        if len(values) == 1:
            return self._run(sql, values[0]).rowcount
        try:
            with self._raw.cursor() as cursor:
                cursor.executemany(sql, values)
                return cursor.rowcount
        except (psycopg.DataError, UnicodeEncodeError) as error:
            raise ValueError(f"this cannot be stored: {type(error).__name__}") from error

    def _read(self, sql: Sql, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        try:
            return self._raw.execute(sql, values).fetchall()
        except (psycopg.DataError, UnicodeEncodeError) as error:
            if getattr(error, "sqlstate", None):
                raise
            # a NUL or half a surrogate pair in a key: refused before it was sent, and no row
            # can have such a key
            return []

    # the same few things for every table

    def _add(self, codec: Codec[T], value: T, what: str) -> None:
        self._insert(codec.table, codec.row(value), what)

    def _insert(self, table: Table, row: Row, what: str) -> None:
        if self._run(statements.insert_new(table, tuple(row)), row).rowcount == 0:
            raise Conflict(f"{what} exists already")

    def _save(self, codec: Codec[T], value: T, what: str, keys: tuple[str, ...] = ("id",)) -> None:
        row = codec.row(value)
        values = {f"key_{key}": row.pop(key) for key in keys} | row
        if self._run(statements.change(codec.table, keys, tuple(row)), values).rowcount == 0:
            raise NotFound(f"there is no {what}")

    def _put(self, codec: Codec[T], value: T, keys: tuple[str, ...]) -> None:
        row = codec.row(value)
        self._run(statements.insert_or_replace(codec.table, keys, tuple(row)), row)

    def _find(self, codec: Codec[T], *, lock: bool = False, **keys: Any) -> T | None:
        """The row of a unique key, or None."""
        sql = statements.fetch(codec.table, codec.names, tuple(keys), lock=lock)
        found = self._read(sql, {f"key_{key}": wanted for key, wanted in keys.items()})
        return codec.value(found[0]) if found else None

    def _get(self, codec: Codec[T], what: str, *, lock: bool = False, **keys: Any) -> T:
        found = self._find(codec, lock=lock, **keys)
        if found is None:
            raise NotFound(f"there is no {what}")
        return found

    def _values(self, codec: Codec[T], wanted: Select[Any]) -> list[T]:
        return [codec.value(row) for row in self._core.execute(wanted)]

    def _claim(
        self, table: Table, columns: tuple[str, ...], now: datetime, until: datetime, limit: int
    ) -> list[tuple[Any, ...]]:
        """The wanted columns of what was due, oldest due first."""
        found = self._read(
            statements.claim(table, columns), {"now": now, "until": until, "limit": limit}
        )
        return [row[2:] for row in sorted(found, key=lambda row: row[:2])]

    def _claim_all(self, codec: Codec[T], now: datetime, until: datetime, limit: int) -> list[T]:
        return [
            codec.value(row) for row in self._claim(codec.table, codec.names, now, until, limit)
        ]

    # jobs

    def add_job(self, job: Job, *, webhook_secrets: Sequence[Secret] = ()) -> None:
        self._insert(schema.jobs, codecs.job_to_row(job), f"job {job.id}")
        self._seal(job.id, webhook_secrets)

    def _seal(self, owner_id: str, webhook_secrets: Sequence[Secret]) -> None:
        sealed = [
            {"job": owner_id, "place": place, "sealed": self._box.seal(secret)}
            for place, secret in enumerate(webhook_secrets)
        ]
        if sealed:
            sql = statements.insert_new(schema.webhook_secrets, tuple(sealed[0]))
            self._run_all(sql, sealed)

    def job(self, job_id: str, *, lock: bool = False) -> Job:
        return self._get(codecs.JOBS, f"job {job_id}", lock=lock, id=job_id)

    def jobs(self, ids: Collection[str], *, lock: bool = False) -> dict[str, Job]:
        found = self._read(statements.jobs_by_id(lock=lock), {"ids": list(ids)})
        requests = self._requests_of([row[0] for row in found])
        jobs = {row[0]: codecs.job_of(row, requests[row[0]]) for row in found}
        if lock:
            self._locked |= jobs
        return jobs

    def _requests_of(self, ids: Collection[str]) -> Mapping[str, JobRequest]:
        """What was asked for: half of a job's row, and the half that never changes."""
        requests = self._requests.known(ids)
        missing = [job_id for job_id in ids if job_id not in requests]
        if missing:
            read = self._read(statements.requests_by_id(), {"ids": missing})
            fresh = {job_id: codecs.request_of(stored) for job_id, stored in read}
            self._requests.keep(fresh)
            requests |= fresh
        return requests

    def save_job(self, job: Job) -> None:
        self.save_jobs([job])

    def save_jobs(self, jobs: Sequence[Job]) -> None:
        news: list[Row] = []
        rest: list[Row] = []
        for job in {job.id: job for job in jobs}.values():
            before = self._locked.get(job.id)
            if before is not None and codecs.only_news(before, job):
                news.append(codecs.job_news(job))
            else:
                rest.append(codecs.job_changes(job))
                # what is stored is no longer what was read
                self._locked.pop(job.id, None)
        self._change_jobs(news)
        self._change_jobs(rest)

    def _change_jobs(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        sql = statements.change_all(schema.jobs, tuple(rows[0]))
        if self._run(sql, {"rows": codecs.document(rows)}).rowcount != len(rows):
            raise NotFound(f"there is no job {rows[0]['id']}" if len(rows) == 1 else _SOME_MISSING)

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
        if not all(map(codecs.storable, (owner, dataset, text, before, *(metadata or {}).items()))):
            return []
        wanted = statements.job_listing(owner, statuses, metadata, dataset, before)
        if text is not None:
            wanted = wanted.where(statements.job_says(text))
        return self._values(codecs.JOBS, wanted.limit(limit))

    def count_jobs(self) -> dict[Status, int]:
        found = self._core.execute(statements.job_counts())
        return {Status(status): count for status, count in found}

    def claim_due_jobs(self, now: datetime, until: datetime, limit: int) -> list[Job]:
        return self._claim_all(codecs.JOBS, now, until, limit)

    def webhook_secrets(self, owner_id: str) -> list[Secret]:
        found = self._read(statements.secrets_of_job(), {"job": owner_id})
        return [self._box.open(sealed) for (sealed,) in found]

    def set_webhook_secrets(self, owner_id: str, secrets: Sequence[Secret]) -> None:
        table = schema.webhook_secrets
        self._core.execute(delete(table).where(table.c.job == owner_id))
        self._seal(owner_id, secrets)

    # attempts

    def add_attempt(self, attempt: Attempt) -> None:
        self._add(self._attempts, attempt, f"attempt {attempt.number} of job {attempt.job}")

    def save_attempt(self, attempt: Attempt) -> None:
        what = f"attempt {attempt.number} of job {attempt.job}"
        self._save(self._attempts, attempt, what, ("job", "number"))

    def attempt(self, job_id: str, number: int, *, lock: bool = False) -> Attempt:
        what = f"attempt {number} of job {job_id}"
        return self._get(self._attempts, what, lock=lock, job=job_id, number=number)

    def list_attempts(self, job_id: str) -> list[Attempt]:
        wanted = statements.listing(self._attempts, "number")
        return self._values(self._attempts, wanted.where(schema.attempts.c.job == job_id))

    def attempts_over(self, when: datetime, limit: int) -> list[Attempt]:
        wanted = statements.attempts_over(self._attempts, when)
        return self._values(self._attempts, wanted.limit(limit))

    # leases

    def add_lease(self, lease: Lease) -> None:
        what = f"lease {lease.id}, its label, its token, or an open lease of this attempt"
        self._add(codecs.LEASES, lease, what)

    def save_lease(self, lease: Lease) -> None:
        self._save(codecs.LEASES, lease, f"lease {lease.id}")

    def lease(self, lease_id: str, *, lock: bool = False) -> Lease:
        return self._get(codecs.LEASES, f"lease {lease_id}", lock=lock, id=lease_id)

    def leases_of(self, job_id: str) -> list[Lease]:
        wanted = statements.listing(codecs.LEASES, "created_at", "id")
        return self._values(codecs.LEASES, wanted.where(schema.leases.c.job == job_id))

    def leases_of_jobs(self, ids: Collection[str]) -> dict[str, list[Lease]]:
        found: dict[str, list[Lease]] = {job_id: [] for job_id in ids}
        for row in self._read(statements.leases_of_jobs(), {"ids": list(found)}):
            lease = codecs.LEASES.value(row)
            found[lease.job].append(lease)
        return found

    def lease_by_token(self, token_hash: str, *, lock: bool = False) -> Lease | None:
        return self._find(codecs.LEASES, lock=lock, token_hash=token_hash)

    def lease_by_label(self, label: str, *, lock: bool = False) -> Lease | None:
        return self._find(codecs.LEASES, lock=lock, label=label)

    def leases_since(self, when: datetime) -> list[Lease]:
        return self._values(codecs.LEASES, statements.leases_since(when))

    def leases_between(
        self,
        start: datetime,
        end: datetime,
        *,
        after: tuple[datetime, str] | None = None,
        limit: int = 1000,
    ) -> list[Lease]:
        wanted = statements.leases_between(start, end, after).limit(limit)
        return self._values(codecs.LEASES, wanted)

    def open_leases(self) -> list[Lease]:
        return self._values(codecs.LEASES, statements.open_leases())

    def open_rehearsals(self) -> list[Lease]:
        return self._values(codecs.LEASES, statements.open_leases(rehearsed=True))

    def offers_taken(self, offer_ids: Collection[str]) -> set[str]:
        found = self._read(statements.offers_taken(), {"ids": list(offer_ids)})
        return {offer_id for (offer_id,) in found}

    def claim_due_leases(self, now: datetime, until: datetime, limit: int) -> list[Lease]:
        return self._claim_all(codecs.LEASES, now, until, limit)

    # orphans

    def save_orphan(self, orphan: Orphan) -> None:
        self._put(codecs.ORPHANS, orphan, ("id",))

    def orphan(self, orphan_id: str) -> Orphan | None:
        return self._find(codecs.ORPHANS, id=orphan_id)

    def open_orphans(self) -> list[Orphan]:
        return self._values(codecs.ORPHANS, statements.open_orphans())

    def orphans_between(self, start: datetime, end: datetime) -> list[Orphan]:
        return self._values(codecs.ORPHANS, statements.orphans_between(start, end))

    def orphans_labelled(self, label: str) -> list[Orphan]:
        return self._values(codecs.ORPHANS, statements.orphans_labelled(label))

    # events

    def add_events(self, events: Sequence[Event]) -> list[bool]:
        if not events:
            return []
        rows = [codecs.EVENTS.plain(event) for event in events]
        sql = statements.insert_all_new(schema.events, tuple(rows[0]), _EVENT_KEYS)
        added = set(self._run(sql, {"rows": codecs.document(rows)}).fetchall())
        new = []
        for row in rows:
            key = tuple(row[name] for name in _EVENT_KEYS)
            new.append(key in added)
            # of two that are the same, the first is the new one
            added.discard(key)
        self._check_repeats(
            [event for event, is_new in zip(events, new, strict=True) if not is_new]
        )
        return new

    def _check_repeats(self, repeats: Sequence[Event]) -> None:
        """A repeat is known by its report; anything else took a number that is in use."""
        reports = [event for event in repeats if event.agent_seq is not None or event.webhook_id]
        known: set[tuple[Any, ...]] = set()
        if reports:
            for *report, webhook_id in self._core.execute(statements.reports_like(reports)):
                known |= {tuple(report), (webhook_id,)}
        for event in repeats:
            if not known & _report_keys(event):
                raise Conflict(f"event {event.seq} of job {event.job} exists already")

    def events(
        self, job_id: str, *, after: int = 0, limit: int = 100, type: str | None = None
    ) -> list[Event]:
        wanted = {"job": job_id, "after": after, "limit": limit, "type": type}
        found = self._read(statements.events_of_job(one_type=type is not None), wanted)
        return [codecs.EVENTS.value(row) for row in found]

    def transitions_of(self, ids: Collection[str]) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {job_id: [] for job_id in ids}
        for row in self._read(statements.transitions_of_jobs(), {"ids": list(found)}):
            event = codecs.EVENTS.value(row)
            found[event.job].append(event)
        return found

    def known_reports(self, webhook_ids: Collection[str]) -> set[str]:
        found = self._read(statements.known_webhook_ids(), {"ids": list(webhook_ids)})
        return {webhook_id for (webhook_id,) in found}

    # webhook endpoints

    def add_endpoint(self, endpoint: Endpoint, *, secrets: Sequence[Secret] = ()) -> None:
        self._add(codecs.ENDPOINTS, endpoint, f"webhook endpoint {endpoint.id}")
        self._seal(endpoint.id, secrets)

    def save_endpoint(self, endpoint: Endpoint) -> None:
        self._save(codecs.ENDPOINTS, endpoint, f"webhook endpoint {endpoint.id}")

    def endpoint(self, endpoint_id: str, *, lock: bool = False) -> Endpoint:
        what = f"webhook endpoint {endpoint_id}"
        return self._get(codecs.ENDPOINTS, what, lock=lock, id=endpoint_id)

    def endpoints(self, owner: str | None = None) -> list[Endpoint]:
        if owner is None:
            return self._values(codecs.ENDPOINTS, statements.listing(codecs.ENDPOINTS, "id"))
        found = self._read(statements.endpoints_of_owner(), {"owner": owner})
        return [codecs.ENDPOINTS.value(row) for row in found]

    def delete_endpoint(self, endpoint_id: str) -> None:
        table = schema.webhook_endpoints
        self._core.execute(delete(table).where(table.c.id == endpoint_id))
        self.set_webhook_secrets(endpoint_id, [])

    # what goes out

    def add_outgoing(self, rows: Sequence[Outgoing]) -> None:
        if not rows:
            return
        values = [codecs.OUTGOING.plain(row) for row in rows]
        sql = statements.insert_all_new(schema.outgoing, tuple(values[0]), ("id",))
        if self._run(sql, {"rows": codecs.document(values)}).rowcount != len(rows):
            raise Conflict("an outgoing webhook of this id exists already")

    def save_outgoing(self, row: Outgoing) -> None:
        self._save(codecs.OUTGOING, row, f"outgoing webhook {row.id}")

    def outgoing(self, outgoing_id: str, *, lock: bool = False) -> Outgoing:
        what = f"outgoing webhook {outgoing_id}"
        return self._get(codecs.OUTGOING, what, lock=lock, id=outgoing_id)

    def next_outgoing(self, queue: str) -> Outgoing | None:
        job, endpoint = parts_of(queue)
        found = self._read(statements.next_outgoing(), {"job": job, "endpoint": endpoint})
        return codecs.OUTGOING.value(found[0]) if found else None

    def queues_of(self, job_id: str) -> list[str]:
        found = self._read(statements.waiting_endpoints(), {"job": job_id})
        return sorted(queue_of(job_id, endpoint) for (endpoint,) in found)

    def claim_due_outgoing(self, now: datetime, until: datetime, limit: int) -> list[str]:
        found = self._claim(schema.outgoing, ("job", "endpoint"), now, until, limit)
        return [queue_of(job, endpoint) for job, endpoint in found]

    def waiting_outgoing(self, endpoint_id: str, limit: int) -> list[Outgoing]:
        wanted = statements.waiting_for(endpoint_id)
        return self._values(codecs.OUTGOING, wanted.limit(limit))

    def disable_outgoing(self, endpoint_id: str, now: datetime) -> int:
        return self._core.execute(statements.given_up_on(endpoint_id, now)).rowcount

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
        if not all(map(codecs.storable, (owner, job, endpoint, before and before[1]))):
            return []
        wanted = statements.outgoing_page(owner, job, endpoint, status, before)
        return self._values(codecs.OUTGOING, wanted.limit(limit))

    def webhook_backlog(self, since: datetime) -> list[Backlog]:
        found = [
            Backlog(endpoint=endpoint, status=OutgoingStatus(status), rows=rows, oldest=oldest)
            for endpoint, status, rows, oldest in self._core.execute(statements.backlog(since))
        ]
        return sorted(found, key=lambda item: (item.endpoint, item.status))

    def log_delivery(self, delivery: Delivery) -> None:
        self._add(codecs.DELIVERIES, delivery, "this delivery")

    def deliveries(self, job_id: str, *, limit: int = 100) -> list[Delivery]:
        wanted = statements.listing(codecs.DELIVERIES, "-tried_at", "-id")
        return self._values(
            codecs.DELIVERIES, wanted.where(schema.deliveries.c.job == job_id).limit(limit)
        )

    def tries_of(self, outgoing_ids: Collection[str]) -> list[Delivery]:
        wanted = statements.listing(codecs.DELIVERIES, "tried_at", "id")
        ids = [name for name in outgoing_ids if codecs.storable(name)]
        return self._values(codecs.DELIVERIES, wanted.where(schema.deliveries.c.outgoing.in_(ids)))

    def list_outgoing(self, job_id: str) -> list[Outgoing]:
        wanted = statements.listing(codecs.OUTGOING, "seq", "endpoint")
        return self._values(codecs.OUTGOING, wanted.where(schema.outgoing.c.job == job_id))

    # datasets and artefacts

    def add_dataset(self, dataset: Dataset) -> None:
        self._add(codecs.DATASETS, dataset, f"dataset {dataset.id}")

    def save_dataset(self, dataset: Dataset) -> None:
        self._save(codecs.DATASETS, dataset, f"dataset {dataset.id}")

    def dataset(self, dataset_id: str, *, lock: bool = False) -> Dataset:
        return self._get(codecs.DATASETS, f"dataset {dataset_id}", lock=lock, id=dataset_id)

    def claim_due_datasets(self, now: datetime, until: datetime, limit: int) -> list[Dataset]:
        return self._claim_all(codecs.DATASETS, now, until, limit)

    def datasets_before(self, when: datetime, limit: int) -> list[Dataset]:
        return self._values(codecs.DATASETS, statements.unused_datasets(when).limit(limit))

    def delete_dataset(self, dataset_id: str) -> None:
        self._core.execute(delete(schema.datasets).where(schema.datasets.c.id == dataset_id))

    def put_artefacts(self, rows: Sequence[Artefact]) -> None:
        values = [codecs.ARTEFACTS.row(row) for row in rows]
        if values:
            self._run_all(
                statements.insert_or_replace(schema.artefacts, ("job", "name"), tuple(values[0])),
                values,
            )

    def artefacts(self, job_id: str) -> list[Artefact]:
        wanted = statements.listing(codecs.ARTEFACTS, "created_at", "name")
        return self._values(codecs.ARTEFACTS, wanted.where(schema.artefacts.c.job == job_id))

    def artefacts_before(self, when: datetime, limit: int) -> list[Artefact]:
        return self._values(codecs.ARTEFACTS, statements.kept_artefacts(when).limit(limit))

    # keys

    def add_api_key(self, key: ApiKey) -> None:
        self._add(codecs.API_KEYS, key, f"API key {key.id}")

    def save_api_key(self, key: ApiKey) -> None:
        self._save(codecs.API_KEYS, key, f"API key {key.id}")

    def api_key_by_hash(self, key_hash: str) -> ApiKey | None:
        return self._find(codecs.API_KEYS, hash=key_hash)

    def api_keys(self) -> list[ApiKey]:
        wanted = statements.listing(codecs.API_KEYS, "created_at", "id")
        return self._values(codecs.API_KEYS, wanted)

    def begin_idempotent(self, row: Idempotent) -> Idempotent | None:
        values = codecs.IDEMPOTENT.row(row)
        while True:
            # waits here while another transaction has just put the same key in
            if (
                self._run(
                    statements.insert_new(schema.idempotency_keys, tuple(values)), values
                ).rowcount
                == 1
            ):
                return None
            stored = self._find(codecs.IDEMPOTENT, owner=row.owner, key=row.key)
            # None: dropped between the two statements, so it is free again
            if stored is not None:
                return stored

    def finish_idempotent(self, owner: str, key: str, answer: Mapping[str, Any]) -> None:
        values = {"key_owner": owner, "key_key": key, "answer": codecs.jsonb(answer)}
        sql = statements.change(schema.idempotency_keys, ("owner", "key"), ("answer",))
        if self._run(sql, values).rowcount == 0:
            raise NotFound("there is no such idempotency key")

    def drop_idempotent_before(self, when: datetime, limit: int) -> int:
        table = schema.idempotency_keys
        old = select(table.c.owner, table.c.key).where(table.c.created_at < when).limit(limit)
        gone = delete(table).where(tuple_(table.c.owner, table.c.key).in_(old))
        return self._core.execute(gone).rowcount

    # hosts and money

    def host(self, machine_id: str) -> HostRecord | None:
        return self._find(codecs.HOSTS, machine_id=machine_id)

    def hosts(self) -> list[HostRecord]:
        wanted = statements.listing(codecs.HOSTS, "machine_id")
        return self._values(codecs.HOSTS, wanted)

    def save_host(self, record: HostRecord) -> None:
        self._put(codecs.HOSTS, record, ("machine_id",))

    def add_spend(self, *, lease: str, job: str, at: datetime, amount: int) -> None:
        row = {"lease": lease, "job": job, "at": at, "amount": amount}
        self._run(statements.insert_or_replace(schema.spend, ("lease",), tuple(row)), row)

    def spend_since(self, when: datetime) -> int:
        return self._sum(statements.spent_since(when))

    def spend_of(self, job_id: str) -> int:
        return self._sum(statements.spent_on(job_id))

    def reserved(self) -> int:
        return self._sum(statements.reserved())

    def _sum(self, wanted: Select[Any]) -> int:
        return int(self._core.execute(wanted).scalar_one() or 0)

    # beats

    def beat(self, name: str, at: datetime, data: Mapping[str, Any] | None = None) -> None:
        row = {"name": name, "at": at, "data": codecs.jsonb(data or {})}
        self._run(statements.insert_or_replace(schema.beats, ("name",), tuple(row)), row)

    def beats(self) -> dict[str, tuple[datetime, Mapping[str, Any]]]:
        found = self._core.execute(
            select(schema.beats.c.name, schema.beats.c.at, schema.beats.c.data)
        )
        return {name: (at, data) for name, at, data in found}

    def lock(self, name: str) -> None:
        self._run(statements.lock_name(), {"name": name})

    # retention

    def drop_events_before(self, when: datetime, limit: int) -> int:
        dropped = 0
        for deletion in statements.deletions(when):
            dropped += self._core.execute(deletion, {"limit": limit - dropped}).rowcount
        return dropped


#: By what an event is told from all others.
_EVENT_KEYS = ("job", "seq", "attempt", "agent_seq", "webhook_id")
_SOME_MISSING = "at least one of these jobs does not exist"


def _report_keys(event: Event) -> set[tuple[Any, ...]]:
    """By what a repeat of this event's report is known."""
    keys: set[tuple[Any, ...]] = set()
    if event.webhook_id is not None:
        keys.add((event.webhook_id,))
    if event.agent_seq is not None:
        keys.add((event.job, event.attempt, event.agent_seq))
    return keys
