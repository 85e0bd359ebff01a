"""The database's schema through time. Alembic, run from inside the installed package.

    from infra import migrations
    migrations.upgrade(database_url)

A new revision is a file in `versions/`; a test holds the newest one and `infra.schema` together.
"""

from __future__ import annotations

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.pool import NullPool

from infra.database import outages_translated, parse_url

#: Two upgrades at once: the second waits for this advisory lock, and then finds nothing to do.
_LOCK = 0x53746F6B6572  # "Stoker"


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`, else to the newest one; all of it or nothing. Harmless when
    it is there.

    Raises:
        StoreUnavailable: the database cannot be reached.
        ValueError: the URL is not one of PostgreSQL.
    """
    engine = _engine(database_url)
    with outages_translated(), engine.begin() as connection:
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(_LOCK)))
        command.upgrade(_config(connection), revision)


def current(database_url: str) -> str | None:
    """The revision that the database is at; None when it was never upgraded.

    Raises:
        StoreUnavailable, ValueError: as in `upgrade`.
    """
    with outages_translated(), _engine(database_url).connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def newest() -> str:
    """The revision that this version of Stoker needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise RuntimeError("this installation of Stoker lacks its migrations")
    return head


def _engine(database_url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(
        parse_url(database_url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": 5},
    )


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "infra:migrations")
    config.attributes["connection"] = connection
    return config
