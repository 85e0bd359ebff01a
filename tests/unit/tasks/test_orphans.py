"""What orphans cost: once, from their start to their end, whatever the market's list does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from infra.provider import Instance, LaunchSpec
from infra.provider_memory import Fault, MemoryProvider
from state import money
from state.errors import Unknown, Unreadable
from state.job import GpuNeeds
from state.lease import LeaseStatus
from state.orphan import Orphan
from tasks import billing, orphans
from tasks.deallocate import Keeper, sweep

from .conftest import World, offer

#: micro-USD per hour, of every machine here
PRICE = 360_000
EVER = datetime.min.replace(tzinfo=UTC)


@pytest.fixture
def busy(clock: Any) -> World:
    return World(clock, MemoryProvider(clock, [offer(n, price=PRICE) for n in range(1, 13)]))


def create(world: World, label: str = "test/job_x/1-0") -> str:
    spec = LaunchSpec(label=label, image="i", disk_gb=10, onstart="true")
    return world.provider.create(world.provider.offers(GpuNeeds())[0], spec)


def found(world: World) -> list[Orphan]:
    with world.store.transaction() as tx:
        return tx.orphans_between(EVER, world.clock() + timedelta(days=1))


def cost(world: World) -> list[int]:
    return [money.orphaned(orphan, world.clock()) for orphan in found(world)]


def spent(world: World) -> int:
    with world.store.transaction() as tx:
        return tx.spend_since(EVER)


def swept(world: World, seconds: float = 30) -> None:
    world.clock.advance(seconds)
    sweep(world.keeper, "test")


def shows(world: World, *rows: Instance) -> None:
    """From now on the market's list is this, and it says the same when it is asked for one."""
    there = {item.id: item for item in rows}
    world.provider.instances = lambda: list(rows)  # type: ignore[method-assign]
    world.provider.instance = there.get  # type: ignore[method-assign]


def row(world: World, instance: str = "900", ago: float = 600, **changes: Any) -> Instance:
    given = {
        "id": instance,
        "label": "test/job_x/1-0",
        "machine_id": "m7",
        "gpu_name": "RTX 4090",
        "phase": "running",
        "price": PRICE,
        "started_at": world.clock() - timedelta(seconds=ago),
    }
    return Instance(**{**given, **changes})


def by_mistake(world: World) -> str:
    """Rent a machine for a job, and close its lease while it runs; the instance."""
    world.add_job(hedge=False)
    lease = world.renter.allocate("job_1")
    assert lease is not None
    world.clock.advance(3600)
    now = world.clock()
    with world.store.transaction() as tx:
        gone = {"why": "by mistake", "released_at": now, "due_at": now + billing.ASKS[0]}
        lease = tx.lease(lease.id).to(LeaseStatus.RELEASED, **gone)
        tx.save_lease(lease.evolve(cost=money.cost(lease, now).total))
    assert lease.instance_id is not None
    return lease.instance_id


def note(world: World, listed: list[Instance], at: datetime) -> None:
    """As a sweep does, with a list of that time."""
    orphans.note(world.store, listed, listed, lambda instance: False, 0, at)


def booked(world: World) -> tuple[int, int]:
    """Micro-USD of the job's lease, and of all orphans."""
    return money.spent(world.leases()[0], world.clock()), sum(cost(world))


def charged(world: World) -> int:
    """By the market, for whatever has the label of the job's lease."""
    return sum(world.provider.charges([world.leases()[0].label], world.clock()).values())


# --- what is written down ---------------------------------------------------------------------


