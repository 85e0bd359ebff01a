"""What a training is said to cost is what renting would reckon with, and asking costs nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpu_agent.recipe import Recipe
from infra.provider_memory import Fault, MemoryProvider
from infra.rehearsal import Market
from state import brakes, money, policy
from state.errors import Throttled, Unreadable
from state.events import HostRecord
from state.job import GpuNeeds, JobRequest
from state.money import Limits
from state.rehearsal import NO_OFFERS, Rehearsal
from tasks.estimate import AT_ONCE, PATIENCE_S, Busy, Estimator, Photographs

from .conftest import World, offer

KNOWN = Photographs(bytes=50_000_000)


def request(**changes: Any) -> JobRequest:
    fields: dict[str, Any] = {
        "dataset_id": "",
        "base": "civitai:1",
        "recipe": Recipe().to_dict(),
        **changes,
    }
    return JobRequest(**fields)


def estimator(world: World, **changes: Any) -> Estimator:
    given: dict[str, Any] = {
        "clock": world.clock,
        "monotonic": lambda: world.clock().timestamp(),
        "pause": world.clock.advance,
        "image_bytes": world.terms.image_bytes,
        **changes,
    }
    return Estimator(world.store, lambda wanted: world.provider, **given)


def market(world: World, *offers: Any) -> World:
    world.provider = MemoryProvider(world.clock, list(offers))
    return world


def test_the_first_candidate_is_what_would_be_rented_at_the_price_that_was_said(world):
    dear = offer(1, price=900_000)
    cheap = offer(2, price=300_000, machine_id="m2")
    market(world, dear, cheap, offer(3, gpu_name="RTX 3060", vram_gb=12.0, price=150_000))
    found = estimator(world).estimate(request(), KNOWN)
    world.add_job(recipe=Recipe().to_dict())
    world.tick()
    (lease,) = world.leases()
    assert found.candidates[0].offer.id == lease.offer_id
    assert found.fit == 3
    expected = [item.expected.cost for item in found.candidates]
    assert expected == sorted(expected)
    assert found.price.likely == expected[0]
    # fifty megabytes of photographs are all that the two reckon differently with
    assert world.job().progress["quoted"] == pytest.approx(expected[0], rel=0.01)


def test_asking_writes_nothing_and_rents_nothing(world):
    before = repr(vars(world.store._data))
    estimator(world).estimate(request(), KNOWN)
    assert repr(vars(world.store._data)) == before
    assert world.provider.rentals == {}


def test_the_range_holds_what_may_happen_and_no_more_than_the_cap(world):
    found = estimator(world).estimate(request(), KNOWN)
    assert 0 < found.price.low <= found.price.likely <= found.price.high <= 5_000_000
    assert 0 < found.seconds.low <= found.seconds.likely <= found.seconds.high
    first = found.candidates[0].expected
    assert found.seconds.low == pytest.approx(first.boot_s + first.download_s + first.training_s)
    low_cap = estimator(world).estimate(request(max_cost=round(found.price.likely) + 1000), KNOWN)
    assert low_cap.price.high == pytest.approx(found.price.likely + 1000, abs=1)
    single = estimator(world).estimate(request(max_attempts=1), KNOWN)
    assert single.price.high < found.price.high


def test_a_larger_model_and_more_steps_cost_more(world):
    market(world, offer(1, vram_gb=80.0, disk_gb=500.0, gpu_name="H100 SXM"))
    small = estimator(world).estimate(request(), KNOWN)
    longer = estimator(world).estimate(request(recipe=Recipe(steps=4000).to_dict()), KNOWN)
    flux = Recipe.from_dict({}, "flux").to_dict()
    large = estimator(world).estimate(request(base_family="flux", recipe=flux), KNOWN)
    assert small.price.likely < longer.price.likely < large.price.likely
    assert large.memory.least_gb > small.memory.least_gb
    assert large.memory.disk_gb > small.memory.disk_gb


def test_a_measured_gpu_is_trusted_and_a_guessed_one_is_not(world):
    guessed = estimator(world).estimate(request(), KNOWN)
    assert any("speed is a guess" in words for words in guessed.assumed)
    with world.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id="m9", gpu_name="RTX 4090", steps_per_s=1 / 0.15))
    measured = estimator(world).estimate(request(), KNOWN)
    assert measured.candidates[0].measured
    assert not any("speed is a guess" in words for words in measured.assumed)
    assert measured.price.likely == pytest.approx(guessed.price.likely)
    assert measured.price.high < guessed.price.high


def test_photographs_that_nobody_knows_are_assumed_and_it_says_so(world):
    nobody = estimator(world).estimate(request(), Photographs())
    some = estimator(world).estimate(request(), Photographs(count=200))
    assert any("20 photographs" in words for words in nobody.assumed)
    assert any("photographs of 3 MB each" in words for words in some.assumed)
    assert some.price.likely > nobody.price.likely
    assert not any("photographs" in words for words in _assumed(world, KNOWN))


def _assumed(world: World, photographs: Photographs) -> tuple[str, ...]:
    return estimator(world).estimate(request(), photographs).assumed


def test_without_an_offer_it_says_what_stands_in_the_way(world):
    market(world, offer(1), offer(2, reliability=0.5), offer(3, vram_gb=6.0))
    found = estimator(world).estimate(request(gpu=GpuNeeds(max_price=100_000)), KNOWN)
    assert (found.price, found.seconds, found.candidates, found.fit) == (None, None, (), 0)
    assert "no offer meets the needs" in found.nothing
    assert found.refused == {"for their price": 2, "for their VRAM": 1}
    assert any(words.startswith("No offer fits now") for words in found.sentences)


def test_hosts_that_are_shunned_are_counted_by_reason(world):
    with world.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id="m1", blocked=True))
        tx.save_host(HostRecord(machine_id="m2", bad=3, last_failed_at=world.clock()))
    found = estimator(world).estimate(request(), KNOWN)
    assert found.fit == 0
    assert found.refused["blocked by an operator"] == 1
    assert found.refused["failed a job lately"] == 1


@pytest.mark.parametrize(
    ("cap", "suffices", "words"),
    [
        (5_000_000, True, "suffice"),
        (10_000, False, "too little"),
        (40_000, False, "less than"),
    ],
)
def test_it_says_whether_the_cap_suffices(world, cap, suffices, words):
    found = estimator(world).estimate(request(max_cost=cap), KNOWN)
    assert found.cap.suffices is suffices
    assert words in found.cap.words


def test_a_training_longer_than_any_lease_is_said_to_be_one(world):
    rules = replace(policy.DEFAULT, lease=policy.timedelta(minutes=10))
    long = request(recipe=Recipe(steps=20_000).to_dict(), max_cost=100_000_000)
    found = estimator(world, rules=rules).estimate(long, KNOWN)
    assert (found.cap.suffices, "longer" in found.cap.words) == (False, True)


def test_brakes_that_would_hold_it_are_named(world):
    assert estimator(world).estimate(request(), KNOWN).brakes == ()
    over = estimator(world, limits=Limits(per_day=1000)).estimate(request(), KNOWN)
    assert [reason.code for reason in over.brakes] == ["budget.day"]
    with world.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="a drill", now=world.clock())
    found = estimator(world).estimate(request(), KNOWN)
    assert [reason.code for reason in found.brakes] == ["kill_switch.on"]
    assert any("a drill" in words for words in found.sentences)


def test_bids_are_asked_for_where_the_order_takes_them(world):
    bid = offer(4, price=100_000, bid=80_000)
    market(world, offer(1), bid)
    plain = estimator(world).estimate(request(), KNOWN)
    interruptible = estimator(world).estimate(request(interruptible=True), KNOWN)
    assert (plain.fit, interruptible.fit) == (1, 2)


class Asked:
    """A market that counts its searches; `faults` are raised first, one by one."""

    def __init__(self, *faults: Exception) -> None:
        self.count, self.faults = 0, list(faults)

    def offers(self, needs: Any, *, interruptible: bool = False, limit: int = 64) -> list[Any]:
        self.count += 1
        if self.faults:
            raise self.faults.pop(0)
        return [offer(1)]


def test_the_market_is_asked_once_in_half_a_minute(world):
    asked = Asked()
    world.provider = asked
    tried = estimator(world)
    for _ in range(5):
        tried.estimate(request(), KNOWN)
    tried.estimate(request(max_cost=1_000_000), KNOWN)
    assert asked.count == 1
    tried.estimate(request(gpu=GpuNeeds(min_vram_gb=20)), KNOWN)
    assert asked.count == 2
    world.clock.advance(31)
    tried.estimate(request(), KNOWN)
    assert asked.count == 3


def test_a_short_pause_of_the_market_is_waited_for_and_a_long_one_is_not(world):
    began = world.clock()
    world.provider = Asked(Throttled("wait", retry_after=5.0))
    assert estimator(world).estimate(request(), KNOWN).fit == 1
    assert (world.clock() - began).total_seconds() == 5
    world.provider = Asked(Throttled("wait", retry_after=PATIENCE_S + 1))
    with pytest.raises(Throttled):
        estimator(world).estimate(request(), KNOWN)


def test_a_market_that_cannot_be_read_is_no_empty_one(world):
    world.provider.faults = lambda verb: Fault(error=Unreadable("garbage"))
    with pytest.raises(Unreadable):
        estimator(world).estimate(request(), KNOWN)


def test_a_market_that_hangs_holds_only_a_few_threads(world):
    tried = estimator(world)

    class Nested:
        """Each search asks for another estimate, as other threads would meanwhile."""

        depth = 0

        def offers(self, needs: Any, **_: Any) -> list[Any]:
            self.depth += 1
            tried.estimate(request(gpu=GpuNeeds(min_vram_gb=8 + self.depth)), KNOWN)
            return []

    world.provider = nested = Nested()
    with pytest.raises(Busy):
        tried.estimate(request(), KNOWN)
    assert nested.depth == AT_ONCE


def test_a_rehearsal_is_reckoned_by_the_market_that_pretends(world):
    def never(cue: Any) -> None:
        raise AssertionError("an estimate rented")

    pretended = Market(store=world.store, clock=world.clock, play=never)

    def of(wanted: JobRequest) -> Any:
        assert wanted.rehearsal is not None
        return pretended.for_(wanted.rehearsal, first=True)

    tried = Estimator(world.store, of, clock=world.clock, limits=Limits(per_day=1))
    found = tried.estimate(request(rehearsal=Rehearsal()), KNOWN)
    assert found.fit > 0
    assert found.brakes == ()
    assert tried.estimate(request(rehearsal=Rehearsal(fixture=NO_OFFERS)), KNOWN).fit == 0


def test_sentences_say_the_money_first(world):
    found = estimator(world).estimate(request(max_cost=40_000), KNOWN)
    assert found.sentences[0].startswith(
        f"It is expected to cost {money.dollars(round(found.price.likely))}"
    )
    assert any("The cap is too low" in words for words in found.sentences)
