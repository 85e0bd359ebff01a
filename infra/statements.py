"""The SQL of `infra.store`: built in SQLAlchemy Core, which knows the schema, and compiled once.

Those that are `Sql` are run by psycopg itself; running them through SQLAlchemy would double the
cost of a short transaction. The `Select`s and `Delete`s at the end vary with what is asked, or are
rare, and go through SQLAlchemy.

Parameters have their column's name; those that a row is found by have `key_` before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Delete,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql.expression import ClauseElement

from infra import codecs
from infra.codecs import Codec
from infra.schema import (
    artefacts,
    attempts,
    datasets,
    deliveries,
    events,
    jobs,
    leases,
    orphans,
    outgoing,
    spend,
    webhook_endpoints,
    webhook_secrets,
)
from state import rehearsal
from state.events import Event, OutgoingStatus
from state.job import TERMINAL, Status
from state.lease import LeaseStatus

#: A statement as psycopg wants it.
Sql = bytes


def _sql(statement: ClauseElement, **options: Any) -> Sql:
    dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy's own gap
    return str(statement.compile(dialect=dialect, **options)).encode()


def _matches(table: Table, keys: Sequence[str]) -> list[ColumnElement[bool]]:
    return [table.c[key] == bindparam(f"key_{key}") for key in keys]


def _one_of(column: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """`column` is in the list given as parameter `name`."""
    return column == func.any(bindparam(name, type_=ARRAY(Text)))


# --- for every table --------------------------------------------------------------------------


@cache
def insert_new(table: Table, names: tuple[str, ...]) -> Sql:
    """Inserts nothing when a unique key is taken, and leaves the transaction usable."""
    return _sql(insert(table).on_conflict_do_nothing(), column_keys=names)


@cache
def insert_all_new(table: Table, names: tuple[str, ...], keys: tuple[str, ...]) -> Sql:
    """As `insert_new` for every row of the parameter `rows`; answers the keys of those that were.

    One statement for all: each one costs the server and us more than the row it brings.
    """
    columns = ", ".join(f'"{name}"' for name in names)
    answered = ", ".join(f'"{key}"' for key in keys)
    return (
        f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {_rows_of(table, names)}"  # noqa: S608 -- names of our own schema
        f" ON CONFLICT DO NOTHING RETURNING {answered}"
    ).encode()


@cache
def change_all(table: Table, names: tuple[str, ...]) -> Sql:
    """As `change` for every row of the parameter `rows`, each found by its id."""
    changes = ", ".join(f'"{name}" = rows."{name}"' for name in names if name != "id")
    return (
        f"UPDATE {table.name} SET {changes} FROM {_rows_of(table, names)}"  # noqa: S608 -- names of our own schema
        f" WHERE {table.name}.id = rows.id"
    ).encode()


def _rows_of(table: Table, names: tuple[str, ...]) -> str:
    dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy's own gap
    typed = ", ".join(f'"{name}" {table.c[name].type.compile(dialect)}' for name in names)
    return f"json_to_recordset(%(rows)s) AS rows ({typed})"


@cache
def insert_or_replace(table: Table, keys: tuple[str, ...], names: tuple[str, ...]) -> Sql:
    statement = insert(table)
    changes = {name: statement.excluded[name] for name in names if name not in keys}
    return _sql(
        statement.on_conflict_do_update(index_elements=keys, set_=changes), column_keys=names
    )


@cache
def change(table: Table, keys: tuple[str, ...], names: tuple[str, ...]) -> Sql:
    return _sql(update(table).where(*_matches(table, keys)), column_keys=names)


@cache
def fetch(table: Table, names: tuple[str, ...], keys: tuple[str, ...], *, lock: bool) -> Sql:
    """The columns `names` of the rows found by `keys`."""
    statement = select(*(table.c[name] for name in names)).where(*_matches(table, keys))
    return _sql(statement.with_for_update() if lock else statement)


@cache
def claim(table: Table, names: tuple[str, ...]) -> Sql:
    """Takes what is due. Answers the old due time, the id, and the columns `names`.

    Rows that another worker holds are passed over, not waited for.
    """
    due = (
        select(table.c.id, table.c.due_at.label("was"))
        .where(table.c.due_at <= bindparam("now"))
        .order_by(table.c.due_at, table.c.id)
        .limit(bindparam("limit"))
        .with_for_update(of=table, skip_locked=True)
    )
    if table is outgoing:
        first = _first_waiting()
        is_first = and_(*(first.c[name] == outgoing.c[name] for name in ("job", "endpoint", "seq")))
        due = due.join(first, is_first).where(_IS_WAITING)
    taken = due.cte("taken")
    return _sql(
        update(table)
        .where(table.c.id == taken.c.id)
        .values(due_at=bindparam("until"))
        .returning(taken.c.was, taken.c.id, *(table.c[name] for name in names))
    )


# --- for one ----------------------------------------------------------------------------------


# Literals, so that every plan of a prepared statement can use the partial indexes.
def _is(column: ColumnElement[str], value: str) -> ColumnElement[bool]:
    return column == literal_column(f"'{value}'")


_IS_WAITING = _is(outgoing.c.status, OutgoingStatus.WAITING.value)
_IS_OPEN = leases.c.status != literal_column(f"'{LeaseStatus.RELEASED.value}'")
#: Not of a machine that only pretends.
_IS_REAL = ~leases.c.label.startswith(rehearsal.MARK)
_HAS_ENDED = or_(*(_is(jobs.c.status, status.value) for status in sorted(TERMINAL)))


def _first_waiting() -> CTE:
    """Of each queue that waits, the number of its first row.

    One pass over the rows that wait: a dead endpoint's long queue makes it longer, whereas asking
    of each due row whether an earlier one waits would take the square of that queue.
    """
    first = func.min(outgoing.c.seq).label("seq")
    queue = (outgoing.c.job, outgoing.c.endpoint)
    return select(*queue, first).where(_IS_WAITING).group_by(*queue).cte("first_waiting")


@cache
def jobs_by_id(*, lock: bool) -> Sql:
    """Without their requests."""
    names = codecs.JOB_NAMES
    statement = select(*(jobs.c[name] for name in names)).where(_one_of(jobs.c.id, "ids"))
    # locked in this order
    statement = statement.order_by(jobs.c.id)
    return _sql(statement.with_for_update() if lock else statement)


@cache
def requests_by_id() -> Sql:
    return _sql(select(jobs.c.id, jobs.c.request).where(_one_of(jobs.c.id, "ids")))


@cache
def secrets_of_job() -> Sql:
    wanted = webhook_secrets.c.job == bindparam("job")
    return _sql(select(webhook_secrets.c.sealed).where(wanted).order_by(webhook_secrets.c.place))


@cache
def events_of_job(*, one_type: bool) -> Sql:
    wanted = [events.c.job == bindparam("job"), events.c.seq > bindparam("after")]
    if one_type:
        wanted.append(events.c.type == bindparam("type"))
    statement = select(*codecs.EVENTS.columns).where(*wanted).order_by(events.c.seq)
    return _sql(statement.limit(bindparam("limit")))


@cache
def leases_of_jobs() -> Sql:
    wanted = listing(codecs.LEASES, "created_at", "id")
    return _sql(wanted.where(_one_of(leases.c.job, "ids")))


@cache
def transitions_of_jobs() -> Sql:
    wanted = (_one_of(events.c.job, "ids"), events.c.type == literal_column("'transition'"))
    statement = select(*codecs.EVENTS.columns).where(*wanted)
    return _sql(statement.order_by(events.c.job, events.c.seq))


@cache
def known_webhook_ids() -> Sql:
    return _sql(select(events.c.webhook_id).where(_one_of(events.c.webhook_id, "ids")))


@cache
def next_outgoing() -> Sql:
    queue = (
        outgoing.c.job == bindparam("job"),
        outgoing.c.endpoint == bindparam("endpoint"),
    )
    statement = select(*codecs.OUTGOING.columns).where(*queue, _IS_WAITING)
    return _sql(statement.order_by(outgoing.c.seq).limit(literal_column("1")))


@cache
def waiting_endpoints() -> Sql:
    """The endpoints to which something of a job waits to be sent."""
    wanted = (outgoing.c.job == bindparam("job"), _IS_WAITING)
    return _sql(select(outgoing.c.endpoint).where(*wanted).distinct())


@cache
def endpoints_of_owner() -> Sql:
    wanted = webhook_endpoints.c.owner == bindparam("owner")
    statement = select(*codecs.ENDPOINTS.columns).where(wanted)
    return _sql(statement.order_by(webhook_endpoints.c.id))


@cache
def lock_name() -> Sql:
    number = func.hashtextextended(bindparam("name"), literal_column("0"))
    return _sql(select(func.pg_advisory_xact_lock(number)))


# --- through SQLAlchemy -----------------------------------------------------------------------


def listing(codec: Codec[Any], *order: str) -> Select[Any]:
    """All rows, ordered by these columns; `-` before a name: descending."""
    columns = codec.table.c
    return select(*codec.columns).order_by(
        *(columns[name[1:]].desc() if name.startswith("-") else columns[name] for name in order)
    )


def job_listing(
    owner: str | None,
    statuses: Collection[Status],
    metadata: Mapping[str, str] | None,
    dataset: str | None,
    before: str | None,
) -> Select[Any]:
    wanted = listing(codecs.JOBS, "-id")
    if owner is not None:
        wanted = wanted.where(jobs.c.owner == owner)
    if statuses:
        wanted = wanted.where(jobs.c.status.in_([status.value for status in statuses]))
    if metadata:
        wanted = wanted.where(jobs.c.metadata.contains(dict(metadata)))
    if dataset is not None:
        wanted = wanted.where(jobs.c.dataset_id == dataset)
    if before is not None:
        wanted = wanted.where(jobs.c.id < before)
    return wanted


def job_says(text: str) -> ColumnElement[bool]:
    """The job has `text` in its id, base or metadata, or had the machine `text`."""
    said = func.jsonb_each_text(jobs.c.metadata).table_valued("key", "value")
    either = or_(_holds(said.c.key, text), _holds(said.c.value, text))
    rented = exists().where(leases.c.job == jobs.c.id, leases.c.machine_id == text)
    return or_(
        _holds(jobs.c.id, text),
        _holds(jobs.c.request["base"].astext, text),
        exists(select(literal_column("1")).select_from(said).where(either)),
        rented,
    )


def _holds(column: Any, text: str) -> ColumnElement[bool]:
    wanted: ColumnElement[bool] = column.icontains(text, autoescape=True)
    return wanted


def waiting_for(endpoint: str) -> Select[Any]:
    wanted = listing(codecs.OUTGOING, "created_at", "job", "seq")
    return wanted.where(outgoing.c.endpoint == endpoint, _IS_WAITING)


def given_up_on(endpoint: str, now: datetime) -> Update:
    """Whatever waits for an endpoint, disabled."""
    waiting = update(outgoing).where(outgoing.c.endpoint == endpoint, _IS_WAITING)
    return waiting.values(status=OutgoingStatus.DISABLED.value, due_at=None, ended_at=now)


def outgoing_page(
    owner: str | None,
    job: str | None,
    endpoint: str | None,
    status: OutgoingStatus | None,
    before: tuple[datetime, str] | None,
) -> Select[Any]:
    wanted = listing(codecs.OUTGOING, "-created_at", "-id")
    for name, value in (("owner", owner), ("job", job), ("endpoint", endpoint)):
        if value is not None:
            wanted = wanted.where(outgoing.c[name] == value)
    if endpoint:
        # said apart, for the partial index
        wanted = wanted.where(outgoing.c.endpoint != literal_column("''"))
    if status is not None:
        wanted = wanted.where(_is(outgoing.c.status, status.value))
    if before is not None:
        wanted = wanted.where(tuple_(outgoing.c.created_at, outgoing.c.id) < tuple_(*before))
    return wanted


def backlog(since: datetime) -> Select[Any]:
    """Endpoint, status, rows and oldest time of what waits, and of what was given up lately."""
    waits = select(
        outgoing.c.endpoint, outgoing.c.status, func.count(), func.min(outgoing.c.created_at)
    ).where(_IS_WAITING)
    lost = select(
        outgoing.c.endpoint, outgoing.c.status, func.count(), func.min(outgoing.c.ended_at)
    ).where(_is(outgoing.c.status, OutgoingStatus.EXHAUSTED.value), outgoing.c.ended_at >= since)
    by_endpoint = (outgoing.c.endpoint, outgoing.c.status)
    both = union_all(waits.group_by(*by_endpoint), lost.group_by(*by_endpoint)).subquery()
    return select(both)


def attempts_over(codec: Codec[Any], when: datetime) -> Select[Any]:
    wanted = listing(codec, "created_at", "job", "number")
    wanted = wanted.join(jobs, jobs.c.id == attempts.c.job)
    return wanted.where(~attempts.c.cleared, _HAS_ENDED, jobs.c.finished_at < when)


def job_counts() -> Select[Any]:
    return select(jobs.c.status, func.count()).group_by(jobs.c.status)


def open_leases(*, rehearsed: bool = False) -> Select[Any]:
    whose = ~_IS_REAL if rehearsed else _IS_REAL
    return listing(codecs.LEASES, "created_at", "id").where(_IS_OPEN, whose)


def leases_since(when: datetime) -> Select[Any]:
    wanted = listing(codecs.LEASES, "created_at", "id")
    return wanted.where(leases.c.created_at >= when, _IS_REAL)


def leases_between(
    start: datetime, end: datetime, after: tuple[datetime, str] | None
) -> Select[Any]:
    wanted = leases_since(start).where(leases.c.created_at < end)
    if after is not None:
        wanted = wanted.where(tuple_(leases.c.created_at, leases.c.id) > after)
    return wanted


def orphans_where(*conditions: ColumnElement[bool]) -> Select[Any]:
    return listing(codecs.ORPHANS, "started_at", "id").where(*conditions)


def open_orphans() -> Select[Any]:
    return orphans_where(orphans.c.gone_at.is_(None))


def orphans_between(start: datetime, end: datetime) -> Select[Any]:
    return orphans_where(orphans.c.started_at >= start, orphans.c.started_at < end)


def orphans_labelled(label: str) -> Select[Any]:
    return orphans_where(orphans.c.label == label)


@cache
def offers_taken() -> Sql:
    return _sql(select(leases.c.offer_id).where(_one_of(leases.c.offer_id, "ids"), _IS_OPEN))


def reserved() -> Select[Any]:
    return select(func.sum(leases.c.reserved)).where(_IS_OPEN, _IS_REAL)


def spent(condition: ColumnElement[bool]) -> Select[Any]:
    return select(func.sum(spend.c.amount)).where(condition)


def spent_since(when: datetime) -> Select[Any]:
    return spent(spend.c.at >= when)


def spent_on(job: str) -> Select[Any]:
    return spent(spend.c.job == job)


def reports_like(reports: Sequence[Event]) -> Select[Any]:
    """Job, attempt, agent_seq and webhook_id of the stored events that these repeat."""
    keys = (events.c.job, events.c.attempt, events.c.agent_seq)
    return select(*keys, events.c.webhook_id).where(
        or_(
            events.c.webhook_id.in_([event.webhook_id for event in reports]),
            tuple_(*keys).in_([(event.job, event.attempt, event.agent_seq) for event in reports]),
        )
    )


def unused_datasets(when: datetime) -> Select[Any]:
    in_use = exists().where(jobs.c.dataset_id == datasets.c.id, ~_HAS_ENDED)
    wanted = listing(codecs.DATASETS, "created_at", "id")
    return wanted.where(datasets.c.created_at < when, ~in_use)


def kept_artefacts(when: datetime) -> Select[Any]:
    wanted = listing(codecs.ARTEFACTS, "created_at", "job", "name")
    return wanted.where(artefacts.c.created_at < when, ~artefacts.c.expired)


#: What retention deletes: the table, its time, and what of it must stay.
_HISTORY: tuple[tuple[Table, str, ColumnElement[bool] | None], ...] = (
    (events, "at", None),
    # what is still waiting is still owed
    (outgoing, "created_at", _IS_WAITING),
    (deliveries, "tried_at", None),
)


def deletions(when: datetime) -> list[Delete]:
    """For each table of the history, up to parameter `limit` rows of ended jobs before `when`;
    and those of endpoints' tests, which are of no job."""
    return [
        _deletion(table, table.c[at] < when, stays, of_jobs=of_jobs)
        for of_jobs in (True, False)
        for table, at, stays in _HISTORY
        if of_jobs or table is not events
    ]


def _deletion(
    table: Table, old: ColumnElement[bool], stays: ColumnElement[bool] | None, *, of_jobs: bool
) -> Delete:
    place: ColumnElement[Any] = literal_column(f"{table.name}.ctid")
    if of_jobs:
        chosen = select(place).join_from(table, jobs, jobs.c.id == table.c.job)
        chosen = chosen.where(old, _HAS_ENDED)
    else:
        # "`" comes after "_"
        own = (table.c.job >= literal_column("'we_'"), table.c.job < literal_column("'we`'"))
        chosen = select(place).where(old, *own)
    if stays is not None:
        chosen = chosen.where(~stays)
    chosen = chosen.limit(bindparam("limit")).with_for_update(of=table, skip_locked=True)
    return delete(table).where(place == func.any(func.array(chosen.scalar_subquery())))
