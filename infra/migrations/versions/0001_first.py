"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JOB_STATUSES = (
    "'pending', 'pendingGpu', 'pendingImages', 'pendingModel', 'training', 'completed', "
    "'stalled', 'failed', 'cancelled'"
)


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("owner", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(collation="C"), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        sa.UniqueConstraint("hash", name=op.f("api_keys_hash_key")),
    )
    op.create_table(
        "artefacts",
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("verified", sa.Boolean(), nullable=False),
        sa.Column("expired", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("job", "name", name=op.f("artefacts_pkey")),
    )
    op.create_index(
        "artefacts_kept",
        "artefacts",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("NOT expired"),
    )
    op.create_table(
        "attempts",
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("token_hash", sa.Text(), nullable=False),
        sa.Column("token_expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.Column("nonce", sa.Text(), nullable=True),
        sa.Column("hello_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("job", "number", name=op.f("attempts_pkey")),
        sa.UniqueConstraint("token_hash", name=op.f("attempts_token_hash_key")),
    )
    op.create_table(
        "beats",
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("beats_pkey")),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("owner", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("report", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("zip_key", sa.Text(), nullable=False),
        sa.Column("zip_bytes", sa.BigInteger(), nullable=False),
        sa.Column("zip_sha256", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("tries", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "status IN ('open', 'building', 'ready', 'refused')", name=op.f("datasets_status_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("datasets_pkey")),
    )
    op.create_index("datasets_created_at", "datasets", ["created_at"], unique=False)
    op.create_index(
        "datasets_due",
        "datasets",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("outgoing", sa.Text(collation="C"), nullable=False),
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("tried_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answer", sa.BigInteger(), nullable=False),
        sa.Column("took_ms", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("deliveries_pkey")),
    )
    op.create_index("deliveries_job", "deliveries", ["job", "tried_at"], unique=False)
    op.create_index(
        "deliveries_tried_at", "deliveries", ["tried_at"], unique=False, postgresql_using="brin"
    )
    op.create_table(
        "events",
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("agent_seq", sa.BigInteger(), nullable=True),
        sa.Column("webhook_id", sa.Text(collation="C"), nullable=True),
        sa.PrimaryKeyConstraint("job", "seq", name=op.f("events_pkey")),
    )
    op.create_index("events_at", "events", ["at"], unique=False, postgresql_using="brin")
    op.create_index(
        "events_picked",
        "events",
        ["job", "type", "seq"],
        unique=False,
        postgresql_where=sa.text("type IN ('transition', 'training.checkpoint')"),
    )
    op.create_index(
        "events_report",
        "events",
        ["job", "attempt", "agent_seq"],
        unique=True,
        postgresql_where=sa.text("agent_seq IS NOT NULL"),
    )
    op.create_index(
        "events_webhook_id",
        "events",
        ["webhook_id"],
        unique=True,
        postgresql_where=sa.text("webhook_id IS NOT NULL"),
    )
    op.create_table(
        "hosts",
        sa.Column("machine_id", sa.Text(collation="C"), nullable=False),
        sa.Column("good", sa.BigInteger(), nullable=False),
        sa.Column("bad", sa.BigInteger(), nullable=False),
        sa.Column("last_failed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_reason", sa.Text(), nullable=False),
        sa.Column("boot_s", sa.Double(), nullable=True),
        sa.Column("download_mbps", sa.Double(), nullable=True),
        sa.Column("steps_per_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("machine_id", name=op.f("hosts_pkey")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answer", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("idempotency_keys_pkey")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("owner", sa.Text(collation="C"), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("entered_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("known", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("owed", sa.BigInteger(), nullable=False),
        sa.Column("dataset_ready", sa.Boolean(), nullable=False),
        sa.Column("stalled_from", sa.Text(), nullable=True),
        sa.Column("reason", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_heard_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("orders", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("excluded_machines", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("dataset_id", sa.Text(collation="C"), nullable=False),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.CheckConstraint(
            f"stalled_from IN ({JOB_STATUSES})", name=op.f("jobs_stalled_from_check")
        ),
        sa.CheckConstraint(f"status IN ({JOB_STATUSES})", name=op.f("jobs_status_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        postgresql_with={"fillfactor": 70},
    )
    op.create_index("jobs_dataset", "jobs", ["dataset_id", "id"], unique=False)
    op.create_index(
        "jobs_due", "jobs", ["due_at"], unique=False, postgresql_where=sa.text("due_at IS NOT NULL")
    )
    op.create_index(
        "jobs_metadata",
        "jobs",
        ["metadata"],
        unique=False,
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
    )
    op.create_index("jobs_owner", "jobs", ["owner", "id"], unique=False)
    op.create_index("jobs_status", "jobs", ["status", "id"], unique=False)
    op.create_table(
        "leases",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("offer_id", sa.Text(), nullable=False),
        sa.Column("machine_id", sa.Text(), nullable=False),
        sa.Column("gpu_name", sa.Text(), nullable=False),
        sa.Column("geo", sa.Text(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("storage_price", sa.BigInteger(), nullable=False),
        sa.Column("instance_id", sa.Text(), nullable=True),
        sa.Column("rented_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("releasing_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("tries", sa.BigInteger(), nullable=False),
        sa.Column("absent", sa.BigInteger(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "status IN ('intended', 'unknown', 'rented', 'releasing', 'released')",
            name=op.f("leases_status_check"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("leases_pkey")),
        sa.UniqueConstraint("label", name=op.f("leases_label_key")),
    )
    op.create_index(
        "leases_due",
        "leases",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index("leases_job", "leases", ["job"], unique=False)
    op.create_index(
        "leases_open",
        "leases",
        ["job", "attempt"],
        unique=True,
        postgresql_where=sa.text("status != 'released'"),
    )
    op.create_table(
        "outgoing",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("tries", sa.BigInteger(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('waiting', 'delivered', 'exhausted', 'disabled')",
            name=op.f("outgoing_status_check"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("outgoing_pkey")),
    )
    op.create_index(
        "outgoing_created_at", "outgoing", ["created_at"], unique=False, postgresql_using="brin"
    )
    op.create_index("outgoing_job", "outgoing", ["job", "seq"], unique=True)
    op.create_index(
        "outgoing_waiting",
        "outgoing",
        ["job", "seq"],
        unique=False,
        postgresql_where=sa.text("status = 'waiting'"),
    )
    op.create_table(
        "spend",
        sa.Column("lease", sa.Text(collation="C"), nullable=False),
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("lease", name=op.f("spend_pkey")),
    )
    op.create_index("spend_at", "spend", ["at"], unique=False)
    op.create_index("spend_job", "spend", ["job"], unique=False)
    op.create_table(
        "webhook_secrets",
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job", "place", name=op.f("webhook_secrets_pkey")),
    )
