"""Races that the simulation found: a moment of bad luck, and what must not come of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gpu_agent.wire import Fact
from infra.provider import Instance
from infra.provider_memory import Fault, MemoryProvider
from state import record
from state.errors import Unknown, Unreadable
from state.events import OutgoingStatus
from state.job import Status
from state.lease import LeaseStatus
from state.memory import MemoryStore
from tasks.deallocate import sweep
from tasks.reconcile import reconcile
from tasks.relay import Answer, NoAnswer, Relay

from .conftest import World, offer


class Between(MemoryStore):
    """A store in which somebody else acts just before the n-th transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], object]] = []

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        if self.waiting and (first := self.waiting.pop(0)) is not None:
            first()
        with super().transaction() as tx:
            yield tx


def test_an_upload_that_comes_while_the_job_is_looked_at_is_verified_without_a_message(
    clock: Any,
) -> None:
    store = Between()
    world = World(clock, MemoryProvider(clock, [offer(1)]), store=store)
    world.add_job()
    world.tick()
    with store.transaction() as tx:
        lease = tx.leases_of("job_1")[0]
        tx.save_job(tx.job("job_1").evolve(lease=lease.id, last_heard_at=clock()))
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    due = world.job().due_at
    assert due is not None
    clock.now = due

    def upload() -> None:
        world.report(Fact.WEIGHTS_UPLOADED, {"files": []})

    store.waiting = [lambda: None, upload]
    reconcile(store, lambda task, ids: None, clock())
    assert world.job().due_at is not None


def test_a_machine_too_young_for_any_list_is_not_taken_for_gone(clock: Any) -> None:
    market = MemoryProvider(clock, [offer(1)], read_lag_s=20)
    world = World(clock, market)
    world.add_job()
    world.renter.allocate("job_1")
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", clock())
    failing = Fault(error=Unknown("timeout"))
    market.faults = lambda verb: failing if verb == "destroy" else None
    for _ in range(5):
        world.keeper.release_job("job_1")
    assert world.leases()[0].status is LeaseStatus.RELEASING
    market.faults = lambda verb: None
    world.settle()
    assert market.running() == []


def test_a_machine_that_spoke_before_any_list_showed_it_is_not_taken_for_gone(clock: Any) -> None:
    """The market lies about its end, too: two lists without it are no proof."""
    market = MemoryProvider(clock, [offer(1)], read_lag_s=20)
    world = World(clock, market)
    world.add_job()
    world.renter.allocate("job_1")
    world.hello()
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", clock())
    market.faults = lambda verb: Fault(error=Unknown("timeout")) if verb == "destroy" else None
    for _ in range(5):
        world.keeper.release_job("job_1")
    assert world.leases()[0].status is LeaseStatus.RELEASING
    market.faults = lambda verb: None
    world.settle()
    assert market.running() == []


def test_a_machine_too_young_for_any_list_is_not_taken_for_lost(clock: Any) -> None:
    world = World(clock, MemoryProvider(clock, [offer(1)], read_lag_s=20))
    world.add_job()
    world.tick()
    for _ in range(5):
        clock.advance(1)
        sweep(world.keeper, "test")
    assert world.leases()[0].status is LeaseStatus.RENTED


def unreadable(verb: str) -> Fault | None:
    return Fault(error=Unreadable("410 deprecated")) if verb == "instances" else None


def test_lists_that_cannot_be_read_give_up_no_machine(world: World) -> None:
    world.add_job()
    world.tick()
    sweep(world.keeper, "test")
    world.provider.faults = unreadable
    for _ in range(5):
        world.clock.advance(30)
        assert sweep(world.keeper, "test").unreadable
    (lease,) = world.leases()
    assert (lease.status, lease.absent) == (LeaseStatus.RENTED, 0)


def test_lists_that_cannot_be_read_do_not_show_that_a_machine_is_gone(world: World) -> None:
    world.add_job()
    world.tick()
    sweep(world.keeper, "test")
    world.provider.faults = unreadable
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    for _ in range(5):
        world.tick(60)
    (lease,) = world.leases()
    assert (lease.status, lease.absent) == (LeaseStatus.RELEASING, 0)
    world.provider.faults = lambda verb: None
    world.settle()


