"""Machines: a token each, hedges, bids, what was offered and billed. Progress. Blocked hosts."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NOTHING: dict[str, Any] = {"nullable": False, "server_default": "0"}
_EMPTY: dict[str, Any] = {"nullable": False, "server_default": ""}
_NO: dict[str, Any] = {"nullable": False, "server_default": sa.false()}
_NEW: dict[str, tuple[sa.Column[Any], ...]] = {
    "jobs": (
        sa.Column("lease", sa.Text(collation="C"), **_EMPTY),
        sa.Column("moved", sa.BigInteger(), **_NOTHING),
        sa.Column("moved_at", sa.DateTime(timezone=True)),
        sa.Column("interruptions", sa.BigInteger(), **_NOTHING),
    ),
    "attempts": (sa.Column("cleared", sa.Boolean(), **_NO),),
    "leases": (
        sa.Column("token_hash", sa.Text(collation="C")),
        sa.Column("token_expires_at", sa.DateTime(timezone=True)),
        sa.Column("hedge", sa.Boolean(), **_NO),
        sa.Column("download_price", sa.BigInteger(), **_NOTHING),
        sa.Column("upload_price", sa.BigInteger(), **_NOTHING),
        sa.Column("bid", sa.BigInteger(), **_NOTHING),
        sa.Column("vram_gb", sa.Double(), **_NOTHING),
        sa.Column("disk_gb", sa.Double(), **_NOTHING),
        sa.Column("download_mbps", sa.Double(), **_NOTHING),
        sa.Column("boot_s", sa.Double(), **_NOTHING),
        sa.Column("reserved", sa.BigInteger(), **_NOTHING),
        sa.Column("received", sa.BigInteger(), **_NOTHING),
        sa.Column("sent", sa.BigInteger(), **_NOTHING),
        sa.Column("seen_at", sa.DateTime(timezone=True)),
        sa.Column("booting_at", sa.DateTime(timezone=True)),
        sa.Column("running_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("note", sa.Text(), **_EMPTY),
        sa.Column("noted_at", sa.DateTime(timezone=True)),
        sa.Column("billed", sa.BigInteger()),
    ),
    "hosts": (
        sa.Column("gpu_name", sa.Text(), **_EMPTY),
        sa.Column("geo", sa.Text(), **_EMPTY),
        sa.Column("lies", sa.BigInteger(), **_NOTHING),
        sa.Column("blocked", sa.Boolean(), **_NO),
        sa.Column("blocked_why", sa.Text(), **_EMPTY),
        sa.Column("last_seen_at", sa.DateTime(timezone=True)),
    ),
}


def upgrade() -> None:
    for table, columns in _NEW.items():
        for column in columns:
            op.add_column(table, column)
            # for the rows that are there; new ones say all of it themselves
            if column.server_default is not None:
                op.alter_column(table, column.name, server_default=None)
    op.execute(
        "UPDATE leases SET token_hash = attempts.token_hash,"
        " token_expires_at = attempts.token_expires_at FROM attempts"
        " WHERE attempts.job = leases.job AND attempts.number = leases.attempt"
        " AND leases.status <> 'released'"
    )
    # What open leases may still cost, as it was reckoned until now.
    op.execute(
        "UPDATE leases SET reserved = ceil(price"
        " * greatest(extract(epoch FROM expires_at - created_at), 0) / 3600)"
        " WHERE status <> 'released'"
    )
    op.create_index(
        "attempts_kept", "attempts", ["created_at"], postgresql_where=sa.text("NOT cleared")
    )
    op.drop_constraint("attempts_token_hash_key", "attempts")
    op.drop_column("attempts", "token_hash")
    op.drop_column("attempts", "token_expires_at")
    op.create_unique_constraint("leases_token_hash_key", "leases", ["token_hash"])
    op.create_index("leases_created_at", "leases", ["created_at"])
    op.drop_index("leases_open", "leases")
    op.create_index(
        "leases_open",
        "leases",
        ["job", "attempt", "hedge"],
        unique=True,
        postgresql_where=sa.text("status <> 'released'"),
    )
