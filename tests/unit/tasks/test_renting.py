"""Renting and giving back: who owns the money at every line, whatever the market answers."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from gpu_agent.wire import Fact
from infra.provider_memory import Fault
from state import ranking, record
from state.errors import AccountFault, OfferGone, Refused, Throttled, Unknown, Unreadable
from state.job import GpuNeeds, Reason, Status
from state.lease import LeaseStatus
from state.money import Limits
from tasks.deallocate import sweep


class Once:
    """A fault for the n-th call of a verb, and calm otherwise."""

    def __init__(self, verb: str, fault: Fault, *, calls: range = range(1)) -> None:
        self.verb, self.fault, self.calls, self.count = verb, fault, calls, -1

    def __call__(self, verb: str) -> Fault | None:
        if verb != self.verb:
            return None
        self.count += 1
        return self.fault if self.count in self.calls else None


def test_a_job_gets_the_offer_with_the_cheapest_finish(world: Any) -> None:
    world.add_job()
    lease = world.renter.allocate("job_1")
    assert (lease.status, lease.machine_id) == (LeaseStatus.RENTED, "m1")
    assert [item.id for item in world.provider.running()] == [lease.instance_id]


@pytest.mark.parametrize(("steps", "machine"), [(100, "cheap"), (20_000, "fast")])
def test_a_long_training_is_worth_a_faster_gpu_and_a_short_one_is_not(
    world: Any, steps: int, machine: str
) -> None:
    (offer, _) = world.provider.offers(world_needs())
    cheap = dataclasses.replace(offer, machine_id="cheap", gpu_name="RTX 3060", price=150_000)
    fast = dataclasses.replace(offer, id="2", machine_id="fast", price=400_000)
    request = world.add_job(recipe={"steps": steps}).request
    ranked = ranking.choose([fast, cheap], ranking.workload(request, 10_000_000), now=world.clock())
    assert ranked.offers[0].machine_id == machine


def test_being_woken_ten_times_rents_once(world: Any) -> None:
    world.add_job()
    for _ in range(10):
        world.renter.allocate("job_1")
    assert len(world.provider.rentals) == 1


def test_the_machine_is_told_its_url_and_a_token_and_nothing_else(world: Any) -> None:
    world.add_job()
    world.renter.allocate("job_1")
    (rental,) = world.provider.rentals.values()
    assert set(rental.spec.env) == {"STOKER_URL", "STOKER_TOKEN"}
    token = rental.spec.env["STOKER_TOKEN"]
    with world.store.transaction() as tx:
        kept = [tx.attempt("job_1", 1), *tx.leases_of("job_1"), *tx.events("job_1")]
    assert token not in repr(kept)
    assert token not in repr(rental.spec)


def test_an_offer_that_is_gone_is_followed_by_the_next(world: Any) -> None:
    world.provider.faults = Once("create", Fault(error=OfferGone("taken")))
    world.add_job()
    lease = world.renter.allocate("job_1")
    assert lease.machine_id == "m2"
    assert [item.status for item in world.leases()] == [LeaseStatus.RELEASED, LeaseStatus.RENTED]


def test_two_jobs_that_saw_the_same_offers_do_not_go_for_the_same_one(world: Any) -> None:
    world.add_job("job_1")
    world.add_job("job_2")
    seen = world.provider.offers(GpuNeeds())
    world.renter.allocate("job_1")
    world.provider.offers = lambda needs: seen
    lease = world.renter.allocate("job_2")
    assert lease.machine_id == "m2"
    assert [item.status for item in world.leases("job_2")] == [LeaseStatus.RENTED]


def test_a_job_looks_again_when_the_market_has_a_turn_for_it(world: Any) -> None:
    world.provider.faults = Once("offers", Fault(error=Throttled("no turn", retry_after=4)))
    world.add_job()
    assert world.renter.allocate("job_1") is None
    assert world.job("job_1").due_at == world.clock() + timedelta(seconds=4)


def test_a_job_waits_when_others_are_after_every_offer(world: Any) -> None:
    seen = world.provider.offers(GpuNeeds())
    for number in (1, 2):
        world.add_job(f"job_{number}")
        world.renter.allocate(f"job_{number}")
    world.add_job("job_3")
    world.provider.offers = lambda needs: seen
    assert world.renter.allocate("job_3") is None
    assert world.leases("job_3") == []
    assert "for another job" in world.job("job_3").progress["gpu_search"]


def test_a_lost_answer_is_adopted_by_its_label(world: Any) -> None:
    world.provider.faults = Once("create", Fault(error=Unknown("connection reset"), after=True))
    world.add_job()
    assert world.renter.allocate("job_1") is None
    assert world.leases()[0].status is LeaseStatus.UNKNOWN
    world.tick()
    (lease,) = world.leases()
    assert (lease.status, lease.instance_id) == (
        LeaseStatus.RENTED,
        next(iter(world.provider.rentals)),
    )
    assert len(world.provider.rentals) == 1


def test_a_lost_request_is_tried_again_only_after_it_is_proven_lost(world: Any) -> None:
    world.provider.faults = Once("create", Fault(error=Unknown("connection reset")))
    world.add_job()
    world.renter.allocate("job_1")
    for _ in range(30):
        world.tick()
        assert not world.provider.rentals
    for _ in range(60):
        world.tick()
    (rental,) = world.provider.rentals.values()
    assert world.leases()[-1].instance_id == rental.id


def test_one_list_that_misses_an_instance_does_not_prove_that_it_was_never_made(
    world: Any,
) -> None:
    world.provider.faults = Once("create", Fault(error=Unknown("connection reset"), after=True))
    world.add_job()
    world.renter.allocate("job_1")
    listed = world.provider.instances
    world.clock.advance(120)
    world.provider.instances = list
    world.tick()
    world.provider.instances = listed
    for _ in range(5):
        world.tick()
    assert world.leases()[0].status is LeaseStatus.RENTED
    assert len(world.provider.rentals) == 1


def test_an_id_that_never_shows_up_does_not_keep_a_job_waiting(world: Any) -> None:
    lost = Fault(error=Unknown("cut answer", instance_id="999"))
    world.provider.faults = Once("create", lost)
    world.add_job()
    world.renter.allocate("job_1")
    for _ in range(140):
        world.tick()
    assert world.leases()[0].status is LeaseStatus.RELEASED
    assert world.leases()[-1].status is LeaseStatus.RENTED


def test_a_process_that_dies_after_create_leaves_the_lease_as_owner(world: Any) -> None:
    world.add_job()
    renter = world.renter

    class Died(BaseException):
        pass

    create = world.provider.create

    def create_and_die(*args: Any) -> str:
        create(*args)
        raise Died

    world.provider.create = create_and_die
    with pytest.raises(Died):
        renter.allocate("job_1")
    world.provider.create = create
    assert world.leases()[0].status is LeaseStatus.INTENDED
    for _ in range(90):
        world.tick()
    assert world.leases()[0].status is LeaseStatus.RENTED
    assert len(world.provider.rentals) == 1


def test_a_refusal_that_names_an_instance_is_destroyed(world: Any) -> None:
    world.add_job()

    class Odd:
        def __call__(self, verb: str) -> Fault | None:
            if verb != "create":
                return None
            made = next(iter(world.provider.rentals), None)
            return Fault(error=Refused("bid too low", instance_id=made), after=True)

    create = world.provider.create

    def named(offer: Any, spec: Any) -> str:
        made = create(offer, spec)
        raise Refused("bid too low", instance_id=made)

    world.provider.create = named
    world.renter.allocate("job_1")
    world.provider.create = create
    world.terms = dataclasses.replace(world.terms, kill_switch=True)
    for _ in range(20):
        world.tick()
    assert not world.provider.running()


def test_no_credit_stops_renting_and_says_so(world: Any) -> None:
    world.provider.faults = Once("create", Fault(error=AccountFault("insufficient_credit")))
    world.add_job()
    assert world.renter.allocate("job_1") is None
    assert "insufficient_credit" in world.job().progress["gpu_search"]
    assert world.job().status is Status.PENDING_GPU


def test_throttling_is_waited_out(world: Any) -> None:
    fault = Fault(error=Throttled("too frequent", retry_after=40))
    world.provider.faults = Once("create", fault)
    world.add_job()
    world.renter.allocate("job_1")
    assert (world.job().due_at - world.clock()).total_seconds() == 40


def test_a_gpu_that_nobody_offers_is_explained_and_times_out(world: Any) -> None:
    world.provider._offers.clear()
    world.add_job()
    world.tick()
    job = world.job()
    assert job.status is Status.PENDING_GPU
    assert "no offer meets the needs: 8 GB VRAM" in job.progress["gpu_search"]
    for _ in range(21):
        world.tick(60)
    stalled = [step for step in world.webhooks() if step == "job.stalled"]
    assert stalled
    with world.store.transaction() as tx:
        reasons = [
            event.data["reason"]
            for event in tx.events("job_1")
            if event.type == "transition" and event.data["to"] == "stalled"
        ]
    assert reasons[0]["code"] == "pendingGpu.timeout"
    assert "no offer meets the needs" in reasons[0]["message"]


def test_the_kill_switch_stops_renting_and_never_releasing(world: Any) -> None:
    world.add_job()
    world.renter.allocate("job_1")
    world.terms = dataclasses.replace(world.terms, kill_switch=True)
    world.add_job("job_2")
    assert world.renter.allocate("job_2") is None
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.settle()
    assert not world.provider.running()


def test_a_job_never_rents_beyond_its_cap(world: Any) -> None:
    world.add_job(max_cost=200_000)
    lease = world.renter.allocate("job_1")
    assert (lease.expires_at - lease.created_at).total_seconds() == pytest.approx(1800)


def test_a_job_that_has_spent_its_cap_fails_instead_of_waiting(world: Any) -> None:
    world.add_job(max_cost=200_000)
    lease = world.renter.allocate("job_1")
    world.report(Fact.GPU_READY)
    world.clock.advance(1800)
    world.provider.vanish(lease.instance_id)
    for _ in range(60):
        world.tick()
    job = world.job()
    assert (job.status, job.reason.code) == (Status.FAILED, "budget.job")
    assert "of at most $0.2000" in job.reason.message


def test_a_spent_budget_of_the_hour_stops_the_next_rental(world: Any) -> None:
    world.terms = dataclasses.replace(world.terms, limits=Limits(per_hour=850_000))
    world.add_job(max_cost=900_000)
    world.add_job("job_2", max_cost=900_000)
    assert world.renter.allocate("job_1") is not None
    assert world.renter.allocate("job_2") is None
    assert "per hour" in world.job("job_2").progress["gpu_search"]


def test_released_means_seen_gone_in_two_lists(world: Any) -> None:
    world.add_job()
    world.renter.allocate("job_1")
    sweep(world.keeper, "test")
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.keeper.release_job("job_1")
    assert world.leases()[0].status is LeaseStatus.RELEASING
    world.tick()
    assert world.leases()[0].status is LeaseStatus.RELEASED
    cost = world.leases()[0].cost
    with world.store.transaction() as tx:
        assert tx.spend_of("job_1") == cost


def test_an_unreadable_list_releases_and_destroys_nothing(world: Any) -> None:
    world.add_job()
    world.renter.allocate("job_1")
    world.provider.faults = Once("instances", Fault(error=Unreadable("HTML")), calls=range(999))
    swept = sweep(world.keeper, "test")
    assert swept.unreadable
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    for _ in range(10):
        world.tick()
    assert world.leases()[0].status is LeaseStatus.RELEASING
    world.provider.faults = lambda verb: None
    world.settle()


def test_a_destroy_that_fails_is_repeated_until_it_is_seen(world: Any) -> None:
    world.add_job()
    world.renter.allocate("job_1")
    world.provider.faults = Once("destroy", Fault(error=Unknown("502")), calls=range(5))
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.settle(ticks=300)
    assert not world.provider.running()


def test_an_orphan_with_our_prefix_goes_at_the_second_sweep(world: Any) -> None:
    from infra.provider import LaunchSpec

    (first, second) = world.provider.offers(world_needs())
    ours = world.provider.create(
        first, LaunchSpec(label="test/job_x/1-0", image="i", disk_gb=10, onstart="true")
    )
    foreign = world.provider.create(
        second, LaunchSpec(label="someone-else/job", image="i", disk_gb=10, onstart="true")
    )
    assert sweep(world.keeper, "test").suspects == (ours,)
    assert sweep(world.keeper, "test").destroyed == (ours,)
    assert [item.id for item in world.provider.running()] == [foreign]


def test_a_sweep_that_is_only_asked_does_nothing(world: Any) -> None:
    from infra.provider import LaunchSpec

    (first, _) = world.provider.offers(world_needs())
    spec = LaunchSpec(label="test/job_x/1-0", image="i", disk_gb=10, onstart="true")
    world.provider.create(first, spec)
    for _ in range(3):
        assert sweep(world.keeper, "test", dry_run=True).destroyed == ()


def test_a_vanished_machine_stalls_its_job_and_another_is_rented(world: Any) -> None:
    world.add_job()
    lease = world.renter.allocate("job_1")
    world.report(Fact.GPU_READY)
    world.clock.advance(30)
    world.provider.vanish(lease.instance_id)
    sweep(world.keeper, "test")
    assert world.job().status is Status.PENDING_IMAGES
    sweep(world.keeper, "test")
    assert world.job().status is Status.STALLED
    for _ in range(15):
        world.tick()
    assert (world.job().attempt, world.job().status) == (2, Status.PENDING_GPU)
    assert world.leases()[-1].machine_id == "m2"


def test_a_silent_agent_stalls_within_a_minute_and_its_machine_goes(world: Any) -> None:
    world.add_job()
    world.tick()
    world.report(Fact.GPU_READY)
    for _ in range(47):
        world.tick()
    assert world.job().excluded_machines == ("m1",)
    for _ in range(30):
        world.tick()
    assert [item.spec.label.split("-")[0] for item in world.provider.running()] == ["test/job_1/2"]


def test_agents_that_spoke_to_a_server_that_was_down_were_not_silent(world: Any) -> None:
    world.add_job()
    world.tick()
    world.report(Fact.GPU_READY)
    world.receiver_up = False
    for _ in range(300):
        world.tick()
    world.receiver_up = True
    # An agent that met a closed door for minutes is within its longest pause.
    for _ in range(115):
        world.tick()
    assert world.job().status is Status.PENDING_IMAGES
    for _ in range(10):
        world.tick()
    assert world.job().excluded_machines == ("m1",)


def test_an_error_that_cannot_be_retried_fails_at_once(world: Any) -> None:
    world.add_job()
    world.tick()
    data = {"code": "dataset.corrupt", "message": "the zip is damaged", "retryable": False}
    taken = world.report(Fact.ERROR, data)
    job = world.job()
    assert taken.outcome is record.Outcome.APPLIED
    assert (job.status, job.reason.code) == (Status.FAILED, "dataset.corrupt")
    assert world.webhooks()[-2:] == ["job.stalled", "job.failed"]
    world.settle()
    with world.store.transaction() as tx:
        assert tx.host("m1") is None


def test_a_finished_job_is_remembered_of_its_machine(world: Any) -> None:
    world.add_job()
    world.tick()
    world.clock.advance(30)
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    world.report(Fact.TRAINING_PROGRESS, {"step": 10, "total": 10, "steps_per_s": 4.5})
    world.report(Fact.WEIGHTS_UPLOADED)
    with world.store.transaction() as tx:
        record.verified(tx, "job_1", 1, world.clock())
        host = tx.host("m1")
    assert (host.good, host.bad, host.boot_s, host.steps_per_s) == (1, 0, 30.0, 4.5)
    assert world.job().status is Status.COMPLETED


def test_tries_used_up_end_in_failed(world: Any) -> None:
    world.add_job(max_attempts=1)
    world.tick()
    with world.store.transaction() as tx:
        record.stall(tx, "job_1", Reason(code="trainer.crashed", message="x"), world.clock())
    assert world.job().status is Status.FAILED


def test_a_cancelled_job_whose_create_is_under_way_gives_the_machine_back(world: Any) -> None:
    world.add_job()
    create = world.provider.create

    def cancelled_meanwhile(*args: Any) -> str:
        made = create(*args)
        with world.store.transaction() as tx:
            record.cancel(tx, "job_1", world.clock())
        return made

    world.provider.create = cancelled_meanwhile
    world.renter.allocate("job_1")
    world.settle()
    assert not world.provider.running()


def world_needs() -> Any:
    from state.job import GpuNeeds

    return GpuNeeds()
