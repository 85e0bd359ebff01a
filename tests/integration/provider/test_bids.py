"""Interruptible machines: what is bid, what happens when somebody bids more or we bid too low."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from infra.provider import LaunchSpec
from infra.sandbox.server import Sandbox
from infra.vast import BID_MARGIN, VastProvider
from state.errors import ProviderError, Refused
from state.job import GpuNeeds


def bid_for(vast: VastProvider) -> Any:
    return min(vast.offers(GpuNeeds(), interruptible=True), key=lambda offer: offer.price)


def spec_of(offer: Any, spec: LaunchSpec) -> LaunchSpec:
    return dataclasses.replace(spec, bid=offer.bid)


def test_a_bid_is_above_the_least_that_wins_and_below_the_price_on_demand(
    sandbox: Sandbox, vast: VastProvider
) -> None:
    fixed = {offer.machine_id: offer for offer in vast.offers(GpuNeeds())}
    for offer in vast.offers(GpuNeeds(), interruptible=True):
        host = sandbox.market.hosts[int(offer.machine_id)]
        assert offer.bid == pytest.approx(host.min_bid * BID_MARGIN * 1e6, abs=2)
        assert offer.price == pytest.approx(offer.bid + offer.storage_price, abs=2)
        if offer.machine_id in fixed:
            assert offer.price < fixed[offer.machine_id].price


def test_the_market_bills_the_bid_and_shows_it(
    sandbox: Sandbox, vast: VastProvider, spec: LaunchSpec
) -> None:
    offer = bid_for(vast)
    number = vast.create(offer, spec_of(offer, spec))
    contract = sandbox.market.contracts[int(number)]
    assert (contract.is_bid, round(contract.gpu_price * 1e6)) == (True, offer.bid)
    (listed,) = vast.instances()
    assert listed.price == pytest.approx(offer.bid + contract.storage_price * 1e6, abs=2)


def test_a_higher_bid_shows_as_an_end_that_the_market_made(
    sandbox: Sandbox, vast: VastProvider, spec: LaunchSpec
) -> None:
    offer = bid_for(vast)
    number = vast.create(offer, spec_of(offer, spec))
    sandbox.market.outbid(int(number), seconds=3600)
    sandbox.market.tick()
    (listed,) = vast.instances()
    assert (listed.phase, listed.preempted) == ("ended", True)


def test_a_bid_that_is_too_low_is_refused_and_names_what_was_made_all_the_same(
    sandbox: Sandbox, vast: VastProvider, spec: LaunchSpec
) -> None:
    offer = bid_for(vast)
    low = dataclasses.replace(spec, bid=offer.bid // 2)
    with pytest.raises(Refused) as caught:
        vast.create(offer, low)
    error: ProviderError = caught.value
    (contract,) = sandbox.market.contracts.values()
    assert error.instance_id == str(contract.id)
    vast.destroy(error.instance_id)
    assert vast.instances() == []
