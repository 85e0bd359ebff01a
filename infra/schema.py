"""The tables, as they are after the newest migration (a test holds the two together).

- Whatever counts is `bigint`: numbers from outside go up to 2^53.
- Ids sort and compare byte by byte (`COLLATE "C"`), as Python does.
- There are no foreign keys. Job rows are never deleted, every writer holds its job's row, and a
  check per event would cost the webhook receiver a tenth of its rate.
- Columns are in the order of the dataclass fields whose names they have.
"""

from __future__ import annotations

import enum
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB

from gpu_agent.wire import Fact
from state.events import DatasetStatus, OutgoingStatus
from state.job import Status
from state.lease import LeaseStatus

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def _id(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, Text(collation="C"), nullable=null)


def _text(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, Text, nullable=null)


def _count(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, BigInteger, nullable=null)


def _flag(name: str) -> Column[Any]:
    return Column(name, Boolean, nullable=False)


def _real(name: str) -> Column[Any]:
    return Column(name, Double, nullable=True)


def _measure(name: str) -> Column[Any]:
    return Column(name, Double, nullable=False)


def _time(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=null)


def _json(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, JSONB, nullable=null)


def _texts(name: str) -> Column[Any]:
    return Column(name, ARRAY(Text), nullable=False)


def _one_of(column: str, kind: type[enum.StrEnum]) -> CheckConstraint:
    listed = ", ".join(f"'{member.value}'" for member in kind)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


jobs = Table(
    "jobs",
    metadata,
    _id("id"),
    _id("owner"),
    _json("request"),
    _time("created_at"),
    _time("entered_at"),
    _text("status"),
    _count("attempt"),
    _texts("known"),
    _count("seq"),
    _count("owed"),
    _flag("dataset_ready"),
    _text("stalled_from", null=True),
    _json("reason", null=True),
    _time("retry_at", null=True),
    _time("deadline_at", null=True),
    _id("lease"),
    _time("last_heard_at", null=True),
    _count("moved"),
    _time("moved_at", null=True),
    _count("interruptions"),
    _time("due_at", null=True),
    _time("started_at", null=True),
    _time("finished_at", null=True),
    _texts("orders"),
    _json("progress"),
    _texts("excluded_machines"),
    # copies out of `request`, which never changes: what jobs are searched by
    _id("dataset_id"),
    _json("metadata"),
    PrimaryKeyConstraint("id"),
    _one_of("status", Status),
    _one_of("stalled_from", Status),
    # room for new versions of a row beside the old one: progress touches no index
    postgresql_with={"fillfactor": 70},
)
Index("jobs_due", jobs.c.due_at, postgresql_where=jobs.c.due_at.is_not(None))
Index("jobs_owner", jobs.c.owner, jobs.c.id)
Index("jobs_status", jobs.c.status, jobs.c.id)
Index("jobs_dataset", jobs.c.dataset_id, jobs.c.id)
Index(
    "jobs_metadata",
    jobs.c.metadata,
    postgresql_using="gin",
    postgresql_ops={"metadata": "jsonb_path_ops"},
)

# of jobs and of endpoints
webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    _id("job"),
    _count("place"),
    Column("sealed", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job", "place"),
)

attempts = Table(
    "attempts",
    metadata,
    _id("job"),
    _count("number"),
    _time("created_at"),
    Column("secret", LargeBinary, nullable=True),
    _text("nonce", null=True),
    _time("hello_at", null=True),
    _flag("cleared"),
    PrimaryKeyConstraint("job", "number"),
)
Index("attempts_kept", attempts.c.created_at, postgresql_where=~attempts.c.cleared)

