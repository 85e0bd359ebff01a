"""Two processes, one database, the same moment: one of them waits, and then sees what was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from gpu_agent.wire import Fact, Report
from infra.provider_memory import MemoryProvider
from infra.store import SqlStore
from state import record
from state.events import Attempt, Dataset, DatasetStatus
from state.job import JobRequest
from state.money import Limits
from state.offer import Offer
from state.record import Outcome
from tasks.allocate import Renter, Terms


@dataclass
class Second:
    """The other process."""

    database_url: str
    threads: ThreadPoolExecutor

    def begins(self, work: Callable[[], Any]) -> Future[Any]:
        """Start `work`; returns once it waits for a lock, or is done."""
        future = self.threads.submit(work)
        deadline = time.monotonic() + 10
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            while not future.done() and not self._waits(connection):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return future

    def _waits(self, connection: psycopg.Connection) -> bool:
        found = connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted LIMIT 1").fetchone()
        return found is not None


@pytest.fixture
def second(empty_database: str) -> Iterator[Second]:
    with ThreadPoolExecutor(1) as threads:
        yield Second(empty_database, threads)


def add_job(store: SqlStore, make: Any, job_id: str) -> None:
    with store.transaction() as tx:
        ready = {"created_at": make.now, "status": DatasetStatus.READY}
        tx.add_dataset(Dataset(id=f"ds_{job_id}", owner="o", **ready))
        request = JobRequest(dataset_id=f"ds_{job_id}", base="civitai:1")
        record.create_job(tx, request, owner="o", now=make.now, job_id=job_id)
        tx.add_attempt(Attempt(job=job_id, number=1, created_at=make.now))


def said(make: Any, seq: int) -> Report:
    at = make.now.timestamp()
    return Report(job="job_1", attempt=1, seq=seq, type=Fact.HEARTBEAT, at=at)


@pytest.mark.parametrize(("number", "outcome"), [(1, Outcome.DUPLICATE), (2, Outcome.APPLIED)])
def test_reports_of_a_job_that_come_to_two_processes_at_once_are_each_one_event(
    sql_store: SqlStore, second: Second, make: Any, number: int, outcome: Outcome
) -> None:
    add_job(sql_store, make, "job_1")

    def take(tx: Any, seq: int) -> Outcome:
        return record.take_reports(tx, [said(make, seq)], make.now)[0].outcome

    def take_elsewhere() -> Outcome:
        with sql_store.transaction() as tx:
            return take(tx, number)

    with sql_store.transaction() as tx:
        assert take(tx, 1) is Outcome.APPLIED
        elsewhere = second.begins(take_elsewhere)
    assert elsewhere.result(10) is outcome
    with sql_store.transaction() as tx:
        events, job = tx.events("job_1"), tx.job("job_1")
    assert [event.seq for event in events] == list(range(1, job.seq + 1))
    assert len({event.webhook_id for event in events if event.webhook_id}) == number


def offer(number: int) -> Offer:
    prices = {"price": 400_000, "storage_price": 0, "download_price": 0, "upload_price": 0}
    speeds = {"download_mbps": 800.0, "upload_mbps": 800.0, "reliability": 0.99}
    sizes = {"num_gpus": 1, "vram_gb": 24.0, "disk_gb": 100.0, "cuda": 12.8}
    names = {"id": str(number), "machine_id": f"m{number}", "gpu_name": "RTX 4090"}
    return Offer(**names, **prices, **speeds, **sizes, verified=True)


class Halfway(SqlStore):
    """A store that pauses once, within a transaction that has added a lease."""

    pause: Callable[[], None] | None = None

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        with super().transaction() as tx:
            yield tx
            if self.pause is not None and tx.open_leases():
                pause, self.pause = self.pause, None
                pause()


def test_two_jobs_that_rent_at_once_stay_within_the_limit_together(
    empty_database: str, box: Any, second: Second, make: Any
) -> None:
    store = Halfway(empty_database, box)
    provider = MemoryProvider(lambda: make.now, [offer(1), offer(2)])
    terms = Terms(
        deployment="test",
        image="image",
        public_url="http://stoker",
        onstart="true",
        limits=Limits(machines=1),
    )
    renter = Renter(store=store, provider=provider, terms=terms, clock=lambda: make.now)
    for job_id in ("job_1", "job_2"):
        add_job(store, make, job_id)
    others: list[Future[Any]] = []
    store.pause = lambda: others.append(second.begins(lambda: renter.allocate("job_2")))
    try:
        assert renter.allocate("job_1") is not None
        assert others[0].result(10) is None
        assert len(provider.rentals) == 1
    finally:
        store.close()
