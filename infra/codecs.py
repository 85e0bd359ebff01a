"""Values to table rows and back: one codec per record, so that no query knows a field twice."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

from psycopg.types.json import Json, Jsonb
from sqlalchemy import Column, Table

from infra import schema
from infra.crypto import SecretBox
from state.endpoints import Endpoint
from state.events import (
    ApiKey,
    Artefact,
    Attempt,
    Dataset,
    DatasetStatus,
    Delivery,
    Event,
    HostRecord,
    Idempotent,
    Outgoing,
    OutgoingStatus,
)
from state.job import GpuNeeds, Job, JobRequest, Reason, Status
from state.lease import Lease, LeaseStatus
from state.orphan import Orphan
from state.rehearsal import Rehearsal

T = TypeVar("T")
Row = dict[str, Any]
Convert = Callable[[Any], Any]


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How a frozen dataclass lies in its table.

    Fields and columns share their names; `write` and `read` convert those that are not the same
    in both worlds.
    """

    kind: type[T]
    table: Table
    write: Mapping[str, Convert] = field(default_factory=dict)
    read: Mapping[str, Convert] = field(default_factory=dict)

    @cached_property
    def columns(self) -> tuple[Column[Any], ...]:
        """In the order that `value` wants."""
        return tuple(self.table.c[name] for name in self.names)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in dataclasses.fields(self.kind))  # type: ignore[arg-type]  # T is always a dataclass

    def row(self, value: T) -> Row:
        """Parameters by column name.

        Raises:
            ValueError: something in it cannot be stored (NaN, a NUL, half a surrogate pair).
        """
        row = dict(vars(value))
        for name, convert in self.write.items():
            row[name] = convert(row[name])
        return row

    def plain(self, value: T) -> Row:
        """As `row`, for a `document`: what is JSON stays as it is."""
        row = dict(vars(value))
        for name, convert in self.write.items():
            if convert is not jsonb:
                row[name] = convert(row[name])
        return row

    def value(self, row: Sequence[Any]) -> T:
        given = dict(zip(self.names, row, strict=True))
        for name, convert in self.read.items():
            given[name] = convert(given[name])
        return self.kind(**given)


# --- JSON -------------------------------------------------------------------------------------

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


_encode = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain
).encode


def to_json(value: object) -> bytes:
    """JSON that PostgreSQL accepts.

    Raises:
        ValueError: NaN or an infinity, a NUL or half a surrogate pair is in it. Said here, because
            the server's own refusal would take the whole transaction down.
    """
    return _checked(_encode(value))


def _checked(text: str) -> bytes:
    if "\\u0000" in text and _NUL.search(text):
        raise ValueError("a NUL character cannot be stored")
    return text.encode()


def storable(value: object) -> bool:
    """Whether PostgreSQL could hold this at all; if not, no row has it."""
    try:
        to_json(value)
    except ValueError:
        return False
    return True


def jsonb(value: object) -> Jsonb:
    """`value` as a parameter. Raises `ValueError` as `to_json` does, and at once."""
    return Jsonb(to_json(value), dumps=_as_it_is)


def _as_it_is(text: bytes) -> bytes:
    return text


def _plain_in_document(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Jsonb):
        return json.loads(value.obj)
    return _plain(value)


_encode_document = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain_in_document
).encode


def document(rows: Sequence[Row]) -> Json:
    """Many rows as one parameter, for `json_to_recordset`. Raises `ValueError` as `to_json`."""
    return Json(_checked(_encode_document(rows)), dumps=_as_it_is)


# --- jobs -------------------------------------------------------------------------------------