leases = Table(
    "leases",
    metadata,
    _id("id"),
    _id("job"),
    _count("attempt"),
    _id("label"),
    _time("created_at"),
    _time("expires_at"),
    _text("status"),
    _id("token_hash", null=True),
    _time("token_expires_at", null=True),
    _flag("hedge"),
    _text("offer_id"),
    _text("machine_id"),
    _text("gpu_name"),
    _text("geo"),
    _count("price"),
    _count("storage_price"),
    _count("download_price"),
    _count("upload_price"),
    _count("bid"),
    _measure("vram_gb"),
    _measure("disk_gb"),
    _measure("download_mbps"),
    _measure("boot_s"),
    _count("reserved"),
    _count("received"),
    _count("sent"),
    _text("instance_id", null=True),
    _time("rented_at", null=True),
    _time("seen_at", null=True),
    _time("booting_at", null=True),
    _time("running_at", null=True),
    _time("ended_at", null=True),
    _time("ready_at", null=True),
    _time("releasing_at", null=True),
    _time("released_at", null=True),
    _time("due_at", null=True),
    _count("tries"),
    _count("absent"),
    _text("note"),
    _time("noted_at", null=True),
    _text("why"),
    _count("cost"),
    _count("billed", null=True),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("label"),
    UniqueConstraint("token_hash"),
    _one_of("status", LeaseStatus),
)
Index("leases_job", leases.c.job)
Index("leases_created_at", leases.c.created_at)
Index("leases_due", leases.c.due_at, postgresql_where=leases.c.due_at.is_not(None))
Index(
    "leases_open",
    leases.c.job,
    leases.c.attempt,
    leases.c.hedge,
    unique=True,
    postgresql_where=leases.c.status != LeaseStatus.RELEASED.value,
)

orphans = Table(
    "orphans",
    metadata,
    _id("id"),
    _id("label"),
    _id("job"),
    _text("machine_id"),
    _text("gpu_name"),
    _count("price"),
    _count("pulled"),
    _time("started_at"),
    _time("seen_at"),
    _time("ended_at", null=True),
    _time("gone_at", null=True),
    PrimaryKeyConstraint("id"),
)
Index("orphans_label", orphans.c.label)
Index("orphans_started_at", orphans.c.started_at)
Index("orphans_open", orphans.c.started_at, postgresql_where=orphans.c.gone_at.is_(None))

events = Table(
    "events",
    metadata,
    _id("job"),
    _count("seq"),
    _count("attempt"),
    _text("type"),
    _time("at"),
    _json("data"),
    _count("agent_seq", null=True),
    _id("webhook_id", null=True),
    PrimaryKeyConstraint("job", "seq"),
)
Index(
    "events_report",
    events.c.job,
    events.c.attempt,
    events.c.agent_seq,
    unique=True,
    postgresql_where=events.c.agent_seq.is_not(None),
)
Index(
    "events_webhook_id",
    events.c.webhook_id,
    unique=True,
    postgresql_where=events.c.webhook_id.is_not(None),
)
# what is picked out of a job's thousands of reports
Index(
    "events_picked",
    events.c.job,
    events.c.type,
    events.c.seq,
    postgresql_where=events.c.type.in_(["transition", Fact.TRAINING_CHECKPOINT.value]),
)
# for retention only; a BRIN index costs an insert next to nothing
Index("events_at", events.c.at, postgresql_using="brin")

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    _id("id"),
    _id("owner"),
    _time("created_at"),
    _text("url"),
    _texts("events"),
    _text("description"),
    _time("disabled_at", null=True),
    _text("disabled_why"),
    _time("heard_at", null=True),
    _time("old_secret_until", null=True),
    _count("owed"),
    PrimaryKeyConstraint("id"),
)
Index("webhook_endpoints_owner", webhook_endpoints.c.owner, webhook_endpoints.c.id)

