"""The server's two layers of the dead man's switch, each alone. The machines here are dead men:
they do nothing by themselves, and run and bill until somebody destroys them.

The machine's own layer, alone: `tests/integration/agent/test_dead_mans_switch.py`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from gpu_agent.wire import Fact
from state.job import Status
from state.lease import LeaseStatus
from tasks.deallocate import sweep


def alive(world: Any) -> list[str]:
    return [item.id for item in world.provider.rentals.values() if item.destroyed_at is None]


def training(world: Any) -> None:
    """A job that trains, on the only machine there is."""
    world.add_job(max_cost=1_000_000_000)
    world.tick()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    assert world.job().status is Status.TRAINING


def test_a_lease_that_ends_takes_its_machine_though_it_works_on_and_nobody_sweeps(
    world: Any,
) -> None:
    training(world)
    (machine,) = alive(world)
    # shorter than what a training may take, so that nothing else ends it
    ends = world.clock() + timedelta(hours=1)
    (lease,) = world.leases()
    with world.store.transaction() as tx:
        tx.save_lease(lease.evolve(expires_at=ends, due_at=ends))
    step = 0
    while world.clock() < ends:
        assert machine in alive(world)
        step += 1
        world.report(Fact.TRAINING_PROGRESS, {"step": step, "total": 10**6, "moved": step})
        world.tick(30)
    for _ in range(5):
        world.tick(3)  # too short for its silence to be the reason
    assert machine not in alive(world)


def test_a_lease_that_ends_takes_its_machine_though_its_weights_wait_to_be_verified(
    world: Any,
) -> None:
    training(world)
    world.report(Fact.WEIGHTS_UPLOADED, {"files": []})
    (lease,) = world.leases()
    world.clock.now = lease.expires_at
    for _ in range(10):
        world.keeper.tend([lease.id])
        world.clock.advance(30)
    assert alive(world) == []
    assert (world.job().status, world.leases()[0].status) == (
        Status.TRAINING,
        LeaseStatus.RELEASED,
    )


def test_a_machine_whose_lease_was_released_by_mistake_goes_at_the_second_sweep(
    world: Any,
) -> None:
    training(world)
    (machine,) = alive(world)
    (lease,) = world.leases()
    with world.store.transaction() as tx:
        lease = tx.lease(lease.id, lock=True)
        gone = {"why": "by mistake", "due_at": None, "released_at": world.clock()}
        lease = lease.to(LeaseStatus.RELEASING).to(LeaseStatus.RELEASED, **gone)
        tx.save_lease(lease)
    assert sweep(world.keeper, "test").suspects == (machine,)
    assert machine in alive(world)
    assert sweep(world.keeper, "test").destroyed == (machine,)
    assert alive(world) == []
