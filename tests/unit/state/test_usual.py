"""How long jobs usually stay in a status."""

from __future__ import annotations

from state import record, usual
from state.events import Dataset, DatasetStatus
from state.job import JobRequest, Status
from state.memory import MemoryStore


def a_store(clock):
    store = MemoryStore()
    with store.transaction() as tx:
        ready = DatasetStatus.READY
        tx.add_dataset(Dataset(id="ds_1", owner="a", created_at=clock(), status=ready))
    return store


def a_job(store, clock, name, *, waits, cancelled=True):
    """A job that waits so many seconds for a GPU, and is cancelled."""
    with store.transaction() as tx:
        job = record.create_job(
            tx, JobRequest(dataset_id="ds_1", base="civitai:1"), owner="a", now=clock(), job_id=name
        )
    clock.advance(waits)
    if cancelled:
        with store.transaction() as tx:
            record.cancel(tx, job.id, clock())


def test_the_median_and_the_slow_end_of_what_was_left(clock):
    store = a_store(clock)
    for number in range(20):
        a_job(store, clock, f"job_{number:02d}", waits=10 + number)
    a_job(store, clock, "job_99", waits=1000, cancelled=False)
    with store.transaction() as tx:
        found = usual.measure(tx)
    waited = found[Status.PENDING_GPU]
    assert (waited.p50, waited.p95, waited.count) == (19.5, 29.0, 20)
    assert found[Status.PENDING].p95 == 0.0
    assert Status.TRAINING not in found


def test_it_is_kept_for_pages_and_metrics(clock):
    store = a_store(clock)
    a_job(store, clock, "job_1", waits=10)
    with store.transaction() as tx:
        assert usual.known(tx.beats()) == {}
        usual.keep(tx, usual.measure(tx), clock())
        assert usual.known(tx.beats())[Status.PENDING_GPU].p50 == 10.0
