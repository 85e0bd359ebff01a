"""How PostgreSQL is reached: the engine with its timeouts, and one type for its absence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy
from psycopg import errors as pg
from sqlalchemy import exc
from sqlalchemy.engine import URL, Engine

from state.errors import StoreUnavailable
from state.events import Secret

#: Longest a statement may take, waiting for a lock included (ms).
STATEMENT_TIMEOUT = 30_000
#: Longest a transaction may hold its locks without a word from us (ms).
IDLE_TIMEOUT = 60_000

#: A peer that vanished without a goodbye is noticed within about half a minute.
_SOCKET = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def parse_url(database_url: str) -> URL:
    """The address for SQLAlchemy, with psycopg 3 as the driver.

    Raises:
        ValueError: it is no PostgreSQL URL. The text does not repeat it: it may hold a password.
    """
    text = database_url.reveal() if isinstance(database_url, Secret) else database_url
    try:
        url = sqlalchemy.make_url(text)
    except exc.ArgumentError:
        raise ValueError("the database URL cannot be read") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ValueError(f"the database must be PostgreSQL, not {url.drivername!r}")
    return url.set(drivername="postgresql+psycopg")


def make_engine(database_url: str, *, pool_size: int, statement_timeout: int) -> Engine:
    """An engine whose connections are in autocommit mode: whoever uses it says BEGIN and COMMIT.

    Nothing is connected yet. Times come back in UTC. Parameters never appear in error texts.
    """
    url = parse_url(database_url)
    asked = url.query.get("options", "")
    session = {
        "TimeZone": "UTC",
        # said aloud, so that a server's own default cannot lose what was acknowledged
        "synchronous_commit": "on",
        "statement_timeout": statement_timeout,
        "idle_in_transaction_session_timeout": IDLE_TIMEOUT,
    }
    options = " ".join([str(asked), *(f"-c {name}={value}" for name, value in session.items())])
    connect_args: dict[str, Any] = {**_SOCKET, "options": options.strip()}
    return sqlalchemy.create_engine(
        url,
        connect_args={key: value for key, value in connect_args.items() if key not in url.query}
        | {"options": connect_args["options"]},
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10,
        pool_use_lifo=True,
        hide_parameters=True,
    )


@contextmanager
def outages_translated() -> Iterator[None]:
    """Turns whatever means "not now" into `StoreUnavailable`; other faults pass as they are."""
    try:
        yield
    except exc.TimeoutError:
        raise StoreUnavailable("all database connections of this process are in use") from None
    except (exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        if isinstance(cause, (pg.UndefinedTable, pg.UndefinedColumn)):
            raise StoreUnavailable(
                "the database's schema is not the one that this version needs: upgrade it"
            ) from error
        if isinstance(cause, _OUTAGES):
            raise StoreUnavailable(
                f"the database cannot be asked now: {_summary(cause)}"
            ) from error
        raise


#: Lost or refused connections, timeouts, deadlocks, a full disk, a failover to a read-only copy.
_OUTAGES = (psycopg.OperationalError, psycopg.InterfaceError, pg.ReadOnlySqlTransaction)


def _summary(error: BaseException | None) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
