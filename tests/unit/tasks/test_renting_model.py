"""Every way in which two workers can get in each other's way while renting and releasing.

The real `Renter`, `Keeper` and `sweep` run on two threads of which one moves at a time, from one
boundary to the next: before each transaction, before and after each commit, before and after each
call to the market. At each boundary the explorer goes on with the same worker, switches to the
other, or lets the worker die there. All schedules with at most `SWITCHES` switches and at most
one death are run, each from the beginning, and each is followed by what reconcile and sweep would
do in the minutes after it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from infra.provider import Instance, LaunchSpec
from infra.provider_memory import Fault, MemoryProvider
from state import record
from state.errors import IllegalMove, ProviderError, Unknown
from state.job import Status
from state.lease import LeaseStatus
from state.memory import MemoryStore, MemoryTransaction
from state.offer import Offer
from tasks.deallocate import sweep
from tests.conftest import ManualClock

from .conftest import World, offer

#: A boundary's three ways on.
GO, SWITCH, DIE = "go on", "switch", "die"


class Died(BaseException):
    """The worker's process ends on this line."""


class Turns:
    """Lets one of some threads run at a time, and asks at each boundary who is next."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices, self.taken = choices, []  # what was chosen at each boundary
        self._may_run: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._doomed: set[int] = set()
        self.where: list[str] = []

    def run(self, works: list[Callable[[], object]]) -> None:
        """Run all of them to their end, or death."""
        alive = []
        for number, work in enumerate(works):
            self._may_run[number] = threading.Semaphore(0)
            thread = threading.Thread(target=self._live, args=(number, work), daemon=True)
            thread.start()
            alive.append((number, thread))
        current = 0
        while alive:
            numbers = [number for number, _ in alive]
            if current not in numbers:
                current = numbers[0]
            self._may_run[current].release()
            assert self._back.acquire(timeout=30), f"worker {current} hangs"
            thread = dict(alive)[current]
            if self._ended == current:
                thread.join()
                alive = [item for item in alive if item[0] != current]
                continue
            choice = self._choose()
            if choice == DIE:
                self._doomed.add(current)
            elif choice == SWITCH:
                current = numbers[(numbers.index(current) + 1) % len(numbers)]

    def _choose(self) -> str:
        step = len(self.taken)
        choice = self.choices[step] if step < len(self.choices) else GO
        self.taken.append(choice)
        return choice

    def _live(self, number: int, work: Callable[[], object]) -> None:
        self._may_run[number].acquire()
        _worker.turns, _worker.number = self, number
        try:
            work()
        except (Died, ProviderError, IllegalMove):
            pass
        except BaseException as error:
            self.error: BaseException | None = error
            raise
        finally:
            self._ended: int | None = number
            self._back.release()

    def point(self, where: str) -> None:
        """A boundary: wait for the next turn, or die."""
        number = _worker.number
        self.where.append(f"{number}: {where}")
        self._ended = None
        self._back.release()
        self._may_run[number].acquire()
        if number in self._doomed:
            self._doomed.discard(number)
            raise Died


_worker = threading.local()


def boundary(where: str) -> None:
    turns = getattr(_worker, "turns", None)
    if turns is not None:
        turns.point(where)


class Store(MemoryStore):
    def begin(self) -> MemoryTransaction:
        boundary("before a transaction")
        return super().begin()

    def finish(self, transaction: MemoryTransaction, *, commit: bool) -> None:
        super().finish(transaction, commit=commit)
        if commit:
            boundary("after the commit")


class Market(MemoryProvider):
    """Counts its contracts: never two for one label."""

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        boundary("before create")
        try:
            return super().create(offer, spec)
        finally:
            labels = [rental.label for rental in self.rentals.values()]
            assert len(labels) == len(set(labels)), "two instances with one label"
            boundary("after create")

    def instances(self) -> list[Instance]:
        boundary("before the list")
        return super().instances()

    def destroy(self, instance_id: str) -> None:
        boundary("before destroy")
        super().destroy(instance_id)
        boundary("after destroy")


def make(create: Fault | None = None, destroy: Fault | None = None) -> World:
    """One job that wants a machine; the first create and the first destroy may go wrong."""
    clock = ManualClock()
    faults = {"create": [create], "destroy": [destroy]}

    def once(verb: str) -> Fault | None:
        waiting = faults.get(verb)
        return waiting.pop(0) if waiting else None

    market = Market(clock, [offer(1), offer(2, price=500_000)], read_lag_s=3, faults=once)
    world = World(clock, market, store=Store())
    world.add_job(hedge=False, webhook_url=None)
    return world


def cancel(world: World) -> None:
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.keeper.release_job("job_1")


def late(world: World, seconds: float, work: Callable[[], object]) -> None:
    """`work`, on the clock of a time later: whoever was under way then was kept waiting."""
    world.clock.advance(seconds)
    work()


def recover(world: World, minutes: int) -> None:
    """What beat and workers do; no wake-up of before is needed."""
    clock, store = world.clock, world.store
    for _ in range(2 * minutes):
        sweep(world.keeper, "test")
        until = clock.now + timedelta(seconds=30)
        while (due := store.next_due()) is not None and due < until:
            world.tick(max(1.0, (due - clock.now).total_seconds()))
        clock.now = max(clock.now, until)


def schedules(play: Callable[[tuple[str, ...]], Turns], *, most: int) -> Iterator[tuple[str, ...]]:
    """Every schedule within the bounds, each found from the run of a shorter one."""
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        choices = waiting.pop()
        turns = play(choices)
        yield choices
        if choices.count(SWITCH) + choices.count(DIE) < most:
            for step in range(len(choices), len(turns.taken)):
                before = (*choices, *[GO] * (step - len(choices)))
                if choices.count(SWITCH) < 2:
                    waiting.append((*before, SWITCH))
                if DIE not in choices:
                    waiting.append((*before, DIE))


LOST = Fault(error=Unknown("connection reset"), after=True)
NEVER_SENT = Fault(error=Unknown("connection reset"))
Works = Callable[[World], list[Callable[[], object]]]


def two_wake_ups(world: World) -> list[Callable[[], object]]:
    return [lambda: world.renter.allocate("job_1")] * 2


def cancelled_meanwhile(world: World) -> list[Callable[[], object]]:
    return [lambda: world.renter.allocate("job_1"), lambda: cancel(world)]


def settled_meanwhile(world: World) -> list[Callable[[], object]]:
    """The create call of one is so slow that the other takes it for dead."""

    def tend() -> None:
        world.keeper.tend(["job_1.001"])
        late(world, 61, lambda: world.keeper.tend(["job_1.001"]))

    return [lambda: world.renter.allocate("job_1"), tend]


def released_by_two(world: World) -> list[Callable[[], object]]:
    world.renter.allocate("job_1")
    world.clock.advance(5)
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    return [lambda: world.keeper.release_job("job_1"), lambda: sweep(world.keeper, "test")]


@pytest.mark.parametrize(
    ("works", "create", "destroy"),
    [
        (two_wake_ups, None, None),
        (two_wake_ups, LOST, None),
        (two_wake_ups, NEVER_SENT, None),
        (cancelled_meanwhile, None, None),
        (cancelled_meanwhile, LOST, LOST),
        (settled_meanwhile, LOST, None),
        (settled_meanwhile, None, NEVER_SENT),
        (released_by_two, None, LOST),
        (released_by_two, None, NEVER_SENT),
    ],
)
def test_whatever_the_order_every_machine_has_an_owner_and_comes_to_its_end(
    works: Works, create: Fault | None, destroy: Fault | None
) -> None:
    worlds: list[World] = []

    def play(choices: tuple[str, ...]) -> Turns:
        world = make(create, destroy)
        turns = Turns(choices)
        turns.run(works(world))
        worlds.append(world)
        return turns

    count = 0
    seen: set[str] = set()
    for choices in schedules(play, most=3 if works is two_wake_ups else 2):
        count += 1
        world = worlds.pop()
        if (reached := state(world)) in seen:
            continue  # what follows depends on nothing else
        seen.add(reached)
        try:
            check(world)
        except AssertionError as error:
            raise AssertionError(f"after {choices}: {error}") from error
    assert count > 50


def state(world: World) -> str:
    """All that the minutes after it depend on."""
    leases = [
        {name: value for name, value in vars(item).items() if name not in ("label", "token_hash")}
        for item in world.leases()
    ]
    market = [
        (item.id, item.offer.id, item.created_at, item.destroyed_at, item.phase)
        for item in world.provider.rentals.values()
    ]
    job = world.job()
    with world.store.transaction() as tx:
        beats, hosts = tx.beats(), tx.hosts()
    known = (job.status, job.attempt, job.due_at, job.retry_at, job.excluded_machines)
    return repr((leases, market, known, beats, hosts, world.clock()))


def check(world: World) -> None:
    """Right now, after some minutes, and after the job's end."""
    owned(world)
    recover(world, 3)
    owned(world)
    alive = world.provider.running()
    assert len(alive) <= 1, "two machines for one job"
    job = world.job()
    if not job.terminal:
        assert job.status is Status.PENDING_GPU
        (rented,) = [item for item in world.leases() if item.status is LeaseStatus.RENTED]
        assert [rental.id for rental in alive] == [rented.instance_id], "rented, and no machine"
        with world.store.transaction() as tx:
            record.cancel(tx, "job_1", world.clock())
    recover(world, 3)
    assert not world.provider.running(), "a machine outlives its job"
    assert all(item.status is LeaseStatus.RELEASED for item in world.leases())


def owned(world: World) -> None:
    """Each machine has a row, and at most one row of the job is open."""
    leases = world.leases()
    labels = {item.label for item in leases}
    assert all(rental.label in labels for rental in world.provider.running())
    held = [item for item in leases if item.open]
    assert len(held) <= 1


def test_the_explorer_tries_deaths_and_switches_at_every_boundary() -> None:
    seen: set[str] = set()

    def play(choices: tuple[str, ...]) -> Turns:
        world = make()
        turns = Turns(choices)
        turns.run(two_wake_ups(world))
        if DIE in choices:
            seen.add(turns.where[choices.index(DIE)])
        return turns

    ran = list(schedules(play, most=3))
    assert len(ran) == len(set(ran))
    first = {where for where in seen if where.startswith("0")}
    assert {"0: before create", "0: after create", "0: after the commit"} <= first
    assert any(a == SWITCH and b == DIE for choice in ran for a, b in itertools.pairwise(choice))
