"""What every GPU market promises, held over Vast (its sandbox, through a socket) and memory."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from infra.provider import LaunchSpec
from infra.sandbox.hosts import seeded
from state import ranking
from state.errors import AccountFault, OfferGone
from state.job import GpuNeeds


@pytest.mark.parametrize(
    "needs",
    [
        {},
        {"min_vram_gb": 40},
        {"gpu_names": ("RTX 4090", "RTX 3090")},
        {"max_price": 300_000},
        {"min_reliability": 0.995},
        {"min_download_mbps": 1000},
        {"verified_only": False, "min_reliability": 0.5, "min_download_mbps": 0},
        {"min_cuda": 12.8},
    ],
    ids=str,
)
def test_offers_meet_every_need(tried: Any, needs: dict[str, Any]) -> None:
    wanted = GpuNeeds(**needs)
    offers = tried.provider.offers(wanted)
    assert offers
    assert [ranking.unmet(offer, wanted) for offer in offers] == [None] * len(offers)


def test_needs_that_nobody_meets_give_no_offers(tried: Any) -> None:
    assert tried.provider.offers(GpuNeeds(min_vram_gb=1000)) == []
    assert tried.provider.offers(GpuNeeds(min_cuda=99)) == []
    assert tried.provider.offers(GpuNeeds(disk_gb=1e6)) == []


def test_no_more_offers_come_than_asked_for(tried: Any) -> None:
    assert len(tried.provider.offers(GpuNeeds(), limit=2)) == 2


def test_a_rented_instance_is_listed_with_what_it_was_rented_with(
    tried: Any, spec: LaunchSpec
) -> None:
    offer = tried.offer()
    number = tried.provider.create(offer, spec)
    (listed,) = tried.provider.instances()
    shown = tried.provider.instance(number)
    assert shown is not None
    for instance in (listed, shown):
        assert instance.id == number
        assert instance.label == spec.label
        assert instance.machine_id == offer.machine_id
        assert instance.price == pytest.approx(offer.price, rel=0.2)
        assert instance.phase == "starting"
        assert instance.started_at is not None
        assert instance.started_at.tzinfo is UTC
        assert instance.started_at > datetime(2020, 1, 1, tzinfo=UTC)


def test_what_the_machine_was_given_is_not_in_the_record(tried: Any, spec: LaunchSpec) -> None:
    tried.provider.create(tried.offer(), spec)
    (listed,) = tried.provider.instances()
    assert "one-use-token" not in str(listed.raw) + repr(listed)
    assert spec.onstart not in str(listed.raw)


def test_an_instance_boots_and_runs(tried: Any, spec: LaunchSpec) -> None:
    number = tried.provider.create(tried.offer(), spec)
    assert tried.reaches(number, "running").message
    assert isinstance(tried.provider.logs(number), str)


def test_an_offer_can_be_rented_once(tried: Any, spec: LaunchSpec) -> None:
    offer = tried.offer()
    tried.provider.create(offer, spec)
    with pytest.raises(OfferGone) as refusal:
        tried.provider.create(offer, spec)
    assert refusal.value.instance_id is None
    assert len(tried.provider.instances()) == 1
    assert offer.machine_id not in {item.machine_id for item in tried.provider.offers(GpuNeeds())}


def test_a_destroyed_machine_comes_back_under_a_new_offer(tried: Any, spec: LaunchSpec) -> None:
    offer = tried.offer()
    number = tried.provider.create(offer, spec)
    tried.provider.destroy(number)
    assert tried.until(lambda: tried.offer().machine_id == offer.machine_id)
    assert tried.offer().id != offer.id
    with pytest.raises(OfferGone):
        tried.provider.create(offer, spec)


def test_a_destroyed_instance_is_gone_from_list_and_record(tried: Any, spec: LaunchSpec) -> None:
    number = tried.provider.create(tried.offer(), spec)
    tried.provider.destroy(number)
    assert tried.provider.instances() == []
    assert tried.provider.instance(number) is None


def test_destroying_what_is_gone_is_a_success(tried: Any, spec: LaunchSpec) -> None:
    number = tried.provider.create(tried.offer(), spec)
    tried.provider.destroy(number)
    tried.provider.destroy(number)
    tried.provider.destroy("987654321")


def test_an_instance_that_never_was_is_none(tried: Any) -> None:
    assert tried.provider.instance("987654321") is None


def test_the_list_is_whole_over_many_pages(markets: Any, spec: LaunchSpec) -> None:
    hosts = [
        dataclasses.replace(host, machine_id=host.machine_id + 1000 * copy)
        for copy in range(5)
        for host in seeded(copy)
    ]
    tried = markets.open(hosts=hosts, boot_s=1e6)
    needs = GpuNeeds(
        min_reliability=0,
        min_download_mbps=0,
        min_vram_gb=1,
        verified_only=False,
        max_price=10_000_000,
    )
    rented = [tried.provider.create(offer, spec) for offer in tried.provider.offers(needs)]
    assert len(rented) > 50
    assert sorted(rented) == sorted(instance.id for instance in tried.provider.instances())


def test_without_credit_nothing_is_rented(markets: Any, spec: LaunchSpec) -> None:
    tried = markets.open(credit=0)
    assert tried.provider.account().credit == 0
    with pytest.raises(AccountFault):
        tried.provider.create(tried.offer(), spec)
    assert tried.provider.instances() == []


def test_the_account_says_what_credit_is_left(tried: Any, spec: LaunchSpec) -> None:
    before = tried.provider.account()
    assert before.id
    assert before.credit == 100_000_000
    tried.reaches(tried.provider.create(tried.offer(), spec), "running")
    assert tried.until(lambda: tried.provider.account().credit < before.credit)
