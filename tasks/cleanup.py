"""Retention: what is old and finished goes, a little at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from infra.storage import Storage
from state.store import Store
from tasks.verify import attempt_key

BATCH = 100
#: An Idempotency-Key is honoured for at least a day.
KEYS_KEPT = timedelta(days=2)
#: Checkpoints and samples of a job that ended; its results are kept elsewhere, for longer.
UPLOADS_KEPT = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    artefacts: int = 0
    attempts: int = 0
    datasets: int = 0
    events: int = 0


def cleanup(
    store: Store, storage: Storage, clock: Callable[[], datetime], retention: timedelta
) -> Cleaned:
    """Delete artefacts, unused datasets and events older than `retention`, one batch of each;
    what attempts uploaded, a week after their job's end; Idempotency-Keys older than two days.

    Objects go before their rows: a row without its object says `expired`, an object without a
    row would be paid for unseen.
    """
    before = clock() - retention
    with store.transaction() as tx:
        artefacts = tx.artefacts_before(before, BATCH)
        datasets = tx.datasets_before(before, BATCH)
        attempts = tx.attempts_over(clock() - min(retention, UPLOADS_KEPT), BATCH)
    for item in artefacts:
        storage.delete(item.key)
    for dataset in datasets:
        storage.delete_prefix(f"datasets/{dataset.id}/")
    for attempt in attempts:
        storage.delete_prefix(attempt_key(attempt.job, attempt.number, ""))
    with store.transaction() as tx:
        tx.put_artefacts([replace(item, expired=True) for item in artefacts])
        for attempt in attempts:
            tx.save_attempt(attempt.evolve(cleared=True, secret=None))
        for dataset in datasets:
            tx.delete_dataset(dataset.id)
        events = tx.drop_events_before(before, BATCH * 100)
        tx.drop_idempotent_before(clock() - KEYS_KEPT, BATCH * 100)
        tx.beat("cleanup", clock())
    return Cleaned(
        artefacts=len(artefacts), attempts=len(attempts), datasets=len(datasets), events=events
    )
