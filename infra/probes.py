"""What `stoker doctor` asks of servers, past the adapters: their revision, clock, keys and doors.

Every call ends within a few seconds. No text of an error holds a password or a signed address.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
import sqlalchemy
from sqlalchemy import LargeBinary, select
from sqlalchemy.pool import NullPool

from infra import migrations, schema
from infra.crypto import SecretBox
from infra.database import outages_translated, parse_url
from infra.storage import Storage
from state.errors import SecretUnreadable, StorageError
from state.job import Status

TIMEOUT_S = 5.0
#: Of each table, so many stored secrets are tried at most.
TRIED = 500
#: How everything begins that `SecretBox` sealed.
_SEALED = b"gAAAAA"
_ENDED = (Status.COMPLETED.value, Status.FAILED.value, Status.CANCELLED.value)


@dataclass(frozen=True, kw_only=True)
class Database:
    """`revision` is None where nobody ever upgraded it; `now` is its clock."""

    revision: str | None
    newest: str
    now: datetime
    version: str


def database(url: str) -> Database:
    """Raises: StoreUnavailable, ValueError."""
    revision = migrations.current(url)
    with _connected(url) as connection:
        row = connection.execute(
            sqlalchemy.text("SELECT now(), current_setting('server_version')")
        ).one()
    return Database(
        revision=revision,
        newest=migrations.newest(),
        now=row[0].astimezone(UTC),
        version=str(row[1]).split()[0],
    )


def sealed(url: str, box: SecretBox) -> tuple[int, int]:
    """How many stored secrets that still matter were tried, and how many fit none of the keys.

    Those of ended jobs do not matter: the key that sealed them may be gone.

    Raises: StoreUnavailable, ValueError.
    """
    tried = lost = 0
    jobs = schema.jobs
    with _connected(url) as connection:
        for table in schema.metadata.sorted_tables:
            for column in table.columns:
                if not isinstance(column.type, LargeBinary):
                    continue
                query = select(column).where(column.is_not(None)).limit(TRIED)
                if "job" in table.columns:
                    over = select(jobs.c.id).where(jobs.c.status.in_(_ENDED))
                    query = query.where(table.c.job.not_in(over))
                for (value,) in connection.execute(query):
                    if not bytes(value).startswith(_SEALED):
                        continue
                    tried += 1
                    try:
                        box.open(bytes(value))
                    except SecretUnreadable:
                        lost += 1
    return tried, lost


@contextlib.contextmanager
def _connected(url: str) -> Iterator[sqlalchemy.Connection]:
    engine = sqlalchemy.create_engine(
        parse_url(url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": int(TIMEOUT_S)},
    )
    with outages_translated(), engine.connect() as connection:
        yield connection


def ask(method: str, url: str, **options: Any) -> requests.Response:
    """One request without proxies, redirects or keys of ours.

    Raises: requests.RequestException.
    """
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, timeout=TIMEOUT_S, allow_redirects=False, **options)


def date_of(answer: requests.Response) -> datetime | None:
    """What the server's clock said; None where it does not say."""
    try:
        return parsedate_to_datetime(answer.headers.get("Date", "")).astimezone(UTC)
    except ValueError:
        return None


def ahead(clock: Callable[[], datetime], ask_time: Callable[[], datetime | None]) -> float | None:
    """By how many seconds `clock` is ahead of the one asked (negative: behind), to a second."""
    began, before = clock(), time.monotonic()
    there = ask_time()
    if there is None:
        return None
    half = (time.monotonic() - before) / 2
    return (began - there).total_seconds() + half


def round_trip(storage: Storage, key: str, body: bytes) -> None:
    """Put, get and delete a small object by presigned addresses, as others do.

    Raises: StorageError, NotFound.
    """
    upload = storage.presign_put(key, bytes=len(body), expires_s=60)
    try:
        _expect(
            ask("PUT", upload.url, data=body, headers=upload.headers), "refused a presigned PUT"
        )
        got = ask("GET", storage.presign_get(key, expires_s=60))
        _expect(got, "refused a presigned GET")
        if got.content != body:
            raise StorageError("the store gave back something else than was put into it")
    except requests.RequestException as error:
        raise StorageError(f"the store could not be asked: {why(error)}") from None
    finally:
        storage.delete(key)


def _expect(answer: requests.Response, what: str) -> None:
    if answer.status_code >= 300:
        raise StorageError(f"the store {what} (HTTP {answer.status_code})")


def addresses(host: str, port: int) -> list[str]:
    """What `host` resolves to from here. Raises: OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(item[4][0]) for item in found})


def certificate_ends(url: str) -> datetime:
    """When the certificate of an https `url` runs out. Raises: OSError (ssl.SSLError too)."""
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 443)
    context = ssl.create_default_context()
    with (
        socket.create_connection(address, timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as secured,
    ):
        found = secured.getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)


def untrusted(error: BaseException) -> str:
    """Why a certificate was not accepted; empty where that was not the reason."""
    found = _cause(error, ssl.SSLCertVerificationError)
    return str(getattr(found, "verify_message", ""))


def why(error: BaseException) -> str:
    """Why a request failed, in words, and without its address."""
    if reason := untrusted(error):
        return f"its certificate is not accepted ({reason})"
    if _cause(error, socket.gaierror) is not None:
        return "its name is not known"
    if isinstance(error, requests.exceptions.SSLError):
        return "TLS cannot be spoken with it"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT_S:.0f} s"
    if isinstance(error, requests.ConnectionError):
        return "the connection was refused or broke"
    return type(error).__name__


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The `kind` somewhere behind `error`: requests and urllib3 wrap one another."""
    seen: Any = error
    while isinstance(seen, BaseException) and not isinstance(seen, kind):
        inner = next((item for item in seen.args if isinstance(item, BaseException)), None)
        seen = inner or getattr(seen, "reason", None) or seen.__cause__ or seen.__context__
    return seen if isinstance(seen, kind) else None
