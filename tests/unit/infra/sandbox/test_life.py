"""The life of contracts: what befalls hosts, who gets a GPU, and what all of it costs."""

from __future__ import annotations

from typing import Any

import pytest

from infra.sandbox.contracts import Contract, MarketError
from infra.sandbox.faults import HostFault
from infra.sandbox.life import (
    EXPIRED_LIFE_S,
    IMAGE_GB,
    LOW_CREDIT,
    RESUME_S,
    RIVAL_STAYS_S,
    UNPAID_LIFE_S,
)

HOUR = 3600.0
STOPPED = ("stopped", "stopped", "stopped")


def states(contract: Contract) -> tuple[str, str, str]:
    return contract.intended, contract.current, contract.following


def events(market: Any) -> list[str]:
    return [event for event, _ in market.told]


# --- faults of hosts ------------------------------------------------------------------------------


def test_a_contract_is_created_and_abandoned(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="abandoned"))
    contract = rent(market)
    time.passes(HOUR)
    assert (contract.actual, states(contract)) == ("created", STOPPED)
    assert "unresolvable CDI devices" in contract.message
    assert market.machines.running == {}
    assert contract.charges["gpu"] == 0 < contract.charges["disk"]
    market.start(contract.id)
    time.passes(HOUR)
    assert (contract.actual, states(contract)) == ("created", STOPPED)


def test_what_runs_ends_when_its_host_gives_up(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="abandoned", at="running", after_s=60))
    contract = rent(market)
    time.passes(170)
    assert contract.actual == "created"
    assert market.machines.running == {}


@pytest.mark.parametrize(
    ("kind", "words"), [("stuck", "Retrying in 5 seconds"), ("pull_denied", "pull access denied")]
)
def test_an_image_loads_for_ever_with_a_frozen_message(
    opened: Any, time: Any, rent: Any, kind: str, words: str
) -> None:
    market = opened(HostFault(kind=kind))
    contract = rent(market)
    for _ in range(10):
        time.passes(HOUR)
        assert contract.actual == "loading"
        assert words in contract.message
    assert contract.charges["gpu"] == 0


def test_the_gpu_is_lost_after_the_pull(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="lost_after_pull"))
    contract = rent(market)
    time.passes(100)
    assert (contract.actual, states(contract)) == ("created", STOPPED)
    assert contract.message == "Successfully loaded x"
    assert contract.charges["bwd"] == pytest.approx(IMAGE_GB * contract.host.inet_down_cost)
    with pytest.raises(MarketError, match="state change queued"):
        market.start(contract.id)
    market.destroy(contract.id)
    market.settle()
    assert contract.host.machine_id not in market.asks.values()
    time.passes(RIVAL_STAYS_S)
    assert contract.host.machine_id in market.asks.values()


def test_a_queued_start_begins_later_and_bills(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="queued", seconds=600))
    contract = rent(market)
    time.passes(300)
    assert (contract.actual, states(contract)) == ("stopped", STOPPED)
    assert contract.charges["gpu"] == 0
    time.passes(300 + RESUME_S + 100)
    assert (contract.actual, contract.intended) == ("running", "running")
    time.passes(HOUR)
    assert contract.charges["gpu"] == pytest.approx(contract.host.dph_base)


def test_a_queued_start_that_is_stopped_never_begins(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="queued", seconds=600))
    contract = rent(market)
    market.stop(contract.id)
    time.passes(HOUR)
    assert states(contract) == STOPPED
    assert contract.charges["gpu"] == 0


def test_a_host_off_line_keeps_its_container_and_comes_back(
    opened: Any, time: Any, rent: Any
) -> None:
    market = opened(HostFault(kind="offline", after_s=60, seconds=600, status="unknown"))
    contract = rent(market)
    time.passes(170)
    spent = contract.cost
    assert contract.actual == "unknown"
    assert str(contract.id) in market.machines.running
    time.passes(500)
    assert contract.cost == pytest.approx(spent)
    time.passes(100)
    assert contract.actual == "running"
    assert "instance_offline" in events(market)


def test_what_is_destroyed_off_line_lives_until_its_host_is_back(
    opened: Any, time: Any, rent: Any
) -> None:
    market = opened(HostFault(kind="offline", after_s=60, seconds=600))
    contract = rent(market)
    time.passes(200)
    market.destroy(contract.id)
    market.settle()
    assert market.get(contract.id) is None
    assert str(contract.id) in market.machines.running
    time.passes(600)
    market.settle()
    assert market.machines.running == {}


def test_a_container_that_ends_by_itself_has_exited(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="exit", after_s=60))
    contract = rent(market)
    time.passes(159)
    assert contract.actual == "running"
    time.passes(2)
    assert (contract.actual, contract.intended) == ("exited", "running")


def test_an_instance_vanishes(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="vanish", after_s=60))
    contract = rent(market)
    time.passes(161)
    market.settle()
    assert market.contracts == {}
    assert market.machines.destroyed == [str(contract.id)]
    assert market.bill()["total"] == 1


