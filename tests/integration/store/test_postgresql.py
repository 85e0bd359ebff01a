"""What only the store on PostgreSQL has: sealed secrets, lost connections, forks, hostile text."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql

from infra import schema, statements
from infra.crypto import SecretBox
from infra.store import SqlStore
from state.errors import Conflict, NotFound, SecretUnreadable, StoreUnavailable
from state.events import Secret
from state.lease import LeaseStatus

# --- secrets at rest --------------------------------------------------------------------------


def raw_text(database_url: str) -> str:
    """Everything that lies in the database, bytes as latin-1."""
    with psycopg.connect(database_url) as connection:
        rows = [
            connection.execute(
                sql.SQL("SELECT * FROM {}").format(sql.Identifier(table.name))
            ).fetchall()
            for table in schema.metadata.sorted_tables
        ]
    return repr(rows) + repr(
        [
            bytes(value).decode("latin-1")
            for table in rows
            for row in table
            for value in row
            if isinstance(value, bytes | memoryview)
        ]
    )


def store_secrets(store: SqlStore, make) -> str:
    job = make.job()
    with store.transaction() as tx:
        tx.add_job(job, webhook_secrets=[Secret("whsec_canary1")])
        tx.add_attempt(make.attempt(job.id, secret=Secret("whsec_canary2")))
    return job.id


def read_secrets(store: SqlStore, job_id: str) -> tuple[str, str]:
    with store.transaction() as tx:
        [customer], attempt = tx.webhook_secrets(job_id), tx.attempt(job_id, 1)
        return customer.reveal(), attempt.secret.reveal()


def test_secrets_cannot_be_read_in_the_tables(sql_store, empty_database, make):
    job_id = store_secrets(sql_store, make)
    everything = raw_text(empty_database)
    assert job_id in everything
    assert "whsec" not in everything
    assert "canary" not in everything
    assert read_secrets(sql_store, job_id) == ("whsec_canary1", "whsec_canary2")


def test_secrets_of_an_older_key_still_open_after_a_rotation(empty_database, make):
    old, new = SecretBox.new_key(), SecretBox.new_key()
    store = SqlStore(empty_database, SecretBox([old]))
    job_id = store_secrets(store, make)
    store.close()
    rotated = SqlStore(empty_database, SecretBox([new, old]))
    assert read_secrets(rotated, job_id) == ("whsec_canary1", "whsec_canary2")
    rotated.close()


def test_a_wrong_key_is_a_clear_error(sql_store, empty_database, make):
    job_id = store_secrets(sql_store, make)
    other = SqlStore(empty_database, SecretBox([SecretBox.new_key()]))
    with pytest.raises(SecretUnreadable, match="older key missing"):
        read_secrets(other, job_id)
    other.close()


# --- values that no database can keep ---------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"line": "a\x00b"},
        {"line": "\ud800"},
        {"\x00": 1},
        {"line": "\\\x00"},
    ],
)
def test_what_cannot_be_stored_is_refused_and_spoils_nothing_else(sql_store, make, data):
    with sql_store.transaction() as tx:
        for events in (
            [make.event("job_1", 1, data=data)],
            [make.event("job_1", 1, data=data)] * 2,
        ):
            with pytest.raises(ValueError, match=r"(?i)cannot be stored|not JSON|surrogates"):
                tx.add_events(events)
        tx.add_events([make.event("job_1", 1, data={"line": "\\u0000 \\ud800 ☃ \u2028"})])
    with sql_store.transaction() as tx:
        assert tx.events("job_1")[0].data == {"line": "\\u0000 \\ud800 ☃ \u2028"}


def test_a_text_that_cannot_be_stored_is_refused(sql_store, make):
    for text in ("a\x00b", "\ud800"):

        def add(text=text):
            with sql_store.transaction() as tx:
                tx.add_job(make.job(owner=text))

        with pytest.raises(ValueError, match="cannot be stored"):
            add()


# --- faults within a transaction --------------------------------------------------------------


def test_an_error_that_was_swallowed_is_not_taken_for_success(sql_store, make):
    first = make.lease("job_1").to(LeaseStatus.RELEASED)

    def swallow():
        with sql_store.transaction() as tx:
            tx.add_lease(first)
            tx.add_lease(make.lease("job_1"))
            with pytest.raises(Conflict):
                tx.save_lease(first.evolve(status=LeaseStatus.RENTED))

    with pytest.raises(RuntimeError, match="nothing is committed"):
        swallow()
    with sql_store.transaction() as tx, pytest.raises(NotFound):
        tx.lease(first.id)


def test_waiting_too_long_for_a_lock_is_an_outage_and_changes_nothing(empty_database, box, make):
    store = SqlStore(empty_database, box, statement_timeout=100)
    job = make.job()
    with store.transaction() as tx:
        tx.add_job(job)

    def wait():
        with store.transaction() as tx:
            tx.beat("second", make.now)
            tx.job(job.id, lock=True)

    with store.transaction() as tx:
        tx.job(job.id, lock=True)
        with ThreadPoolExecutor(1) as thread, pytest.raises(StoreUnavailable, match="timeout"):
            thread.submit(wait).result(30)
    with store.transaction() as tx:
        assert tx.beats() == {}
    store.close()


def test_an_interrupted_transaction_gives_its_connection_back(empty_database, box, make):
    store = SqlStore(empty_database, box, pool_size=1)

    def interrupt():
        with store.transaction() as tx:
            tx.beat("sweep", make.now)
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    with store.transaction() as tx:
        assert tx.beats() == {}
    store.close()


# --- lost connections -------------------------------------------------------------------------


def end_all_connections(database_url: str) -> None:
    """What a restart of the server does to them."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_restart_between_transactions_is_not_noticed(sql_store, empty_database, make):
    together = threading.Barrier(4)

    def beat(number):
        with sql_store.transaction() as tx:
            tx.beat(str(number), make.now)
            together.wait(30)

    for _ in range(2):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(beat, range(4)))
        end_all_connections(empty_database)
    with sql_store.transaction() as tx:
        assert len(tx.beats()) == 4


