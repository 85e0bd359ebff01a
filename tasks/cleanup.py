"""Retention: what is old and finished goes, a little at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from infra.storage import Storage
from state.store import Store

BATCH = 100
#: An Idempotency-Key is honoured for at least a day.
KEYS_KEPT = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    artefacts: int = 0
    datasets: int = 0
    events: int = 0


def cleanup(
    store: Store, storage: Storage, clock: Callable[[], datetime], retention: timedelta
) -> Cleaned:
    """Delete artefacts, unused datasets and events older than `retention`, one batch of each;
    and Idempotency-Keys older than two days.

    Objects go before their rows: a row without its object says `expired`, an object without a
    row would be paid for unseen.
    """
    before = clock() - retention
    with store.transaction() as tx:
        artefacts = tx.artefacts_before(before, BATCH)
        datasets = tx.datasets_before(before, BATCH)
    for item in artefacts:
        storage.delete(item.key)
    for dataset in datasets:
        storage.delete_prefix(f"datasets/{dataset.id}/")
    for job_id in {item.job for item in artefacts}:
        storage.delete_prefix(f"jobs/{job_id}/attempts/")
    with store.transaction() as tx:
        tx.put_artefacts([replace(item, expired=True) for item in artefacts])
        for dataset in datasets:
            tx.delete_dataset(dataset.id)
        events = tx.drop_events_before(before, BATCH * 100)
        tx.drop_idempotent_before(clock() - KEYS_KEPT, BATCH * 100)
        tx.beat("cleanup", clock())
    return Cleaned(artefacts=len(artefacts), datasets=len(datasets), events=events)