def test_a_contract_ends_cannot_restart_and_is_deleted(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="expire", after_s=1000))
    contract = rent(market)
    time.passes(1000)
    market.tick()
    assert (contract.actual, states(contract)) == ("exited", STOPPED)
    assert contract.row()["end_date"] == pytest.approx(time.now)
    with pytest.raises(MarketError, match="has ended"):
        market.start(contract.id)
    time.passes(EXPIRED_LIFE_S)
    assert market.contracts == {}


def test_a_slow_boot_moves_all_the_while(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="slow_boot", seconds=900))
    contract = rent(market)
    seen = set()
    while contract.actual != "running":
        time.passes(100)
        seen.add(contract.message)
    assert contract.created_at + 1000 == market.now()
    assert len(seen) > 5


def test_a_host_lies(opened: Any, time: Any, rent: Any) -> None:
    lie = HostFault(kind="lie", gpu_name="GTX 1060", vram_mib=6144, disk_gb=3, download_mbps=8)
    market = opened(lie)
    contract = rent(market)
    time.passes(100)
    truth, env = (
        part[str(contract.id)] for part in (market.machines.truth, market.machines.running)
    )
    assert (truth.driver_name, truth.gpu_ram) == ("NVIDIA GeForce GTX 1060", 6144)
    assert env["STOKER_SANDBOX_DISK_GB"] == "3"
    assert env["STOKER_SANDBOX_DOWNLOAD_MBPS"] == "8"
    assert contract.row()["gpu_name"] == contract.host.gpu_name != "GTX 1060"


def test_a_machine_may_lack_the_key_to_destroy_itself(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="no_key"))
    contract = rent(market)
    time.passes(100)
    assert "CONTAINER_API_KEY" not in market.machines.running[str(contract.id)]


def test_a_fault_can_wait_for_what_the_container_prints(opened: Any, time: Any, rent: Any) -> None:
    market = opened(HostFault(kind="outbid", at="printed", text="uploading"))
    contract = rent(market)
    time.passes(HOUR)
    assert contract.intended == "running"
    market.machines.logs[str(contract.id)] = "INFO uploading\n"
    time.passes(1)
    time.passes(1)
    assert states(contract) == STOPPED


def test_faults_strike_the_machine_and_the_rental_that_are_meant(opened: Any, rent: Any) -> None:
    machine = min(opened().hosts.values(), key=lambda host: host.dph_base).machine_id
    market = opened(HostFault(kind="abandoned", machine=machine, rental=2))
    found = []
    for _ in range(3):
        (ask,) = (ask for ask, host in market.asks.items() if host == machine)
        contract = market.create(ask, {"image": "x"})
        found.append(contract.actual)
        market.destroy(contract.id)
        market.settle()
    assert found == [None, "created", None]
    (fired,) = market.faults.fired
    assert (fired["kind"], fired["machine"]) == ("abandoned", machine)


# --- rivals ---------------------------------------------------------------------------------------


def test_the_higher_bid_gets_the_gpu_and_the_lower_resumes_when_it_leaves(
    market: Any, time: Any, rent: Any
) -> None:
    contract = rent(market, price=0.06)
    time.passes(100)
    market.outbid(contract.id, 0.05)
    assert contract.intended == "running"
    market.outbid(contract.id, 0.07)
    time.passes(1)
    assert (contract.actual, states(contract)) == ("exited", STOPPED)
    assert contract.message.startswith("success, running"), "the message does not say it"
    ((_, told),) = [item for item in market.told if item[0] == "outbid"]
    assert told["instance_id"] == contract.id
    assert told["bid"] == 0.06 < told["min_bid"]
    gpu = contract.charges["gpu"]
    time.passes(HOUR)
    assert contract.charges["gpu"] == gpu
    assert contract.charges["disk"] > 0, "the disk is kept, and billed"
    market.rival_leaves(contract.host.machine_id)
    time.passes(RESUME_S + 20)
    assert (contract.actual, contract.intended) == ("running", "running")


def test_a_rival_stays_as_long_as_he_said_whoever_was_there_before(
    market: Any, time: Any, rent: Any
) -> None:
    contract = rent(market, price=0.06)
    time.passes(100)
    market.outbid(contract.id, 0.07, seconds=100)
    market.rival_leaves(contract.host.machine_id)
    market.outbid(contract.id, 0.07, seconds=1000)
    time.passes(500)
    assert states(contract) == STOPPED
    time.passes(500 + RESUME_S + 20)
    assert contract.actual == "running"


def test_a_raised_bid_takes_the_gpu_back(market: Any, time: Any, rent: Any) -> None:
    contract = rent(market, price=0.06)
    time.passes(100)
    market.outbid(contract.id, 0.07)
    time.passes(1)
    market.bid(contract.id, 0.08)
    time.passes(RESUME_S + 20)
    assert contract.actual == "running"


