"""A market whose machines exist on paper only, and whose time passes when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.sandbox.contracts import Contract
from infra.sandbox.faults import Fault, Faults, HostFault
from infra.sandbox.hosts import Truth
from infra.sandbox.market import Market


class Paper:
    """Machines that exist on paper only."""

    def __init__(self) -> None:
        self.running: dict[str, Mapping[str, str]] = {}
        self.truth: dict[str, Truth] = {}
        self.destroyed: list[str] = []
        self.logs: dict[str, str] = {}

    def start(
        self,
        name: str,
        *,
        env: Mapping[str, str],
        onstart: str,
        args: Sequence[str],
        stays: bool,
        truth: Truth,
    ) -> None:
        self.running[name], self.truth[name] = env, truth

    def exit_code(self, name: str) -> int | None:
        return None if name in self.running else 0

    def stop(self, name: str) -> None:
        self.running.pop(name, None)

    kill = stop

    def destroy(self, name: str) -> None:
        self.running.pop(name, None)
        self.destroyed.append(name)

    def log(self, name: str) -> str:
        return self.logs.get(name, "")

    def directory(self, name: str) -> Path:
        return Path(name)


class Time:
    """A clock and the markets that run by it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.markets: list[Market] = []

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds
        for market in self.markets:
            market.tick()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def opened(time: Time) -> Callable[..., Market]:
    """Opens a market; `told` collects what it tells of."""

    def open_market(*faults: Fault | HostFault, seed: int = 0, **options: Any) -> Market:
        told: list[tuple[str, dict[str, Any]]] = []
        market = Market(
            Paper(),
            seed=seed,
            clock=time,
            faults=Faults(faults, seed=seed),
            tell=lambda event, **data: told.append((event, data)),
            **{"boot_s": 100.0, **options},
        )
        market.told = told  # type: ignore[attr-defined]
        time.markets.append(market)
        return market

    return open_market


@pytest.fixture
def market(opened: Callable[..., Market]) -> Market:
    return opened()


@pytest.fixture
def rent() -> Callable[..., Contract]:
    """Rents the cheapest, or the cheapest bid at `price`."""

    def rent_one(market: Market, **body: Any) -> Contract:
        kind = "bid" if "price" in body else "on-demand"
        (ask, *_) = market.search({"order": [["dph_total", "asc"]], "type": kind})
        return market.create(ask["id"], {"image": "x", "disk": 73, "cancel_unavail": True, **body})

    return rent_one
