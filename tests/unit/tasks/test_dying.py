"""The process that rents dies, on each line in turn: whatever bills is found, and nothing twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from infra.provider_memory import Fault
from state import record
from state.errors import OfferGone, Refused, Unknown
from state.lease import LeaseStatus
from state.memory import MemoryTransaction
from tasks import allocate
from tasks.allocate import Renter
from tasks.deallocate import sweep

from .conftest import World


class DiedError(BaseException):
    """Nobody catches it: the process is gone."""


def die(*args: Any, **named: Any) -> Any:
    raise DiedError


def before_the_intent_is_written(world: World, patch: Any) -> None:
    patch.setattr(MemoryTransaction, "add_attempt", die)


def after_intent(world: World, patch: Any) -> None:
    world.provider.faults = once("create", Fault(error=DiedError()))


def after_create(world: World, patch: Any) -> None:
    world.provider.faults = once("create", Fault(error=DiedError(), after=True))


def before_the_id_is_written(world: World, patch: Any) -> None:
    patch.setattr(Renter, "_rented", die)


def while_the_id_is_written(world: World, patch: Any) -> None:
    patch.setattr(allocate, "rented", die)


def after_the_id_is_written(world: World, patch: Any) -> None:
    written = Renter._rented

    def then_die(self: Renter, *args: Any) -> Any:
        written(self, *args)
        raise DiedError

    patch.setattr(Renter, "_rented", then_die)


def before_a_refusal_is_written(world: World, patch: Any) -> None:
    world.provider.faults = once("create", Fault(error=OfferGone("taken")))
    patch.setattr(Renter, "_refused", die)


def before_a_refusal_that_made_an_instance_is_written(world: World, patch: Any) -> None:
    world.provider.faults = once("create", Fault(error=Refused("bid too low"), after=True))
    patch.setattr(Renter, "_refused", die)


def before_an_unclear_answer_is_written(world: World, patch: Any) -> None:
    world.provider.faults = once("create", Fault(error=Unknown("reset"), after=True))
    patch.setattr(Renter, "_unknown", die)


def once(verb: str, fault: Fault) -> Callable[[str], Fault | None]:
    left = [fault]
    return lambda called: left.pop() if called == verb and left else None


LINES = [
    before_the_intent_is_written,
    after_intent,
    after_create,
    before_the_id_is_written,
    while_the_id_is_written,
    after_the_id_is_written,
    before_a_refusal_is_written,
    before_a_refusal_that_made_an_instance_is_written,
    before_an_unclear_answer_is_written,
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.__name__)
def test_whoever_dies_renting_leaves_somebody_who_owns_the_machine(
    world: World, line: Callable[[World, Any], None]
) -> None:
    world.add_job(hedge=False)
    with pytest.MonkeyPatch.context() as patch:
        line(world, patch)
        with pytest.raises(DiedError):
            world.renter.allocate("job_1")
    # Another process goes on. It knows what the database holds, and no more.
    for tick in range(180):
        world.tick()
        if tick % 30 == 0:
            sweep(world.keeper, "test")
        owned = {lease.label for lease in world.leases() if lease.open}
        assert {item.label for item in world.provider.running()} <= owned, "nobody's machine"
        assert len(world.provider.running()) <= 1
    (running,) = world.provider.running()
    assert [item.instance_id for item in world.leases() if item.status is LeaseStatus.RENTED] == [
        running.id
    ]
    world.terms = dataclasses.replace(world.terms, kill_switch=True)
    with world.store.transaction() as tx:
        record.cancel(tx, "job_1", world.clock())
    world.settle()
    assert world.provider.running() == []
