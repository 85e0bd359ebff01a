"""A market with bad machines, driven job after job: which machine is tried, and how often."""

from __future__ import annotations

import dataclasses
import random
from statistics import fmean
from typing import Any

import pytest

from gpu_agent.wire import Fact
from infra.provider_memory import Fault
from state import record
from state.errors import OfferGone
from state.job import GpuNeeds, Reason, Status
from state.lease import LeaseStatus
from tasks.deallocate import sweep

DONE = (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED)


def add_offer(world: Any, number: int, **changes: Any) -> None:
    like = world.provider.offers(GpuNeeds())[0]
    fields = {"id": str(number), "machine_id": f"h{number}", **changes}
    world.provider.add_offer(dataclasses.replace(like, **fields))


def until_rented(world: Any, job_id: str) -> Any:
    for _ in range(3000):
        world.tick()
        held = [item for item in world.leases(job_id) if item.status is LeaseStatus.RENTED]
        if held and world.job(job_id).status is Status.PENDING_GPU:
            return held[-1]
    raise AssertionError(world.job(job_id))


def work(world: Any, job_id: str, bad: set[str]) -> None:
    """What the machine that a job has by now does with it; those in `bad` always fail."""
    job = world.job(job_id)
    held = [item for item in world.leases(job_id) if item.status is LeaseStatus.RENTED]
    if job.status is not Status.PENDING_GPU or not held:
        return
    if held[-1].machine_id in bad:
        data = {"code": "trainer.crashed", "message": "it ended with 1"}
        world.report(Fact.ERROR, data, job=job_id)
        return
    for fact in DONE:
        world.report(fact, job=job_id)
    world.report(Fact.WEIGHTS_UPLOADED, job=job_id)
    with world.store.transaction() as tx:
        record.verified(tx, job_id, job.attempt, world.clock())