def test_who_lowers_his_own_bid_stops_untold_until_a_start(
    market: Any, time: Any, rent: Any
) -> None:
    contract = rent(market, price=0.06)
    time.passes(100)
    market.bid(contract.id, 0.001)
    time.passes(1)
    assert states(contract) == STOPPED
    market.bid(contract.id, 0.06)
    time.passes(HOUR)
    assert contract.actual == "exited"
    assert "outbid" not in events(market)
    market.start(contract.id)
    time.passes(20)
    assert contract.actual == "running"


def test_a_rental_on_demand_pre_empts_ones_own_bid(market: Any, time: Any, rent: Any) -> None:
    bid = rent(market, price=0.06)
    time.passes(100)
    (ask,) = (ask for ask, machine in market.asks.items() if machine == bid.host.machine_id)
    market.create(ask, {"image": "x"})
    time.passes(1)
    assert states(bid) == STOPPED
    (dear,) = (item for item in market.contracts.values() if item is not bid)
    market.destroy(dear.id)
    time.passes(RESUME_S + 20)
    assert bid.actual == "running"


def test_a_bid_costs_what_was_bid(market: Any, time: Any, rent: Any) -> None:
    contract = rent(market, price=0.06)
    time.passes(100 + HOUR)
    market.bid(contract.id, 0.12)
    time.passes(HOUR)
    assert contract.charges["gpu"] == pytest.approx(0.18)


# --- money ----------------------------------------------------------------------------------------


def test_a_bill_is_the_same_however_often_the_clock_ticks(
    opened: Any, time: Any, rent: Any
) -> None:
    def faults() -> HostFault:
        return HostFault(kind="offline", after_s=1234.5, seconds=777.7)

    often, seldom = opened(faults()), opened(faults())
    contracts = rent(often), rent(seldom)
    time.markets.remove(seldom)
    for _ in range(300):
        time.passes(33.3)
    seldom.tick()
    first, second = (contract.charges for contract in contracts)
    assert first == pytest.approx(second)
    running = 300 * 33.3 - 100 - 777.7
    assert first["gpu"] == pytest.approx(contracts[0].host.dph_base * running / HOUR)


def test_bytes_of_a_machine_are_charged_by_the_hook(market: Any, rent: Any) -> None:
    contract = rent(market)
    market.charge(contract.id, "bwu", 2.5)
    assert contract.charges["bwu"] == pytest.approx(2.5 * contract.host.inet_up_cost)
    for kind, gb in (("gpu", 1.0), ("bwd", -1.0), ("bwd", float("nan"))):
        with pytest.raises(MarketError):
            market.charge(contract.id, kind, gb)


def test_an_account_without_credit_is_stopped_then_deleted(
    market: Any, time: Any, rent: Any
) -> None:
    contracts = [rent(market), rent(market, price=0.08)]
    time.passes(100)
    market.credit = LOW_CREDIT - 1
    time.passes(1)
    time.passes(1)
    assert events(market).count("low_credit") == 1
    market.credit = 0.0
    time.passes(1)
    time.passes(1)
    assert {states(contract) for contract in contracts} == {STOPPED}
    with pytest.raises(MarketError, match="credit"):
        market.start(contracts[0].id)
    time.passes(UNPAID_LIFE_S)
    assert market.contracts == {}


def test_charges_are_listed_by_day_and_page_with_their_labels(
    market: Any, time: Any, rent: Any
) -> None:
    contracts = [rent(market, label=f"job-{index}") for index in range(3)]
    time.passes(7200)
    market.destroy(contracts[0].id)
    pages, token = [], None
    while not pages or token:
        answer = market.bill({"type": {"in": ["instance"]}}, 1, token)
        assert (answer["count"], answer["total"]) == (1, 3)
        pages, token = [*pages, *answer["results"]], answer["next_token"]
    assert [row["metadata"]["label"] for row in pages] == ["job-0", "job-1", "job-2"]
    for row, contract in zip(pages, contracts, strict=True):
        assert row["source"] == f"instance-{contract.id}"
        assert {item["type"]: item["amount"] for item in row["items"]} == pytest.approx(
            contract.charges
        )
    first = {"day": {"gte": time.now - 7200, "lte": time.now - 3660}}
    second = {"day": {"gte": time.now - 3600, "lte": time.now}}
    halves = [market.bill(part)["results"][0]["amount"] for part in (first, second)]
    assert sum(halves) == pytest.approx(contracts[0].cost, rel=0.02)
    assert market.bill({"type": {"in": ["serverless"]}})["results"] == []
    for wrong in ({"label": {}}, None):
        with pytest.raises(MarketError):
            market.bill(wrong, 25, None if wrong else "nonsense")


def test_charges_may_be_late(opened: Any, time: Any, rent: Any) -> None:
    market = opened(charges_lag_s=HOUR)
    contract = rent(market)
    time.passes(HOUR)
    assert market.bill()["results"] == []
    time.passes(HOUR)
    assert 0 < market.bill()["results"][0]["amount"] < contract.cost
