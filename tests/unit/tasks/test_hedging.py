"""Two machines for one attempt: the first that is ready has the job, the other goes at once."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest

from gpu_agent.wire import Fact
from infra.provider_memory import Fault, MemoryProvider
from state import record
from state.errors import AttemptOver, Unknown
from state.events import Secret
from state.job import Reason, Status
from state.lease import Lease, LeaseStatus
from state.renting import LOST_RACE
from tasks.deallocate import sweep

from .conftest import World, offer

SLOW_BOOT_S = 3600.0


@pytest.fixture
def slow(clock: Any) -> World:
    """Machine m1 boots for an hour, m2 and m3 within a minute; m1 is the cheapest."""
    offers = [offer(1), offer(2, price=500_000), offer(3, price=600_000)]
    boots = {"m1": SLOW_BOOT_S}
    return World(
        clock, MemoryProvider(clock, offers, boot_s=lambda item: boots.get(item.machine_id, 50.0))
    )


def pass_time(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.tick()


def machines(world: World) -> list[str]:
    return [item.offer.machine_id for item in world.provider.running()]


def hello(world: World, lease: Lease, nonce: str) -> Secret:
    """What the server does with the hello of the machine of `lease`."""
    token = world.provider.rentals[lease.instance_id].spec.env["STOKER_TOKEN"]
    hashed, now = hashlib.sha256(token.encode()).hexdigest(), world.clock()
    with world.store.transaction() as tx:
        seen = record.knock(tx, hashed, nonce, now, lock=True)
        fresh = Secret(f"whsec_{nonce}")
        return record.admit(tx, seen, nonce=nonce, secret=fresh, now=now)


def hedged(world: World) -> tuple[Lease, Lease]:
    world.add_job()
    pass_time(world, 200)
    first, second = world.leases()
    return first, second


def test_a_boot_that_takes_too_long_gets_a_second_machine_beside_it(slow: World) -> None:
    slow.add_job()
    pass_time(slow, 115)
    assert machines(slow) == ["m1"]
    pass_time(slow, 15)
    assert machines(slow) == ["m1", "m2"]
    first, second = slow.leases()
    assert (first.hedge, second.hedge) == (False, True)
    assert first.attempt == second.attempt == slow.job().attempt == 1
    pass_time(slow, 600)
    assert machines(slow) == ["m1", "m2"], "never a third"


def test_a_machine_that_is_known_to_boot_slowly_is_given_its_time(slow: World) -> None:
    slow.add_job()
    slow.tick()
    (lease,) = slow.leases()
    with slow.store.transaction() as tx:
        tx.save_lease(lease.evolve(boot_s=400.0))
        tx.save_job(tx.job("job_1").evolve(due_at=slow.clock() + timedelta(seconds=180)))
    pass_time(slow, 390)
    assert machines(slow) == ["m1"]
    pass_time(slow, 40)
    assert machines(slow) == ["m1", "m2"]


def test_a_job_may_say_that_it_wants_no_second_machine(slow: World) -> None:
    slow.add_job(hedge=False)
    pass_time(slow, 900)
    assert machines(slow) == ["m1"]


@pytest.mark.parametrize("winner", [0, 1])
def test_the_first_to_say_hello_has_the_job_and_the_other_goes(slow: World, winner: int) -> None:
    pair = hedged(slow)
    sweep(slow.keeper, "test")
    hello(slow, pair[winner], "winner")
    with pytest.raises(AttemptOver):
        hello(slow, pair[1 - winner], "loser")
    slow.tick()
    assert machines(slow) == [pair[winner].machine_id]
    slow.report(Fact.GPU_READY)
    pass_time(slow, 5)
    leases = slow.leases()
    assert slow.job().lease == pair[winner].id
    assert leases[winner].status is LeaseStatus.RENTED
    assert (leases[1 - winner].status, leases[1 - winner].why) == (LeaseStatus.RELEASED, LOST_RACE)
    assert slow.job().status is Status.PENDING_IMAGES
    assert slow.job().excluded_machines == ()


def test_a_machine_that_lost_a_race_is_what_the_next_attempt_tries_last(slow: World) -> None:
    _, second = hedged(slow)
    hello(slow, second, "winner")
    pass_time(slow, 5)
    slow.provider.set_phase(second.instance_id, "ended")
    sweep(slow.keeper, "test")
    pass_time(slow, 20)
    assert slow.job().attempt == 2
    assert machines(slow) == ["m3"], "m1 costs less"
    pass_time(slow, 200)
    assert machines(slow) == ["m3", "m1"], "and is better than none"


def test_a_lost_answer_to_the_winners_hello_is_given_again(slow: World) -> None:
    _, second = hedged(slow)
    secret = hello(slow, second, "winner").reveal()
    assert hello(slow, second, "winner").reveal() == secret


def test_both_machines_are_reserved_and_paid_for(slow: World) -> None:
    first, second = hedged(slow)
    with slow.store.transaction() as tx:
        assert tx.reserved() == first.reserved + second.reserved > first.reserved > 0
    hello(slow, second, "winner")
    pass_time(slow, 5)
    with slow.store.transaction() as tx:
        assert tx.reserved() == second.reserved
        assert tx.spend_of("job_1") > 0


def test_a_hedge_whose_create_call_was_lost_is_adopted_and_ends_when_it_loses(slow: World) -> None:
    slow.add_job()
    pass_time(slow, 100)
    slow.provider.faults = lambda verb: (
        Fault(error=Unknown("reset"), after=True) if verb == "create" else None
    )
    pass_time(slow, 120)
    slow.provider.faults = lambda verb: None
    first, second = slow.leases()
    assert machines(slow) == ["m1", "m2"]
    assert second.status is LeaseStatus.RENTED, "found by its label"
    hello(slow, first, "winner")
    pass_time(slow, 5)
    assert machines(slow) == ["m1"]


def test_cancelling_ends_both_machines(slow: World) -> None:
    hedged(slow)
    with slow.store.transaction() as tx:
        record.cancel(tx, "job_1", slow.clock())
    slow.settle()
    assert machines(slow) == []


@pytest.mark.parametrize("place", [0, 1])
def test_of_two_machines_one_may_fail_and_nothing_stalls(slow: World, place: int) -> None:
    pair = hedged(slow)
    slow.provider.set_phase(pair[place].instance_id, "ended")
    sweep(slow.keeper, "test")
    pass_time(slow, 2)
    job = slow.job()
    assert (job.status, job.attempt) == (Status.PENDING_GPU, 1)
    assert job.excluded_machines == (pair[place].machine_id,)
    assert pair[1 - place].machine_id in machines(slow)
    assert pair[place].machine_id not in machines(slow)


def test_a_machine_that_fails_before_its_hello_costs_no_attempt(world: World) -> None:
    world.add_job()
    world.tick()
    (lease,) = world.leases()
    world.provider.set_phase(lease.instance_id, "ended")
    sweep(world.keeper, "test")
    pass_time(world, 3)
    job = world.job()
    assert (job.status, job.attempt) == (Status.PENDING_GPU, 1)
    assert machines(world) == ["m2"]
    with world.store.transaction() as tx:
        (event,) = tx.events("job_1", type="machine.failed")
    assert event.data["machine"] == "m1"
    assert event.data["reason"]["code"] == "host.boot"
    assert "job.stalled" not in world.webhooks()


def test_an_attempt_tries_only_so_many_machines(clock: Any) -> None:
    world = World(clock, MemoryProvider(clock, [offer(number) for number in range(1, 9)]))
    world.add_job()
    for _ in range(4):
        pass_time(world, 3)
        (running,) = world.provider.running()
        world.provider.set_phase(running.id, "ended")
        sweep(world.keeper, "test")
    assert world.job().status is Status.STALLED
    assert world.job().reason.code == "host.boot"
    assert len(world.job().excluded_machines) == 4


def test_after_its_hello_a_machine_that_ends_stalls_the_job(world: World) -> None:
    world.add_job()
    world.tick()
    world.report(Fact.GPU_READY)
    (lease,) = world.leases()
    world.provider.set_phase(lease.instance_id, "ended")
    sweep(world.keeper, "test")
    assert world.job().status is Status.STALLED
    assert world.job().reason.code == "host.ended"


def test_a_token_that_comes_from_two_machines_moves_the_job_elsewhere(world: World) -> None:
    world.add_job()
    world.tick()
    world.hello()
    (lease,) = world.leases()
    with world.store.transaction() as tx:
        stalled = record.token_reused(tx, lease.token_hash, "thief", world.clock())
    assert stalled is not None
    assert stalled.reason == Reason(
        code="host.token_reused",
        message="the machine's bootstrap token was used a second time, by somebody else",
    )
    pass_time(world, 40)
    assert machines(world) == ["m2"]