def test_a_restart_within_a_transaction_is_an_outage_and_the_next_one_works(
    sql_store, empty_database, make
):
    def interrupted():
        with sql_store.transaction() as tx:
            tx.beat("lost", make.now)
            end_all_connections(empty_database)
            tx.beat("never", make.now)

    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            interrupted()
    with sql_store.transaction() as tx:
        assert tx.beats() == {}


def test_a_connection_lost_before_the_commit_is_an_outage(sql_store, empty_database, make):
    def interrupted():
        with sql_store.transaction() as tx:
            tx.beat("lost", make.now)
            end_all_connections(empty_database)

    with pytest.raises(StoreUnavailable):
        interrupted()
    with sql_store.transaction() as tx:
        assert tx.beats() == {}


def test_a_database_that_is_not_there_is_an_outage_without_a_password(tmp_path, box):
    store = SqlStore(f"postgresql://postgres:hunter2@/db?host={tmp_path}", box)
    with pytest.raises(StoreUnavailable, match="cannot be asked") as caught, store.transaction():
        pass
    assert "hunter2" not in str(caught.value)
    store.close()


def test_making_a_store_asks_nothing_of_the_database(tmp_path, box):
    SqlStore(Secret(f"postgresql://postgres@/db?host={tmp_path}"), box).close()


def test_a_forked_process_opens_its_own_connections(sql_store, make):
    with sql_store.transaction() as tx:
        tx.beat("before", make.now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside other threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            with sql_store.transaction() as tx:
                tx.beat("child", make.now)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    with sql_store.transaction() as tx:
        assert set(tx.beats()) == {"before", "child"}


def test_commits_are_durable_and_times_are_utc_whatever_the_server_prefers(
    empty_database, box, make
):
    name = empty_database.partition("?")[0].rpartition("/")[2]
    with psycopg.connect(empty_database, autocommit=True) as connection:
        for setting in ("synchronous_commit = off", "TimeZone = 'Asia/Tokyo'"):
            connection.execute(f"ALTER DATABASE {name} SET {setting}".encode())
    store = SqlStore(empty_database, box)
    try:
        with store.transaction() as tx:
            tx.beat("sweep", make.now)
            shown = tx._raw.execute("SHOW synchronous_commit").fetchone()
            assert tx.beats()["sweep"][0].isoformat() == make.now.isoformat()
        assert shown == ("on",)
    finally:
        store.close()
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} RESET ALL".encode())


@pytest.mark.parametrize("table", [schema.jobs, schema.leases, schema.datasets], ids=str)
def test_what_is_due_is_found_by_index(empty_database, make, table):
    """However many rows there are; where there are few, only because it may not read or sort them
    all."""
    values = {"now": make.now, "until": make.after(60), "limit": 10}
    with psycopg.connect(empty_database) as connection:
        for way in ("seqscan", "bitmapscan", "sort"):
            connection.execute(f"SET enable_{way} = off".encode())
        claim = statements.claim(table, ("id",))
        plan = [row[0].strip() for row in connection.execute(b"EXPLAIN " + claim, values)]
    assert any(f"using {table.name}_due on" in line for line in plan), plan
    assert any(line.startswith("Index Cond: (due_at <=") for line in plan), plan