def test_an_orphan_costs_from_its_start_until_its_destruction_was_confirmed(busy: World) -> None:
    instance = create(busy)
    swept(busy, 600)
    (seen,) = found(busy)
    assert (seen.id, seen.machine_id, seen.gpu_name) == (instance, "m1", "RTX 4090")
    assert (seen.price, seen.end, cost(busy)) == (PRICE, None, [PRICE // 6])
    swept(busy)
    assert busy.provider.running() == []
    swept(busy)
    (gone,) = found(busy)
    assert gone.end == gone.started_at + timedelta(seconds=630)
    assert cost(busy) == [PRICE * 630 // 3600] == [spent(busy)]


def test_what_is_not_ours_is_none_and_a_dry_run_writes_nothing(busy: World) -> None:
    create(busy, "someone-else/job")
    create(busy)
    for _ in range(3):
        sweep(busy.keeper, "test", dry_run=True)
    assert found(busy) == []
    swept(busy)
    assert [orphan.label for orphan in found(busy)] == ["test/job_x/1-0"]


def test_a_machine_with_an_open_lease_is_none(busy: World) -> None:
    busy.add_job()
    busy.renter.allocate("job_1")
    for _ in range(3):
        swept(busy)
    assert found(busy) == []


def test_an_orphan_that_cannot_be_destroyed_costs_until_it_is_gone(busy: World) -> None:
    create(busy)
    fault = Fault(error=Unknown("502"), after=False)
    busy.provider.faults = lambda verb: fault if verb == "destroy" else None
    for _ in range(120):
        swept(busy)
    assert cost(busy) == [PRICE]
    busy.provider.faults = lambda verb: None
    for _ in range(3):
        swept(busy)
    assert cost(busy) == [PRICE * 3630 // 3600]


# --- lists that lie ---------------------------------------------------------------------------


def test_sweeping_again_and_again_counts_once(busy: World) -> None:
    shows(busy, row(busy), row(busy))  # and a doubled row
    for _ in range(5):
        sweep(busy.keeper, "test")
    assert cost(busy) == [PRICE // 6] == [spent(busy)]


def unreadable(world: World) -> None:
    fault = Fault(error=Unreadable("HTML"))
    world.provider.faults = lambda verb: fault if verb == "instances" else None


def empty_while_machines_run(world: World) -> None:
    shows(world)


@pytest.mark.parametrize("trouble", [unreadable, empty_while_machines_run])
def test_a_list_that_is_not_believed_ends_nothing(
    busy: World, trouble: Callable[[World], None]
) -> None:
    for number in range(4):
        busy.add_job(f"job_{number}", hedge=False)
        busy.renter.allocate(f"job_{number}")
    create(busy)
    swept(busy)
    before = found(busy)
    trouble(busy)
    swept(busy)
    assert found(busy) == before
    assert cost(busy) == [PRICE // 60]


def test_an_orphan_that_was_missing_and_comes_back_was_there_all_the_time(busy: World) -> None:
    there = row(busy, ago=0)
    shows(busy, there)
    swept(busy)
    shows(busy)
    swept(busy, 60)
    assert found(busy)[0].end is not None
    shows(busy, there)
    swept(busy, 3510)
    assert cost(busy) == [PRICE] == [spent(busy)]


def test_a_list_that_comes_late_changes_nothing(busy: World) -> None:
    there = row(busy, ago=0)
    now = busy.clock()
    note(busy, [there], now + timedelta(seconds=60))
    early = found(busy)
    note(busy, [], now + timedelta(seconds=30))
    assert found(busy) == early
    note(busy, [], now + timedelta(seconds=90))
    gone = found(busy)
    note(busy, [there], now + timedelta(seconds=75))
    assert found(busy) == gone != early


@pytest.mark.parametrize(
    ("garbled", "counted"),
    [
        ({"started_at": None}, 0),
        ({"started_at": datetime(2031, 1, 1, tzinfo=UTC)}, 0),
        ({"started_at": datetime(1970, 1, 2, tzinfo=UTC)}, 0),
        ({"price": 0}, 0),
        ({"price": 10**300}, 0),
        ({"download_price": 10**300}, PRICE // 6),
        ({"gpu_name": "RTX\0\ud800 4090", "machine_id": ""}, PRICE // 6),
    ],
    ids=[
        "no start",
        "a start to come",
        "a start long ago",
        "no price",
        "a price too high",
        "bytes too dear",
        "text",
    ],
)
def test_a_garbled_row_costs_nothing_that_is_made_up(
    busy: World, garbled: dict[str, Any], counted: int
) -> None:
    shows(busy, row(busy, **garbled))
    sweep(busy.keeper, "test")
    assert cost(busy) == [counted]
    assert found(busy)[0].gpu_name == "RTX 4090"


def test_what_one_list_leaves_out_another_tells(busy: World) -> None:
    shows(busy, row(busy, price=0, started_at=None, gpu_name="", machine_id=""))
    sweep(busy.keeper, "test")
    shows(busy, whole := row(busy))
    sweep(busy.keeper, "test")
    assert cost(busy) == [PRICE // 6]
    shows(busy, dataclasses.replace(whole, price=0, started_at=None, gpu_name="", machine_id=""))
    sweep(busy.keeper, "test")
    assert cost(busy) == [PRICE // 6]
    assert (found(busy)[0].machine_id, found(busy)[0].gpu_name) == ("m7", "RTX 4090")


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("line", range(24))
def test_a_sweep_that_is_killed_anywhere_loses_no_money(
    busy: World, line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(busy)
    left = [line]
    begin, instances, destroy = (
        busy.store.begin,
        busy.provider.instances,
        busy.provider.destroy,
    )

    def dying(verb: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            answer = verb(*args) if after else None
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return answer if after else verb(*args)

        return call

    monkeypatch.setattr(busy.store, "begin", dying(begin, after=False))
    monkeypatch.setattr(busy.provider, "instances", dying(instances, after=True))
    monkeypatch.setattr(busy.provider, "destroy", dying(destroy, after=True))
    for _ in range(5):
        busy.clock.advance(30)
        try:
            sweep(busy.keeper, "test")
        except Killed:
            continue
    monkeypatch.undo()
    assert busy.provider.running() == []
    truth = busy.clock() - found(busy)[0].started_at
    assert [orphan.end is not None for orphan in found(busy)] == [True]
    assert PRICE * 60 // 3600 <= cost(busy)[0] <= PRICE * truth.total_seconds() / 3600
    assert cost(busy) == [spent(busy)]


# --- whose label names a lease ----------------------------------------------------------------


def test_a_machine_whose_lease_was_closed_too_early_is_an_orphan_from_then_on(busy: World) -> None:
    by_mistake(busy)
    swept(busy, 300)
    (orphan,) = found(busy)
    assert (orphan.job, orphan.started_at) == ("job_1", busy.leases()[0].released_at)
    assert booked(busy) == (busy.leases()[0].cost, PRICE // 12)


def test_a_list_from_before_the_end_of_its_lease_makes_no_orphan(busy: World) -> None:
    instance = by_mistake(busy)
    there = busy.provider.instance(instance)
    note(busy, [there], busy.clock() - timedelta(seconds=5))
    assert found(busy) == []


def test_the_markets_bill_for_a_label_is_counted_once(busy: World) -> None:
    by_mistake(busy)
    for _ in range(3):
        swept(busy)
    truth = charged(busy)
    for _ in range(3):
        busy.clock.advance(24 * 3600)
        busy.keeper.tend([busy.leases()[0].id])
    (lease,) = busy.leases()
    assert lease.due_at is None
    assert booked(busy)[1] == PRICE * 60 // 3600
    assert sum(booked(busy)) == truth == spent(busy)


def test_a_bill_from_before_the_orphan_was_known_is_asked_for_again(busy: World) -> None:
    instance = by_mistake(busy)
    shows(busy)
    for _ in range(3):  # it is in no list, and the bill becomes final
        busy.clock.advance(24 * 3600)
        busy.keeper.tend([busy.leases()[0].id])
    (lease,) = busy.leases()
    assert lease.due_at is None
    assert booked(busy)[0] > 20 * PRICE, "all that was charged for its label"
    del busy.provider.instances, busy.provider.instance  # the market's own again
    for _ in range(3):
        swept(busy)
    assert instance not in {item.id for item in busy.provider.running()}
    lasted = timedelta(days=3, seconds=60)
    assert booked(busy) == (lease.cost, round(PRICE * lasted.total_seconds() / 3600))
    busy.clock.advance(24 * 3600)
    busy.keeper.tend([lease.id])
    assert busy.leases()[0].due_at is None
    assert sum(booked(busy)) == pytest.approx(charged(busy), abs=2)
    assert spent(busy) == sum(booked(busy))


def test_a_list_that_shows_what_is_gone_makes_no_orphan_and_no_longer_one(busy: World) -> None:
    old = row(busy, "55")
    busy.provider.instances = lambda: [old]  # type: ignore[method-assign]
    for _ in range(3):
        swept(busy)
    assert found(busy) == []
    shows(busy, there := row(busy, ago=0))
    swept(busy)
    swept(busy)
    busy.provider.instance = lambda instance: None  # type: ignore[method-assign]
    for _ in range(3):  # it was destroyed, and the list is old
        swept(busy)
    shows(busy)
    swept(busy)
    busy.provider.instances = lambda: [there]  # type: ignore[method-assign]
    swept(busy)
    assert cost(busy) == [PRICE * 60 // 3600]


def test_a_second_instance_with_a_closed_leases_label_counts_from_its_own_start(
    busy: World,
) -> None:
    by_mistake(busy)
    (lease,) = busy.leases()
    second = row(busy, "901", ago=1800, label=lease.label)
    forged = row(busy, "902", ago=360 * 24 * 3600, label=lease.label)  # before there was a lease
    shows(busy, second, forged)
    sweep(busy.keeper, "test")
    assert {orphan.id: money.orphaned(orphan, busy.clock()) for orphan in found(busy)} == {
        "901": PRICE // 2,
        "902": PRICE,
    }


def test_machines_that_only_pretend_leave_no_orphans(busy: World) -> None:
    shows(busy, row(busy, label="test:60:test/job_x/1-0"))
    rehearsed = Keeper(store=busy.store, provider=busy.provider, clock=busy.clock, rehearsed=True)
    for _ in range(2):
        sweep(rehearsed, "test")
    assert found(busy) == []
