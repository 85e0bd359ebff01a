"""Orphans: instances of ours that no open lease was for, and what they cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "orphans",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("label", sa.Text(collation="C"), nullable=False),
        sa.Column("job", sa.Text(collation="C"), nullable=False),
        sa.Column("machine_id", sa.Text(), nullable=False),
        sa.Column("gpu_name", sa.Text(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("pulled", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("gone_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("orphans_pkey")),
    )
    op.create_index("orphans_label", "orphans", ["label"])
    op.create_index("orphans_started_at", "orphans", ["started_at"])
    op.create_index(
        "orphans_open", "orphans", ["started_at"], postgresql_where=sa.text("gone_at IS NULL")
    )