def test_two_workers_with_the_same_message_rent_once(world: World) -> None:
    """The second asks the market while the first still reads its answer."""
    world.add_job()
    offers = world.provider.offers
    second: list[Any] = []

    def slowly(*args: Any, **named: Any) -> Any:
        answer = offers(*args, **named)
        if not second:
            second.append(None)
            second[0] = world.renter.allocate("job_1")
        return answer

    world.provider.offers = slowly  # type: ignore[method-assign]
    assert world.renter.allocate("job_1") is None
    assert [lease.id for lease in world.leases()] == [second[0].id]
    assert len(world.provider.rentals) == 1


class Forgetful(MemoryProvider):
    """A market whose list is readable, and empty."""

    def instances(self) -> list[Instance]:
        return []


def test_an_empty_list_gives_up_no_machine_that_can_be_asked_for(clock: Any) -> None:
    world = World(clock, Forgetful(clock, [offer(1)]))
    world.add_job()
    world.tick()
    for _ in range(5):
        clock.advance(30)
        sweep(world.keeper, "test")
    assert world.job().status is Status.PENDING_GPU
    assert world.leases()[0].status is LeaseStatus.RENTED
    assert len(world.provider.running()) == 1


@pytest.mark.parametrize("answer", [NoAnswer("timeout"), Answer(410, {})])
def test_a_relay_that_took_too_long_does_not_undo_what_another_delivered(
    world: World, answer: Answer | NoAnswer
) -> None:
    world.add_job()

    def relay(post: Any) -> Relay:
        return Relay(store=world.store, post=post, clock=world.clock, random=random.Random(1))

    def slow(*args: Any, **named: Any) -> Answer:
        world.clock.advance(61)
        relay(lambda *args, **named: Answer(200, {})).relay("job_1")
        if isinstance(answer, Exception):
            raise answer
        return answer

    relay(slow).relay("job_1")
    with world.store.transaction() as tx:
        row = tx.list_outgoing("job_1")[0]
    assert (row.status, row.tries) == (OutgoingStatus.DELIVERED, 2)


def test_who_was_held_up_between_intent_and_create_asks_for_nothing(clock: Any) -> None:
    store = Between()
    world = World(clock, MemoryProvider(clock, [offer(1)]), store=store)
    world.add_job()
    renter = world.renter
    intend = type(renter)._intend

    class HeldUp(type(renter)):  # type: ignore[misc]
        def _intend(self, *args: Any) -> Any:
            intended = intend(self, *args)
            clock.advance(16)
            return intended

    held_up = HeldUp(**vars(renter))
    assert held_up.allocate("job_1") is None
    assert world.provider.rentals == {}
    assert [lease.status for lease in world.leases()] == [LeaseStatus.RELEASED]
    world.tick(30)
    assert [item.offer.machine_id for item in world.provider.running()] == ["m1"]


def test_a_lease_that_was_closed_while_its_create_call_hung_is_looked_at_no_more(
    world: Any,
) -> None:
    world.add_job()

    def hang(verb: str) -> Fault | None:
        if verb != "create":
            return None
        world.provider.faults = lambda verb: None
        for _ in range(90):
            world.tick()
        return Fault(error=Unknown("no answer within 90 s"))

    world.provider.faults = hang
    world.renter.allocate("job_1")
    first = world.leases()[0]
    assert (first.status, first.due_at) == (LeaseStatus.RELEASED, None)


def test_a_machine_that_was_heard_but_never_listed_is_not_given_up_at_two_lists(
    clock: Any,
) -> None:
    """Its create call had no clear answer, so nobody could name it, and lists lag."""
    world = World(clock, MemoryProvider(clock, [offer(1)], read_lag_s=40.0))
    lost = Fault(error=Unknown("connection reset"), after=True)
    world.provider.faults = lambda verb: lost if verb == "create" else None
    world.add_job()
    world.tick()
    world.provider.faults = lambda verb: None
    (lease,) = world.leases()
    assert lease.status is LeaseStatus.UNKNOWN
    with world.store.transaction() as tx:
        tx.save_lease(lease.evolve(running_at=clock(), ready_at=clock()))
        tx.save_job(tx.job("job_1").evolve(lease=lease.id, last_heard_at=clock()))
    world.report(Fact.ERROR, {"code": "trainer.crashed", "message": "x", "retryable": False})
    for _ in range(20):
        world.tick()
    assert world.leases()[0].status is LeaseStatus.RELEASING, "it lives, and no list shows it yet"
    world.settle()
    assert world.provider.running() == []
