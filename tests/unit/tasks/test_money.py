"""What may be rented, and what stops it: caps, budgets, runway, storms, an operator's word."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from gpu_agent.wire import Fact, Order
from infra.provider import LaunchSpec
from infra.provider_memory import Fault, MemoryProvider
from state import alarms, brakes, money, record
from state.errors import Unreadable
from state.job import GpuNeeds, Status
from state.lease import LeaseStatus
from state.money import Limits
from tasks.deallocate import sweep

from .conftest import World, offer


@pytest.fixture
def busy(clock: Any) -> World:
    """Twelve equal machines at $0.4/h that boot within a minute."""
    return World(clock, MemoryProvider(clock, [offer(number) for number in range(1, 13)]))


def limited(world: World, **limits: Any) -> None:
    world.terms = dataclasses.replace(world.terms, limits=Limits(**limits))


def rent(world: World, job: str, **request: Any) -> Any:
    world.add_job(job, **({"hedge": False} | request))
    return world.renter.allocate(job)


def why(world: World, job: str) -> str:
    return str(world.job(job).progress["gpu_search"])


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"per_hour": 1_000_000}, "budget per hour"),
        ({"per_day": 10_000_000}, "budget per day"),
        ({"total": 12_000_000}, "budget in all"),
        ({"machines": 2}, "machines at the same time"),
        ({"rate": 1_000_000}, "money per hour for all machines"),
    ],
)
def test_the_third_machine_would_pass_the_limit_and_its_job_waits(
    busy: World, limits: dict[str, int], words: str
) -> None:
    limited(busy, **limits)
    assert rent(busy, "job_1") is not None
    assert rent(busy, "job_2") is not None
    assert rent(busy, "job_3") is None
    assert words in why(busy, "job_3")
    for _ in range(60):
        busy.clock.advance(60)
        assert busy.renter.allocate("job_3") is None
    third = busy.job("job_3")
    assert third.deadline_at > busy.clock(), "waiting for money is no stall"


def test_what_one_machine_costs_within_the_hour_is_held_against_the_hour(busy: World) -> None:
    limited(busy, per_hour=500_000)
    lease = rent(busy, "job_1")
    assert lease is not None, "12 h at $0.4 are no reason: within an hour it can cost $0.4"
    assert lease.reserved == 4_800_000


def test_what_was_spent_in_the_hour_leaves_less_for_the_rest_of_it(clock: Any) -> None:
    offers = [offer(number, download_price=20_000) for number in (1, 2)]
    world = World(clock, MemoryProvider(clock, offers))
    limited(world, per_hour=600_000)
    assert rent(world, "job_1") is not None
    clock.advance(1500)
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", clock())
    world.settle()
    assert rent(world, "job_2") is None
    clock.advance(700)
    assert world.renter.allocate("job_2") is not None, "the rest of the hour can be paid now"


def test_disk_and_bandwidth_count_against_the_cap(clock: Any) -> None:
    dear = offer(1, download_price=20_000, upload_price=20_000)
    world = World(clock, MemoryProvider(clock, [dear]))
    lease = rent(world, "job_1", max_cost=300_000)
    moved = money.bandwidth(lease)
    assert moved > 100_000
    assert lease.reserved == pytest.approx(300_000, abs=2)
    assert (lease.expires_at - lease.created_at) / timedelta(hours=1) == pytest.approx(
        (300_000 - moved) / 400_000, rel=1e-3
    )


def train(world: World) -> None:
    world.tick()
    world.tick(70)
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)


def test_money_that_is_used_up_in_training_orders_a_last_checkpoint_and_ends_the_job(
    world: World,
) -> None:
    world.add_job(max_cost=200_000, hedge=False)
    train(world)
    ordered: list[Order] = []
    step = 0
    while world.job().status is Status.TRAINING:
        world.tick(5)
        step += 1
        if world.job().status is Status.TRAINING:
            ordered += world.report(
                Fact.TRAINING_PROGRESS, {"step": step, "total": 99999, "moved": step}
            ).orders
    job = world.job()
    assert ordered == [Order.CHECKPOINT_NOW]
    assert (job.status, job.reason.code) == (Status.FAILED, "budget.job")
    world.settle()
    with world.store.transaction() as tx:
        assert tx.host("m1") is None, "the host is not to blame"
        tick = 400_000 * 10 / 3600
        assert tx.spend_of("job_1") <= 200_000 + tick
    (rental,) = world.provider.rentals
    assert world.provider.cost(rental) <= 200_000 + tick


def test_a_machine_beside_a_slow_one_keeps_both_within_the_cap(clock: Any) -> None:
    provider = MemoryProvider(clock, [offer(1), offer(2)], boot_s=lambda item: 9e9)
    world = World(clock, provider)
    world.add_job(max_cost=400_000)
    for _ in range(300):
        world.tick()
    first, second = world.leases()
    assert (first.reserved > 0, second.reserved > 0) == (True, True)
    for longer, other in ((first, second), (second, first)):
        race = world.job().deadline_at - clock()
        most = (
            money.cost(first, clock()).total
            + money.cost(second, clock()).total
            + 400_000 * (longer.expires_at - clock()) / timedelta(hours=1)
            + other.price * race / timedelta(hours=1)
        )
        assert most <= 400_000 * 1.01


@pytest.mark.parametrize(
    "limits", [{"per_hour": 300_000}, {"per_day": 300_000}, {"total": 300_000}]
)
def test_what_orphans_cost_is_spent_of_every_budget(busy: World, limits: dict[str, int]) -> None:
    spec = LaunchSpec(label="test/job_x/1-0", image="i", disk_gb=10, onstart="true")
    busy.provider.create(busy.provider.offers(GpuNeeds())[0], spec)
    busy.clock.advance(2700)
    limited(busy, **limits)
    for _ in range(2):
        sweep(busy.keeper, "test")
    (code,) = (code for code in codes(busy) if code.startswith("budget."))
    assert codes(busy)[code].message.startswith("100%")
    assert rent(busy, "job_1") is None
    assert "$0.3" in why(busy, "job_1")


# --- the account ------------------------------------------------------------------------------


def test_credit_that_pays_all_machines_for_less_than_the_runway_stops_renting(
    busy: World,
) -> None:
    busy.provider.credit = 700_000
    limited(busy, runway=timedelta(hours=1))
    sweep(busy.keeper, "test")
    assert rent(busy, "job_1") is not None
    assert rent(busy, "job_2") is None
    assert "of credit pay" in why(busy, "job_2")
    busy.provider.credit = 9_000_000
    sweep(busy.keeper, "test")
    assert busy.renter.allocate("job_2") is not None


def test_credit_that_cannot_be_read_stops_nothing_but_is_told_of_after_ten_minutes(
    busy: World,
) -> None:
    limited(busy, runway=timedelta(hours=1))
    fault = Fault(error=Unreadable("HTML"))
    busy.provider.faults = lambda verb: fault if verb == "account" else None
    sweep(busy.keeper, "test")
    assert rent(busy, "job_1") is not None
    assert "credit.unread" not in codes(busy)
    busy.clock.advance(601)
    sweep(busy.keeper, "test")
    assert "credit.unread" in codes(busy)


def codes(world: World) -> dict[str, alarms.Alarm]:
    with world.store.transaction() as tx:
        stand = alarms.standing(tx, world.terms.limits, world.clock())
    return {alarm.code: alarm for alarm in stand}


def test_no_credit_stops_all_machines_and_is_no_hosts_fault(busy: World) -> None:
    leases = [rent(busy, f"job_{number}", max_attempts=1) for number in (1, 2)]
    sweep(busy.keeper, "test")
    for number in (1, 2):
        busy.report(Fact.GPU_READY, job=f"job_{number}")
    busy.provider.credit = 0
    for lease in leases:
        busy.provider.set_phase(lease.instance_id, "ended")
    sweep(busy.keeper, "test")
    assert "credit.gone" in codes(busy)
    for number in (1, 2):
        job = busy.job(f"job_{number}")
        assert (job.status, job.reason.code) == (Status.STALLED, brakes.CREDIT_GONE)
        assert job.excluded_machines == ()
    for tick in range(240):
        busy.tick(30)
        if tick % 5 == 0:
            sweep(busy.keeper, "test")
    job = busy.job("job_1")
    assert (job.status, "no credit" in why(busy, "job_1")) == (Status.PENDING_GPU, True)
    busy.provider.credit = 50_000_000
    sweep(busy.keeper, "test")
    for _ in range(20):
        busy.tick()
    assert busy.leases("job_1")[-1].status is LeaseStatus.RENTED


# --- storms -----------------------------------------------------------------------------------


def test_no_more_rentals_in_a_minute_than_the_breaker_lets_through(busy: World) -> None:
    limited(busy, rentals_per_minute=3)
    for number in range(6):
        rent(busy, f"job_{number}")
    assert len(busy.provider.rentals) == 3
    assert "breaker.open" in codes(busy)
    for _ in range(90):
        busy.tick()
    assert len(busy.provider.rentals) == 6


def test_machines_that_never_become_ready_open_the_breaker_ever_longer(clock: Any) -> None:
    offers = [offer(number) for number in range(1, 60)]
    world = World(clock, MemoryProvider(clock, offers, boot_s=lambda item: 9e9))
    limited(world, failures=3)
    for number in range(20):
        world.add_job(f"job_{number}", hedge=False, max_attempts=9)
    made: list[int] = []
    for _ in range(3600):
        world.tick()
        for rental in world.provider.running():
            world.provider.set_phase(rental.id, "ended")
        if int(clock().timestamp()) % 10 == 0:
            sweep(world.keeper, "test")
        made.append(len(world.provider.rentals))
    assert made[-1] - made[1800] <= 3, "half an hour apart in the end"
    assert made[-1] < 40
    assert "breaker.open" in codes(world)


def test_one_machine_that_becomes_ready_closes_the_breaker(busy: World) -> None:
    limited(busy, failures=1)
    lease = rent(busy, "job_1")
    busy.provider.set_phase(lease.instance_id, "ended")
    sweep(busy.keeper, "test")
    assert rent(busy, "job_2") is None
    busy.clock.advance(121)
    assert busy.renter.allocate("job_2") is not None
    assert rent(busy, "job_3") is None, "half open: one is tried"
    busy.report(Fact.GPU_READY, job="job_2")
    assert busy.renter.allocate("job_3") is not None


def test_an_operators_word_in_the_database_stops_renting_everywhere_and_no_release(
    busy: World,
) -> None:
    rent(busy, "job_1")
    with busy.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="too dear today", now=busy.clock())
        record.cancel(tx, "job_1", busy.clock())
    assert rent(busy, "job_2") is None
    assert "too dear today" in why(busy, "job_2")
    assert "kill_switch.on" in codes(busy)
    busy.settle()
    with busy.store.transaction() as tx:
        brakes.switch(tx, stopped=False, why="", now=busy.clock())
    assert busy.renter.allocate("job_2") is not None


def test_a_destroy_that_lies_is_red_after_a_minute_and_never_released(busy: World) -> None:
    lease = rent(busy, "job_1")
    sweep(busy.keeper, "test")
    busy.provider.vanish = lambda instance_id: None
    with busy.store.transaction() as tx:
        record.cancel(tx, "job_1", busy.clock())
    for _ in range(70):
        busy.tick()
    assert busy.leases("job_1")[0].status is LeaseStatus.RELEASING
    alarm = codes(busy)["release.slow"]
    assert alarm.severity is alarms.Severity.CRITICAL
    assert lease.instance_id in alarm.message


def test_every_alarm_has_a_mend_and_an_entry_in_the_runbook(pytestconfig: Any) -> None:
    text = (pytestconfig.rootpath / "docs" / "operations.md").read_text()
    text = text.partition("\n## Alarms\n")[2].partition("\n## ")[0]
    missing = [code for code in alarms.MENDS if f"\n### `{code}`" not in text]
    assert missing == []
    written = {line[5:-1] for line in text.splitlines() if line.startswith("### `")}
    assert written == set(alarms.MENDS)
