"""Both stores, empty, behind one fixture; and short ways of making values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from infra import schema
from infra.crypto import SecretBox
from infra.store import SqlStore
from state.events import Attempt, Dataset, Event, Outgoing
from state.job import Job, JobRequest
from state.lease import Lease
from state.memory import MemoryStore
from state.store import Store


@pytest.fixture
def box() -> SecretBox:
    return SecretBox([SecretBox.new_key()])


@pytest.fixture
def empty_database(database_url: str) -> str:
    """The session's database with no row in it."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        emptying = ";".join(str(table.delete()) for table in schema.metadata.sorted_tables)
        connection.execute(emptying.encode())
    return database_url


@pytest.fixture
def sql_store(empty_database: str, box: SecretBox) -> Iterator[SqlStore]:
    store = SqlStore(empty_database, box)
    yield store
    store.close()


@pytest.fixture(params=["memory", "postgresql"])
def store(request: pytest.FixtureRequest) -> Store:
    """What every test of the contract runs over."""
    if request.param == "memory":
        return MemoryStore()
    found: Store = request.getfixturevalue("sql_store")
    return found


class Make:
    """Values with only what a test cares about said; ids count up, so that they sort by age."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
        self._number = itertools.count(1)

    def after(self, seconds: float) -> datetime:
        return self.now + timedelta(seconds=seconds)

    def _next(self, kind: str) -> str:
        return f"{kind}_{next(self._number):06}"

    def job(self, *, dataset: str = "ds_1", request: dict[str, Any] | None = None, **given: Any):
        wanted = {"dataset_id": dataset, "base": "civitai:128713"} | (request or {})
        return Job(
            **{
                "id": self._next("job"),
                "owner": "acme",
                "request": JobRequest(**wanted),
                "created_at": self.now,
                "entered_at": self.now,
            }
            | given
        )

    def event(self, job: str, seq: int, **given: Any) -> Event:
        return Event(
            **{"job": job, "seq": seq, "attempt": 1, "type": "heartbeat", "at": self.now} | given
        )

    def report(self, job: str, seq: int, *, agent_seq: int | None = None, **given: Any) -> Event:
        number = seq if agent_seq is None else agent_seq
        named = {"agent_seq": number, "webhook_id": f"{job}.1.{number}"}
        return self.event(job, seq, **named | given)

    def outgoing(self, job: str, seq: int, **given: Any) -> Outgoing:
        return Outgoing(
            **{
                "id": self._next("msg"),
                "job": job,
                "seq": seq,
                "type": "job.status",
                "created_at": self.now,
                "payload": {"status": "training"},
                "due_at": self.now,
            }
            | given
        )

    def attempt(self, job: str, number: int = 1, **given: Any) -> Attempt:
        return Attempt(
            **{
                "job": job,
                "number": number,
                "created_at": self.now,
            }
            | given
        )

    def lease(self, job: str, attempt: int = 1, **given: Any) -> Lease:
        name = self._next("lease")
        return Lease(
            **{
                "id": name,
                "job": job,
                "attempt": attempt,
                "label": f"stoker/{job}/{attempt}-{name}",
                "created_at": self.now,
                "expires_at": self.after(3600),
            }
            | given
        )

    def dataset(self, **given: Any) -> Dataset:
        return Dataset(**{"id": self._next("ds"), "owner": "acme", "created_at": self.now} | given)


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def commit(store: Store) -> Callable[..., Any]:
    """`commit("add_job", job)`: one call in a transaction of its own; its answer."""

    def call(name: str, *values: Any, **named: Any) -> Any:
        with store.transaction() as tx:
            return getattr(tx, name)(*values, **named)

    return call