def _maybe(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _request_to_json(request: JobRequest) -> Jsonb:
    plain = {**vars(request), "gpu": vars(request.gpu)}
    del plain["rehearsal"]
    if request.rehearsal is not None:
        plain["rehearsal"] = vars(request.rehearsal)
    return jsonb(plain)


def _request_from_json(stored: Mapping[str, Any]) -> JobRequest:
    gpu = _fields_of(GpuNeeds, stored["gpu"])
    gpu["gpu_names"] = tuple(gpu["gpu_names"])
    given = {**_fields_of(JobRequest, stored), "gpu": GpuNeeds(**gpu)}
    if stored.get("rehearsal"):
        given["rehearsal"] = Rehearsal(**_fields_of(Rehearsal, stored["rehearsal"]))
    return JobRequest(**given)


def _fields_of(kind: type[Any], stored: Mapping[str, Any]) -> Row:
    """Without fields that a newer version wrote: while it is rolled out, both read all rows."""
    return {name: stored[name] for name in kind.__dataclass_fields__ if name in stored}


def _value_of(member: Any) -> Any:
    return member.value


def _reason_to_json(reason: Reason) -> Jsonb:
    return jsonb(reason.to_dict())


def _reason_from_json(stored: Mapping[str, Any]) -> Reason:
    return Reason(**stored)


JOBS = Codec(
    Job,
    schema.jobs,
    write={
        "request": _request_to_json,
        "status": _value_of,
        "known": sorted,
        "stalled_from": _maybe(_value_of),
        "reason": _maybe(_reason_to_json),
        "orders": list,
        "progress": jsonb,
        "excluded_machines": list,
    },
    read={
        "request": _request_from_json,
        "status": Status,
        "known": frozenset,
        "stalled_from": _maybe(Status),
        "reason": _maybe(_reason_from_json),
        "orders": tuple,
        "excluded_machines": tuple,
    },
)

#: What never changes once a job is there; the request is the largest part of a row.
JOB_CONSTANTS = frozenset({"id", "owner", "request", "created_at", "dataset_id", "metadata"})


def job_to_row(job: Job) -> Row:
    """All columns of a new job, the copies for searching included."""
    return {
        **JOBS.row(job),
        "dataset_id": job.request.dataset_id,
        "metadata": jsonb(job.request.metadata),
    }


def job_changes(job: Job) -> Row:
    """The id and the columns that can change, for a `document`."""
    return _job_columns(job, _CHANGING)


def job_news(job: Job) -> Row:
    """As `job_changes`, of a job in which `only_news` differ."""
    return _job_columns(job, _NEWS)


_CHANGING = ("id", *(name for name in JOBS.names if name not in JOB_CONSTANTS))
#: What nearly every report changes, and nothing else. Listed, so that there are two statements
#: and not one for each set of columns.
_NEWS = (
    "id",
    "seq",
    "owed",
    "last_heard_at",
    "moved",
    "moved_at",
    "due_at",
    "orders",
    "progress",
)
_NO_NEWS = tuple(name for name in JOBS.names if name not in _NEWS)


def only_news(before: Job, job: Job) -> bool:
    """Whether `job` differs from `before` in nothing but what an ordinary report changes."""
    old, new = vars(before), vars(job)
    return all(old[name] is new[name] or old[name] == new[name] for name in _NO_NEWS)


def _job_columns(job: Job, names: tuple[str, ...]) -> Row:
    row = {name: getattr(job, name) for name in names}
    for name, convert in JOBS.write.items():
        if name in row and convert is not jsonb:
            row[name] = convert(row[name])
    return row


def job_of(row: Sequence[Any], request: JobRequest) -> Job:
    """The job of a row without its request, which never changes and is known already."""
    given = dict(zip(JOB_NAMES, row, strict=True))
    for name, convert in JOBS.read.items():
        if name in given:
            given[name] = convert(given[name])
    # As Job(**given, request=request) would, which sets each field by a call of its own.
    job = object.__new__(Job)
    vars(job).update(given, request=request)
    return job


request_of = _request_from_json
JOB_NAMES = tuple(name for name in JOBS.names if name != "request")


# --- everything else --------------------------------------------------------------------------


def attempts(box: SecretBox) -> Codec[Attempt]:
    """Attempts, whose secret lies sealed."""
    return Codec(
        Attempt,
        schema.attempts,
        write={"secret": _maybe(box.seal)},
        read={"secret": _maybe(box.open)},
    )


LEASES = Codec(Lease, schema.leases, write={"status": _value_of}, read={"status": LeaseStatus})
ORPHANS = Codec(Orphan, schema.orphans)
EVENTS = Codec(Event, schema.events, write={"data": jsonb})
OUTGOING = Codec(
    Outgoing,
    schema.outgoing,
    write={"payload": jsonb, "status": _value_of},
    read={"status": OutgoingStatus},
)
DELIVERIES = Codec(Delivery, schema.deliveries)
ENDPOINTS = Codec(
    Endpoint, schema.webhook_endpoints, write={"events": list}, read={"events": tuple}
)
DATASETS = Codec(
    Dataset,
    schema.datasets,
    write={"status": _value_of, "files": jsonb, "report": jsonb},
    read={"status": DatasetStatus, "files": tuple},
)
ARTEFACTS = Codec(Artefact, schema.artefacts)
API_KEYS = Codec(ApiKey, schema.api_keys, write={"scopes": sorted}, read={"scopes": frozenset})
IDEMPOTENT = Codec(Idempotent, schema.idempotency_keys, write={"answer": _maybe(jsonb)})
HOSTS = Codec(HostRecord, schema.hosts)
