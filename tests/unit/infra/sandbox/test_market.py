"""The sandbox's market by itself: time, money and the order of states."""

from __future__ import annotations

from typing import Any

import pytest

from infra.sandbox.contracts import MarketError
from infra.sandbox.hosts import MARKET, seeded
from infra.sandbox.life import IMAGE_GB
from infra.sandbox.market import Market


def test_the_disk_bills_from_creation_and_the_gpu_while_running(
    market: Market, time: Any, rent: Any
) -> None:
    contract = rent(market)
    host = contract.host
    time.now += 100
    market.tick()
    assert contract.actual == "running"
    assert contract.charges["gpu"] == 0
    assert contract.charges["bwd"] == pytest.approx(IMAGE_GB * host.inet_down_cost)
    time.now += 3600
    market.tick()
    market.stop(contract.id)
    market.tick()
    time.now += 3600
    market.tick()
    assert contract.charges["gpu"] == pytest.approx(host.dph_base)
    assert contract.charges["disk"] == pytest.approx(host.storage_cost * 73 / 730 * (7300 / 3600))
    market.destroy(contract.id)
    market.settle()
    time.now += 3600
    market.tick()
    (result,) = market.bill()["results"]
    assert result["amount"] == pytest.approx(contract.cost)
    assert market.credit == pytest.approx(100 - contract.cost)


def test_a_boot_passes_every_state_in_order(market: Market, time: Any, rent: Any) -> None:
    contract = rent(market)
    seen: list[Any] = [contract.actual]
    while contract.actual != "running":
        time.now += 5
        market.tick()
        if seen[-1] != contract.actual:
            seen.append(contract.actual)
    assert seen == [None, "created", "loading", "running"]


def test_market_time_runs_as_fast_as_it_is_told(opened: Any, time: Any, rent: Any) -> None:
    market = opened(time_scale=50)
    contract = rent(market)
    time.now += 2
    market.tick()
    assert contract.actual == "running"


def test_without_credit_everything_stops_and_nothing_starts(
    market: Market, time: Any, rent: Any
) -> None:
    contracts = [rent(market), rent(market)]
    time.now += 200
    market.tick()
    market.credit = 0.0
    market.tick()
    market.tick()
    assert {contract.intended for contract in contracts} == {"stopped"}
    assert {contract.actual for contract in contracts} == {"exited"}
    with pytest.raises(MarketError) as refusal:
        rent(market)
    assert refusal.value.body["error"] == "insufficient_credit"


def test_an_off_line_host_is_not_billed(market: Market, time: Any, rent: Any) -> None:
    contract = rent(market)
    time.now += 100
    market.tick()
    market.lose(contract.id)
    before = contract.cost
    time.now += 3600
    market.tick()
    assert contract.cost == before


def test_one_ask_is_one_contract(market: Market, rent: Any) -> None:
    contract = rent(market)
    assert contract.host.machine_id not in {row["machine_id"] for row in market.search({})}
    market.destroy(contract.id)
    market.settle()
    offers = {row["machine_id"]: row["id"] for row in market.search({})}
    assert offers[contract.host.machine_id] > contract.id
    assert str(contract.id) in market.machines.destroyed  # type: ignore[attr-defined]


@pytest.mark.parametrize(("polite", "status"), [(True, 410), (False, 404)])
def test_a_taken_ask_is_refused_as_vast_does(market: Market, polite: bool, status: int) -> None:
    with pytest.raises(MarketError, match="no_such_ask") as refusal:
        market.create(5, {"image": "x", "cancel_unavail": polite})
    assert refusal.value.status == status


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ({"gpu_name": {"eq": "RTX 4090"}}, lambda row: row["gpu_name"] == "RTX 4090"),
        ({"num_gpus": {"eq": "1"}}, lambda row: True),
        ({"reliability": {"gt": "0.99"}}, lambda row: row["reliability"] > 0.99),
        ({"gpu_ram": {"gte": 40000.0, "lt": 50000}}, lambda row: 40000 <= row["gpu_ram"] < 50000),
        ({"verified": {"eq": True}}, lambda row: row["verification"] == "verified"),
        ({"verified": {"neq": True}}, lambda row: row["verification"] != "verified"),
        ({"geolocation": {"in": ["US", "SE"]}}, lambda row: row["geolocation"][-2:] in "US SE"),
        ({"geolocation": {"notin": ["US"]}}, lambda row: row["geolocation"][-2:] != "US"),
        ({"external": {"eq": False}}, lambda row: True),
        ({"rented": {"eq": True}}, lambda row: False),
        ({"id": {"eq": 5}}, lambda row: False),
        ({"no_such_field": {"gte": 1}}, lambda row: False),
        ({"gpu_name": {"odd": 1}}, lambda row: False),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_offers_are_filtered_as_vast_does(market: Market, filters: Any, matches: Any) -> None:
    wanted = [row["id"] for row in market.search({}) if matches(row)]
    assert [row["id"] for row in market.search(filters)] == wanted


def test_an_offer_is_read_again_by_its_ask(market: Market) -> None:
    (first, *_) = market.search({})
    assert market.search({"ask_contract_id": {"eq": first["id"]}}) == [first]


def test_the_market_is_the_same_for_the_same_seed() -> None:
    assert seeded(4) == seeded(4) != seeded(5)
    assert len({host.machine_id for host in seeded(4)}) == len(MARKET) >= 12
