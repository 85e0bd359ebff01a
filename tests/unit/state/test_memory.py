"""What only the store in memory promises; `tests/integration/store` holds what all stores do."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from state.job import Job, JobRequest, Status
from state.memory import MemoryStore

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def job(number: int, **given) -> Job:
    return Job(
        **{
            "id": f"job_{number:08}",
            "owner": "acme",
            "request": JobRequest(dataset_id=f"ds_{number}", base="civitai:1"),
            "created_at": NOW,
            "entered_at": NOW,
        }
        | given
    )


def test_a_transaction_inside_a_transaction_is_refused_instead_of_waiting_for_ever():
    store = MemoryStore()
    with (
        store.transaction(),
        pytest.raises(RuntimeError, match="wait for itself"),
        store.transaction(),
    ):
        pass
    with store.transaction() as tx:
        tx.beat("sweep", NOW)


def test_a_transaction_that_ended_writes_nothing_more():
    store = MemoryStore()
    with store.transaction() as tx:
        pass
    with pytest.raises(RuntimeError, match="ended"):
        tx.beat("sweep", NOW)
    with store.transaction() as tx:
        assert tx.beats() == {}
    store.close()


def test_a_due_time_that_moves_often_does_not_pile_up():
    store = MemoryStore()
    with store.transaction() as tx:
        tx.add_job(job(1))
    for second in range(10_000):
        with store.transaction() as tx:
            tx.save_job(job(1, due_at=NOW + timedelta(seconds=second)))
    assert len(store._data.jobs._heap) < 100
    with store.transaction() as tx:
        assert tx.claim_due_jobs(NOW + timedelta(seconds=9_998), NOW, 9) == []
        assert len(tx.claim_due_jobs(NOW + timedelta(seconds=9_999), NOW, 9)) == 1


def seconds_of_work(jobs: int) -> float:
    """Time of a fixed amount of work in a store that holds so many jobs."""
    store = MemoryStore()
    with store.transaction() as tx:
        for number in range(jobs):
            tx.add_job(job(number, due_at=NOW + timedelta(days=1)))

    def work() -> float:
        started = time.perf_counter()
        for number in range(200):
            with store.transaction() as tx:
                tx.save_job(job(number, status=Status.TRAINING, due_at=NOW))
            with store.transaction() as tx:
                assert len(tx.claim_due_jobs(NOW, NOW + timedelta(days=1), 10)) == 1
                assert tx.list_jobs(dataset=f"ds_{number}")
        return time.perf_counter() - started

    return min(work() for _ in range(3))


def test_what_a_transaction_costs_does_not_grow_with_the_store():
    """A hundredfold store; scanning or copying it would cost a hundredfold."""
    assert seconds_of_work(20_000) < 10 * seconds_of_work(200)
