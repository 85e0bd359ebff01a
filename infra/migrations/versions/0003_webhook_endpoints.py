"""Webhook endpoints, beside jobs' own webhooks: a queue for each; when a webhook was done with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("owner", sa.Text(collation="C"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_why", sa.Text(), nullable=False),
        sa.Column("heard_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("old_secret_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("owed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_endpoints_pkey")),
    )
    op.create_index("webhook_endpoints_owner", "webhook_endpoints", ["owner", "id"])
    for name in ("endpoint", "owner"):
        # The default stays: processes of the older version run until they are restarted.
        column = sa.Column(name, sa.Text(collation="C"), nullable=False, server_default="")
        op.add_column("outgoing", column)
    op.add_column("outgoing", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("deliveries_outgoing", "deliveries", ["outgoing"])
    for index in ("outgoing_job", "outgoing_waiting", "outgoing_created_at"):
        op.drop_index(index, "outgoing")
    op.execute(
        "UPDATE outgoing SET"
        " owner = coalesce((SELECT owner FROM jobs WHERE jobs.id = outgoing.job), ''),"
        " ended_at = CASE WHEN status <> 'waiting' THEN coalesce("
        "(SELECT max(tried_at) FROM deliveries WHERE deliveries.outgoing = outgoing.id),"
        " created_at) END"
    )
    op.create_index("outgoing_job", "outgoing", ["job", "endpoint", "seq"], unique=True)
    waiting = sa.text("status = 'waiting'")
    op.create_index(
        "outgoing_waiting", "outgoing", ["job", "endpoint", "seq"], postgresql_where=waiting
    )
    op.create_index("outgoing_created_at", "outgoing", ["created_at", "id"])
    op.create_index("outgoing_owner", "outgoing", ["owner", "created_at", "id"])
    op.create_index(
        "outgoing_endpoint",
        "outgoing",
        ["endpoint", "created_at", "id"],
        postgresql_where=sa.text("endpoint <> ''"),
    )
    op.create_index(
        "outgoing_failed",
        "outgoing",
        ["status", "created_at", "id"],
        postgresql_where=sa.text("status IN ('exhausted', 'disabled')"),
    )