outgoing = Table(
    "outgoing",
    metadata,
    _id("id"),
    _id("job"),
    _count("seq"),
    _text("type"),
    _time("created_at"),
    _json("payload"),
    _text("status"),
    _count("tries"),
    _time("due_at", null=True),
    # defaults for processes of the version before these columns
    Column("endpoint", Text(collation="C"), nullable=False, server_default=""),
    Column("owner", Text(collation="C"), nullable=False, server_default=""),
    _time("ended_at", null=True),
    PrimaryKeyConstraint("id"),
    _one_of("status", OutgoingStatus),
)
Index("outgoing_job", outgoing.c.job, outgoing.c.endpoint, outgoing.c.seq, unique=True)
# the first row of each queue that waits, without a look at the others
Index(
    "outgoing_waiting",
    outgoing.c.job,
    outgoing.c.endpoint,
    outgoing.c.seq,
    postgresql_where=outgoing.c.status == OutgoingStatus.WAITING.value,
)
# pages of them, newest first
Index("outgoing_created_at", outgoing.c.created_at, outgoing.c.id)
Index("outgoing_owner", outgoing.c.owner, outgoing.c.created_at, outgoing.c.id)
Index(
    "outgoing_endpoint",
    outgoing.c.endpoint,
    outgoing.c.created_at,
    outgoing.c.id,
    postgresql_where=outgoing.c.endpoint != "",
)
# what did not arrive: few, and asked for by every look at the alarms
Index(
    "outgoing_failed",
    outgoing.c.status,
    outgoing.c.created_at,
    outgoing.c.id,
    postgresql_where=outgoing.c.status.in_(
        [OutgoingStatus.EXHAUSTED.value, OutgoingStatus.DISABLED.value]
    ),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    _id("outgoing"),
    _id("job"),
    _time("tried_at"),
    _count("answer"),
    _count("took_ms"),
    _text("error"),
    PrimaryKeyConstraint("id"),
)
Index("deliveries_job", deliveries.c.job, deliveries.c.tried_at)
Index("deliveries_outgoing", deliveries.c.outgoing)
Index("deliveries_tried_at", deliveries.c.tried_at, postgresql_using="brin")

datasets = Table(
    "datasets",
    metadata,
    _id("id"),
    _id("owner"),
    _time("created_at"),
    _text("status"),
    _json("files"),
    _json("report"),
    _text("zip_key"),
    _count("zip_bytes"),
    _text("zip_sha256"),
    _time("due_at", null=True),
    _count("tries"),
    PrimaryKeyConstraint("id"),
    _one_of("status", DatasetStatus),
)
Index("datasets_due", datasets.c.due_at, postgresql_where=datasets.c.due_at.is_not(None))
Index("datasets_created_at", datasets.c.created_at)

artefacts = Table(
    "artefacts",
    metadata,
    _id("job"),
    _id("name"),
    _count("attempt"),
    _text("key"),
    _count("bytes"),
    _text("sha256"),
    _time("created_at"),
    _flag("verified"),
    _flag("expired"),
    PrimaryKeyConstraint("job", "name"),
)
Index("artefacts_kept", artefacts.c.created_at, postgresql_where=~artefacts.c.expired)

api_keys = Table(
    "api_keys",
    metadata,
    _id("id"),
    _id("owner"),
    _text("name"),
    _id("hash"),
    _texts("scopes"),
    _time("created_at"),
    _time("revoked_at", null=True),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("hash"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    _id("owner"),
    _id("key"),
    _text("body_hash"),
    _time("created_at"),
    _json("answer", null=True),
    PrimaryKeyConstraint("owner", "key"),
)

hosts = Table(
    "hosts",
    metadata,
    _id("machine_id"),
    _text("gpu_name"),
    _text("geo"),
    _count("good"),
    _count("bad"),
    _count("lies"),
    _flag("blocked"),
    _text("blocked_why"),
    _time("last_failed_at", null=True),
    _time("last_seen_at", null=True),
    _text("last_reason"),
    _real("boot_s"),
    _real("download_mbps"),
    _real("steps_per_s"),
    PrimaryKeyConstraint("machine_id"),
)

spend = Table(
    "spend",
    metadata,
    _id("lease"),
    _id("job"),
    _time("at"),
    _count("amount"),
    PrimaryKeyConstraint("lease"),
)
Index("spend_at", spend.c.at)
Index("spend_job", spend.c.job)

beats = Table(
    "beats",
    metadata,
    _id("name"),
    _time("at"),
    _json("data"),
    PrimaryKeyConstraint("name"),
)
