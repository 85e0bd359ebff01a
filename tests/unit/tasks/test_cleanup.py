"""Retention: what is old and finished goes; what is in use or young stays."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from state import record
from state.events import Artefact, Dataset, DatasetStatus, Idempotent
from tasks.cleanup import cleanup

MONTH = timedelta(days=30)


def artefact(world: Any, name: str) -> Artefact:
    return Artefact(
        job="job_1",
        name=name,
        attempt=1,
        key=f"jobs/job_1/result/{name}",
        bytes=1,
        sha256="0" * 64,
        created_at=world.clock(),
    )


def test_old_results_of_an_ended_job_expire_and_young_ones_stay(world: Any, storage: Any) -> None:
    world.add_job()
    for name, days in (("old", 31), ("young", 0)):
        storage.objects[f"jobs/job_1/result/{name}"] = b"x"
        with world.store.transaction() as tx:
            tx.put_artefacts([artefact(world, name)])
        world.clock.advance(days * 86_400)
    cleaned = cleanup(world.store, storage, world.clock, MONTH)
    assert cleaned.artefacts == 1
    assert list(storage.objects) == ["jobs/job_1/result/young"]
    with world.store.transaction() as tx:
        assert {item.name: item.expired for item in tx.artefacts("job_1")} == {
            "old": True,
            "young": False,
        }
    assert cleanup(world.store, storage, world.clock, MONTH).artefacts == 0


def test_what_attempts_uploaded_goes_a_week_after_the_jobs_end_however_it_ended(
    world: Any, storage: Any
) -> None:
    world.add_job()
    world.tick()
    world.hello()
    storage.objects["jobs/job_1/attempts/1/checkpoints/1-a/lora.safetensors"] = b"x"
    world.clock.advance(40 * 86_400)
    assert cleanup(world.store, storage, world.clock, MONTH).attempts == 0, "it runs still"
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.clock.advance(6 * 86_400)
    assert cleanup(world.store, storage, world.clock, MONTH).attempts == 0
    world.clock.advance(2 * 86_400)
    assert cleanup(world.store, storage, world.clock, MONTH).attempts == 1
    assert not storage.objects
    with world.store.transaction() as tx:
        assert tx.attempt("job_1", 1).secret is None, "and nobody can sign for it any more"
    assert cleanup(world.store, storage, world.clock, MONTH).attempts == 0


def test_a_dataset_goes_when_no_live_job_uses_it(world: Any, storage: Any) -> None:
    world.add_job()
    storage.objects["datasets/ds_job_1/a.zip"] = b"x"
    with world.store.transaction() as tx:
        tx.add_dataset(
            Dataset(id="ds_x", owner="o", created_at=world.clock(), status=DatasetStatus.OPEN)
        )
    world.clock.advance(31 * 86_400)
    assert cleanup(world.store, storage, world.clock, MONTH).datasets == 1
    assert storage.objects
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    assert cleanup(world.store, storage, world.clock, MONTH).datasets == 1
    assert not storage.objects


def test_an_idempotency_key_is_kept_for_a_day_and_not_for_ever(world: Any, storage: Any) -> None:
    row = Idempotent(owner="o", key="k", body_hash="b", created_at=world.clock())
    with world.store.transaction() as tx:
        tx.begin_idempotent(row)
    for hours, known in ((25, True), (25, False)):
        world.clock.advance(hours * 3600)
        cleanup(world.store, storage, world.clock, MONTH)
        with world.store.transaction() as tx:
            assert (tx.begin_idempotent(row) is not None) is known
