"""Whatever is done to the market, in whatever order: its books balance and no GPU has two users."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest

from infra.sandbox.contracts import MarketError
from infra.sandbox.faults import profile


@pytest.mark.parametrize("seed", range(6))
def test_the_market_holds_in_a_storm(opened: Any, time: Any, seed: int) -> None:
    market = opened(*profile("hell"), seed=seed, credit=50.0)
    dice = random.Random(seed)
    refused: collections.Counter[str] = collections.Counter()
    for _ in range(600):
        try:
            _do_something(market, dice)
        except MarketError as error:
            refused[error.body["error"]] += 1
        time.passes(dice.choice((0, 1, 30, 600)))
        _check(market)
    assert len(market.faults.fired) > 30
    assert {"invalid_price", "resources_unavailable"} <= refused.keys()
    market.close()
    assert market.machines.running == {}
    assert market.contracts == {}


def _do_something(market: Any, dice: random.Random) -> None:
    number = dice.choice([0, *market.contracts])
    verbs = (
        lambda: _rent(market, dice),
        lambda: _rent(market, dice),
        lambda: market.destroy(number),
        lambda: market.stop(number),
        lambda: market.start(number),
        lambda: market.reboot(number, recycle=dice.random() < 0.5),
        lambda: market.bid(number, dice.uniform(0, 0.5)),
        lambda: market.linger(number, 60),
        lambda: market.outbid(number, dice.choice((0.1, 0.3, float("inf"))), seconds=300),
        lambda: market.rival_leaves(dice.choice(list(market.hosts))),
        lambda: market.lose(number),
        lambda: market.regain(number),
        lambda: market.crash(number),
    )
    dice.choice(verbs)()


def _rent(market: Any, dice: random.Random) -> None:
    price = dice.choice((None, None, 0.05, 0.2, 0.4))
    offers = market.search({"type": "bid" if price else "on-demand"})
    ask = dice.choice([5, *(offer["id"] for offer in offers)])
    body: dict[str, Any] = {"image": "x", "disk": 20}
    market.create(ask, body | ({"price": price} if price else {}))


def _check(market: Any) -> None:
    everything = [*market.ended, *market.contracts.values()]
    assert market.ledger.total == pytest.approx(sum(item.cost for item in everything))
    assert market.credit == pytest.approx(50.0 - market.ledger.total)
    assert len(set(market.asks.values())) == len(market.asks)
    users = collections.Counter(
        item.host.machine_id
        for item in market.contracts.values()
        if item.current == "running" and item.wanted
    )
    assert all(count == 1 for count in users.values()), users
    for item in market.contracts.values():
        if item.runs:
            assert (item.intended, item.following) == ("running", "running")
