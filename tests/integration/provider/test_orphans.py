"""What an orphan cost, on a market behind its socket that keeps a ledger of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from infra.provider import LaunchSpec
from infra.sandbox.faults import Fault
from infra.sandbox.server import running_sandbox
from infra.vast import VastProvider
from state import spending
from state.job import GpuNeeds
from state.memory import MemoryStore
from state.spending import GroupBy, Split
from tasks.deallocate import Keeper, sweep

KEY = "sandbox-account-key"
NEEDS = GpuNeeds(min_vram_gb=1, max_price=5_000_000, verified_only=False, min_download_mbps=1)
#: What may befall the list, as the sandbox calls it; and for how many calls.
TROUBLE = {
    "nothing": [],
    "a doubled row": [Fault(op="list", kind="doubled_row", times=0)],
    "half a page": [Fault(op="list", kind="half_page", times=3)],
    "no answer but HTML": [Fault(op="list", kind="html", times=3)],
    "rows without a start": [Fault(op="list", kind="null_start_date", times=1)],
    "rows of nulls": [Fault(op="list", kind="null_fields", times=1)],
    "an old page": [Fault(op="list", kind="stale_page", times=2)],
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_an_orphans_money_is_the_markets_within_one_per_cent(
    clock: Any, trouble: list[Fault]
) -> None:
    began = clock()
    with running_sandbox(
        account_key=KEY, clock=lambda: clock().timestamp(), boot_s=5, time_scale=1.0
    ) as sandbox:
        provider = VastProvider(KEY, sandbox.url, spacing=0, timeout=10)
        keeper = Keeper(store=(store := MemoryStore()), provider=provider, clock=clock)
        offer = min(provider.offers(NEEDS), key=lambda offer: offer.price)
        spec = LaunchSpec(label="test/job_x/1-0", image="i", disk_gb=20, onstart="sleep 999")
        number = int(provider.create(offer, spec))
        market, ledger = sandbox.market, sandbox.market.contracts[number]
        for _ in range(360):  # half an hour without a sweep
            clock.advance(5)
            market.tick()
        sandbox.faults.plan.extend(trouble)
        for _ in range(60):
            sweep(keeper, "test")
            for _ in range(6):
                clock.advance(5)
                market.tick()
        assert market.contracts == {}, "it was not destroyed"
        assert ledger.charges["bwd"] > 0.1 * ledger.cost, "its image is no small part of it"
        truth = ledger.cost

        groups: dict[str, Split] = {}
        with store.transaction() as tx:
            orphans = tx.orphans_between(began - timedelta(days=1), clock())
            ledger_says = tx.spend_since(began)
        spending.add_orphans(groups, orphans, {}, GroupBy.GPU, clock())
        assert list(groups) == [offer.gpu_name]
        assert groups[offer.gpu_name].orphan == pytest.approx(truth * 1_000_000, rel=0.01)
        assert groups[offer.gpu_name].total == ledger_says
