"""Messages are wake-ups: what is due is found in the store, however many of them are lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from state import record
from state.events import Dataset, DatasetStatus
from tasks import reconcile
from tasks.relay import Answer, Relay


class Messages:
    """What a pass sent to the workers, none of whom ever gets any."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def __call__(self) -> set[tuple[str, str]]:
        sent: list[tuple[str, Sequence[str]]] = []
        reconcile.reconcile(
            self.world.store, lambda task, ids: sent.append((task, ids)), self.world.clock()
        )
        return {(task, item) for task, ids in sent for item in ids}


def test_with_every_message_lost_work_is_still_found(world: Any) -> None:
    """A job, its webhook, its machine, and a dataset: nobody was told of any of them."""
    world.add_job()
    found = Messages(world)
    assert found() == {("allocate", "job_1"), ("relay", "job_1")}
    lease = world.renter.allocate("job_1")
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
        tx.add_dataset(
            Dataset(id="ds_2", owner="o", created_at=world.clock(), status=DatasetStatus.OPEN)
        )
        record.seal(tx, "ds_2", world.clock())
    assert found() == {("tend", lease.id), ("relay", "job_1"), ("build", "ds_2")}


def test_a_wake_up_that_was_lost_comes_again(world: Any) -> None:
    world.add_job()
    found = Messages(world)
    assert ("allocate", "job_1") in found()
    assert ("allocate", "job_1") not in found(), "somebody is on it"
    world.clock.advance(reconcile.CLAIM.total_seconds())
    assert ("allocate", "job_1") in found()


def test_what_is_done_is_not_found_again(world: Any) -> None:
    world.add_job(webhook_url=None)
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    for _ in range(3):
        assert Messages(world)() == set()
        world.clock.advance(timedelta(days=1).total_seconds())


def test_a_webhook_that_was_refused_is_found_when_its_next_try_is_due(world: Any) -> None:
    world.add_job()
    found = Messages(world)
    found()
    relay = Relay(
        store=world.store,
        post=lambda *args, **named: Answer(503, {}),
        clock=world.clock,
        random=random.Random(1),
    )
    relay.relay("job_1")
    assert ("relay", "job_1") not in found()
    world.clock.advance(6)
    assert ("relay", "job_1") in found()