def test_a_fifth_of_bad_machines_costs_a_third_of_an_attempt_at_most(world: Any) -> None:
    luck = random.Random(1)
    numbers = range(100, 160)
    for number in numbers:
        add_offer(world, number, price=luck.randrange(200_000, 600_000))
    bad = {f"h{number}" for number in luck.sample(numbers, len(numbers) // 5)}
    jobs = []
    # Four waves on the same market, each of so many jobs that most of its machines are wanted.
    for wave in range(4):
        some = [f"job_{wave}_{number}" for number in range(40)]
        for job_id in some:
            world.add_job(job_id, max_attempts=10)
        for _ in range(120):
            world.tick(10)
            for job_id in some:
                work(world, job_id, bad)
        jobs += some
    assert {world.job(job_id).status for job_id in jobs} == {Status.COMPLETED}
    mean = fmean(world.job(job_id).attempt for job_id in jobs)
    assert mean <= 1.35
    for job_id in jobs:
        failed = [item.machine_id for item in world.leases(job_id) if item.machine_id in bad]
        assert len(failed) == len(set(failed)), "a machine that failed a job came to it again"


def test_every_way_to_fail_before_hello_excludes_the_machine_for_the_job(world: Any) -> None:
    world.add_job()
    first = until_rented(world, "job_1")
    world.clock.advance(40)
    world.provider.set_phase(first.instance_id, "ended")
    sweep(world.keeper, "test")
    second = until_rented(world, "job_1")
    assert (second.machine_id, second.attempt) == ("m2", 1)
    assert world.job().excluded_machines == ("m1",)
    with world.store.transaction() as tx:
        assert tx.host("m1").bad == 1
        assert tx.host("m1").boot_s == 40


def test_a_boot_that_stands_still_is_replaced_within_the_attempt(world: Any) -> None:
    world.provider._boot_s = lambda offer: 1e9
    world.add_job(hedge=False)
    until_rented(world, "job_1")
    for _ in range(11):
        for _ in range(3):
            world.tick(10)
        sweep(world.keeper, "test")
    for _ in range(70):
        world.tick()
    assert [(item.machine_id, item.attempt) for item in world.leases()] == [("m1", 1), ("m2", 1)]
    with world.store.transaction() as tx:
        (event,) = tx.events("job_1", type="machine.failed")
    assert event.data["reason"]["message"] == "the boot is stuck, for 5 min: Pull complete"


def test_a_boot_that_times_out_is_held_against_both_machines_of_a_race(world: Any) -> None:
    world.add_job()
    world.provider._boot_s = lambda offer: 1e9
    for _ in range(130):
        world.tick(10)
        if world.job().attempt > 1 or world.job().status is Status.STALLED:
            break
    assert set(world.job().excluded_machines) == {"m1", "m2"}


def test_an_offer_that_the_market_refused_says_nothing_against_its_machine(world: Any) -> None:
    world.provider.faults = lambda verb: (
        Fault(error=OfferGone("taken")) if verb == "create" else None
    )
    world.add_job()
    for _ in range(125):
        world.tick(10)
    assert world.job().excluded_machines == ()


def test_an_image_that_no_registry_gives_ends_the_job_and_blames_nobody(world: Any) -> None:
    world.add_job()
    lease = until_rented(world, "job_1")
    reason = Reason(code="image.unavailable", message="manifest unknown", retryable=False)
    with world.store.transaction() as tx:
        job = record.machine_failed(tx, lease.id, reason, world.clock())
    assert (job.status, job.reason, job.excluded_machines) == (Status.FAILED, reason, ())
    world.settle()
    with world.store.transaction() as tx:
        assert tx.host("m1") is None


def test_a_machine_that_fails_while_the_market_is_asked_is_not_taken(world: Any) -> None:
    world.add_job()
    offers = world.provider.offers

    def failed_meanwhile(*args: Any, **more: Any) -> Any:
        with world.store.transaction() as tx:
            tx.save_job(tx.job("job_1", lock=True).evolve(excluded_machines=("m1",)))
        return offers(*args, **more)

    world.provider.offers = failed_meanwhile
    assert world.renter.allocate("job_1").machine_id == "m2"


def test_a_job_that_was_outbid_has_lost_no_try_and_then_rents_on_demand(world: Any) -> None:
    for number in range(10, 15):
        add_offer(world, number, price=100_000, bid=90_000)
    world.add_job(interruptible=True, max_attempts=1)
    for lost in range(1, 3):
        lease = until_rented(world, "job_1")
        assert lease.bid == 90_000
        world.report(Fact.GPU_READY)
        reason = Reason(code=record.OUTBID, message="somebody bid more")
        with world.store.transaction() as tx:
            record.machine_failed(tx, lease.id, reason, world.clock())
        job = world.job()
        assert (job.status, job.interruptions) == (Status.STALLED, lost)
        assert job.excluded_machines == ()
    assert until_rented(world, "job_1").bid == 0
    world.report(Fact.ERROR, {"code": "trainer.crashed", "message": "x"})
    assert world.job().status is Status.FAILED


@pytest.mark.parametrize(("bid", "lost"), [(90_000, 1), (0, 0)])
def test_a_machine_by_bid_that_is_taken_away_was_outbid(world: Any, bid: int, lost: int) -> None:
    add_offer(world, 10, price=100_000, bid=bid)
    world.add_job(interruptible=True)
    assert until_rented(world, "job_1").bid == bid
    words = {"code": "agent.terminated", "message": "the machine was told to shut down"}
    world.report(Fact.ERROR, words)
    job = world.job()
    assert job.interruptions == lost
    assert job.reason.code == ("host.outbid" if bid else "agent.terminated")
    assert job.excluded_machines == (() if bid else ("h10",))


@pytest.mark.parametrize("claim", [record.OUTBID, "account.credit", "budget.job", "image.x"])
def test_a_host_cannot_say_that_its_failure_is_not_its_own(world: Any, claim: str) -> None:
    world.add_job(max_attempts=1)
    until_rented(world, "job_1")
    world.report(Fact.ERROR, {"code": claim, "message": "not me"})
    job = world.job()
    assert (job.status, job.reason.code) == (Status.FAILED, f"agent.{claim}")
    assert (job.interruptions, job.excluded_machines) == (0, ("m1",))


def test_the_choice_is_explained_on_the_job(world: Any) -> None:
    world.add_job()
    until_rented(world, "job_1")
    assert world.job().progress["gpu_search"].startswith("rented RTX 4090 on machine m1")
    assert "the next is RTX 4090 on m2" in world.job().progress["gpu_choice"]
