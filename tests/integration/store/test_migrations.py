"""From an empty database to the schema of `infra.schema`, safely, however often."""

from __future__ import annotations

import enum
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from infra import migrations, schema
from infra.crypto import SecretBox
from infra.database import parse_url
from infra.store import SqlStore
from state.errors import StoreUnavailable
from state.events import DatasetStatus, OutgoingStatus
from state.job import Status
from state.lease import LeaseStatus


def test_an_empty_database_has_no_revision_and_an_upgraded_one_the_newest(make_database):
    url = make_database()
    assert migrations.current(url) is None
    migrations.upgrade(url)
    assert migrations.current(url) == migrations.newest()


def test_the_migrated_database_is_what_the_schema_says(database_url):
    engine = sqlalchemy.create_engine(parse_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        difference = compare_metadata(context, schema.metadata)
    engine.dispose()
    assert difference == []


def test_upgrading_twice_changes_nothing(make_database):
    url = make_database()
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO beats VALUES ('sweep', now(), '{}')")
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT name FROM beats").fetchall() == [("sweep",)]


def test_two_processes_may_upgrade_at_once(make_database):
    url = make_database()
    program = "import sys; from infra import migrations; migrations.upgrade(sys.argv[1])"
    root = Path(__file__).parents[3]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, url], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    complaints = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], complaints
    assert migrations.current(url) == migrations.newest()


@pytest.mark.parametrize(
    ("table", "column", "kind"),
    [
        ("jobs", "status", Status),
        ("jobs", "stalled_from", Status),
        ("leases", "status", LeaseStatus),
        ("outgoing", "status", OutgoingStatus),
        ("datasets", "status", DatasetStatus),
    ],
)
def test_the_database_knows_exactly_the_statuses_of_the_enum(
    database_url: str, table: str, column: str, kind: type[enum.StrEnum]
):
    with psycopg.connect(database_url) as connection:
        [(rule,)] = connection.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s",
            (f"{table}_{column}_check",),
        ).fetchall()
    assert set(re.findall(r"'(\w+)'", rule)) == {member.value for member in kind}


def test_a_database_that_was_never_upgraded_says_so(make_database):
    store = SqlStore(make_database(), SecretBox([SecretBox.new_key()]))
    with pytest.raises(StoreUnavailable, match="upgrade"), store.transaction() as tx:
        tx.job("job_1")
    store.close()


def test_an_unreachable_database_is_a_clear_error(tmp_path):
    url = f"postgresql://postgres:hunter2@/postgres?host={tmp_path}"
    for ask in (migrations.upgrade, migrations.current):
        with pytest.raises(StoreUnavailable) as caught:
            ask(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "garbage", "sqlite:///stoker.db", "mysql://u:hunter2@h/d"])
def test_a_url_that_is_not_of_postgresql_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="database") as caught:
        migrations.upgrade(url)
    assert "hunter2" not in str(caught.value)


#: A job as revision 0002 has it.
OLD_JOB = """{
  "id": "job_1", "owner": "acme", "status": "training", "lease": "", "dataset_id": "ds_1",
  "attempt": 1, "seq": 0, "owed": 2, "moved": 0, "interruptions": 0, "dataset_ready": true,
  "created_at": "2026-01-01T00:00:00Z", "entered_at": "2026-01-01T00:00:00Z",
  "known": [], "orders": [], "excluded_machines": [], "request": {}, "progress": {}, "metadata": {}
}"""


def test_webhooks_of_an_older_version_have_an_owner_and_an_end_after_the_upgrade(make_database):
    url = make_database()
    migrations.upgrade(url, "0002")
    with psycopg.connect(url) as connection:
        stored = "INSERT INTO jobs SELECT * FROM json_populate_record(NULL::jobs, %s)"
        connection.execute(stored, [OLD_JOB])
        connection.execute(
            "INSERT INTO outgoing (id, job, seq, type, created_at, payload, status, tries) VALUES"
            " ('m1', 'job_1', 1, 'x', '2026-01-01Z', '{}', 'delivered', 1),"
            " ('m2', 'job_1', 2, 'x', '2026-01-01Z', '{}', 'waiting', 1)"
        )
        connection.execute(
            "INSERT INTO deliveries (outgoing, job, tried_at, answer, took_ms, error)"
            " VALUES ('m1', 'job_1', '2026-01-02Z', 200, 1, '')"
        )
    migrations.upgrade(url)
    with psycopg.connect(url) as connection:
        # and a process that was not restarted yet goes on
        connection.execute(
            "INSERT INTO outgoing (id, job, seq, type, created_at, payload, status, tries)"
            " VALUES ('m3', 'job_1', 3, 'x', '2026-01-03Z', '{}', 'waiting', 0)"
        )
        rows = connection.execute(
            "SELECT endpoint, owner, ended_at::date::text FROM outgoing ORDER BY seq"
        ).fetchall()
    assert rows == [("", "acme", "2026-01-02"), ("", "acme", None), ("", "", None)]
