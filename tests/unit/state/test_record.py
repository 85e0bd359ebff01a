"""What a change of a job writes down, all in its one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpu_agent.wire import Fact, Report
from state import record
from state.errors import AttemptOver, IllegalMove
from state.events import Attempt, Dataset, DatasetStatus, Secret
from state.job import Job, JobRequest, Reason, Status
from state.lease import Lease, LeaseStatus
from state.memory import MemoryStore, MemoryTransaction
from state.record import Outcome

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
LOST = Reason(code="host.ended", message="gone")
TO_TRAINING = (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED)


@pytest.fixture
def tx() -> Iterator[MemoryTransaction]:
    """One transaction, and in it a job whose agent is on its machine."""
    store = MemoryStore()
    with store.transaction() as tx:
        tx.add_dataset(Dataset(id="ds_1", owner="o", created_at=NOW, status=DatasetStatus.READY))
        request = JobRequest(
            dataset_id="ds_1", base="civitai:1", webhook_url="https://customer.example/hook"
        )
        record.create_job(tx, request, owner="o", now=NOW, job_id="job_1")
        rent(tx)
        yield tx


def rent(tx: MemoryTransaction) -> None:
    """A machine for the job's present attempt, and its agent's hello."""
    job = tx.job("job_1")
    token = f"token {job.attempt}"
    tx.add_attempt(Attempt(job=job.id, number=job.attempt, created_at=NOW))
    tx.add_lease(
        Lease(
            id=f"l{job.attempt}",
            job=job.id,
            attempt=job.attempt,
            label=f"test/job_1/{job.attempt}-0",
            created_at=NOW,
            expires_at=NOW + timedelta(hours=1),
            status=LeaseStatus.RENTED,
            instance_id=str(job.attempt),
            token_hash=token,
            token_expires_at=NOW + timedelta(hours=1),
            due_at=NOW + timedelta(hours=1),
        )
    )
    hello(tx, token)


def hello(tx: MemoryTransaction, token: str) -> None:
    seen = record.knock(tx, token, "nonce", NOW, lock=True)
    record.admit(tx, seen, nonce="nonce", secret=Secret("whsec_" + "A" * 44), now=NOW)


def report(tx: MemoryTransaction, *facts: Fact, first: int = 1) -> list[Outcome]:
    attempt = tx.job("job_1").attempt
    sent = [
        Report(job="job_1", attempt=attempt, seq=number, type=fact, at=NOW.timestamp())
        for number, fact in enumerate(facts, first)
    ]
    return [taken.outcome for taken in record.take_reports(tx, sent, NOW)]


def move_elsewhere(tx: MemoryTransaction) -> None:
    record.stall(tx, "job_1", LOST, NOW)
    record.retry(tx, "job_1", LATER)


def complete(tx: MemoryTransaction) -> Job:
    report(tx, *TO_TRAINING, Fact.WEIGHTS_UPLOADED)
    return record.verified(tx, "job_1", 1, NOW)


def give_up(tx: MemoryTransaction) -> Job:
    return record.stall(tx, "job_1", Reason(code="x", message="x", retryable=False), NOW)


ENDS: dict[Status, Callable[[MemoryTransaction], Job]] = {
    Status.CANCELLED: lambda tx: record.cancel(tx, "job_1", NOW),
    Status.STALLED: lambda tx: record.stall(tx, "job_1", LOST, NOW),
    Status.FAILED: give_up,
    Status.COMPLETED: complete,
}


@pytest.mark.parametrize("status", ENDS)
def test_whatever_ends_or_stalls_a_job_lets_its_machine_go_in_one_transaction(
    tx: MemoryTransaction, status: Status
) -> None:
    assert ENDS[status](tx).status is status
    lease = tx.lease("l1")
    assert (lease.status, lease.due_at) == (LeaseStatus.RELEASING, NOW)


def test_events_and_webhooks_are_numbered_without_gaps(tx: MemoryTransaction) -> None:
    report(tx, *TO_TRAINING, Fact.HEARTBEAT)
    move_elsewhere(tx)
    record.cancel(tx, "job_1", LATER)
    events, webhooks, job = tx.events("job_1"), tx.list_outgoing("job_1"), tx.job("job_1")
    assert [event.seq for event in events] == list(range(1, job.seq + 1))
    assert [row.seq for row in webhooks] == list(range(1, job.owed + 1))
    told = [event.data["to"] for event in events if event.type == "transition"]
    assert [row.payload["data"]["status"] for row in webhooks] == told


def test_a_report_that_comes_again_is_one_event(tx: MemoryTransaction) -> None:
    assert report(tx, Fact.GPU_READY) == [Outcome.APPLIED]
    job, events = tx.job("job_1"), tx.events("job_1")
    assert report(tx, Fact.GPU_READY) == [Outcome.DUPLICATE]
    assert (tx.job("job_1"), tx.events("job_1")) == (job, events)


def test_the_verification_of_an_old_attempt_completes_nothing(tx: MemoryTransaction) -> None:
    move_elsewhere(tx)
    rent(tx)
    report(tx, *TO_TRAINING, Fact.WEIGHTS_UPLOADED)
    with pytest.raises(IllegalMove):
        record.verified(tx, "job_1", 1, LATER)
    assert tx.job("job_1").status is Status.TRAINING
    assert record.verified(tx, "job_1", 2, LATER).status is Status.COMPLETED


def test_the_machine_of_an_old_attempt_is_not_let_in(tx: MemoryTransaction) -> None:
    move_elsewhere(tx)
    forget_to_release(tx)
    with pytest.raises(AttemptOver):
        hello(tx, "token 1")
    assert tx.job("job_1").lease == ""


def test_the_end_of_an_old_attempts_machine_is_nothing_to_the_new_one(
    tx: MemoryTransaction,
) -> None:
    move_elsewhere(tx)
    forget_to_release(tx)
    job = tx.job("job_1")
    assert record.machine_failed(tx, "l1", LOST, LATER) is None
    assert tx.job("job_1") == job


def forget_to_release(tx: MemoryTransaction) -> None:
    """The first attempt's lease, as if its end had released nothing: that it is of an old attempt
    must be reason enough."""
    forgotten: Any = object.__new__(Lease)
    vars(forgotten).update(vars(tx.lease("l1")), status=LeaseStatus.RENTED)
    tx.save_lease(forgotten)
