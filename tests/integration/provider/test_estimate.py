"""An estimate over the real adapter, and the sandbox behind it."""

from __future__ import annotations

from typing import Any

from gpu_agent.recipe import Recipe
from infra.sandbox.server import Sandbox
from infra.vast import VastProvider
from state.job import GpuNeeds, JobRequest
from state.memory import MemoryStore
from tasks.estimate import Estimator, Photographs


def test_the_sandboxs_market_is_reckoned_with(
    sandbox: Sandbox, vast: VastProvider, clock: Any
) -> None:
    tried = Estimator(MemoryStore(), lambda wanted: vast, clock=clock)
    wanted = JobRequest(
        dataset_id="", base="civitai:1", recipe=Recipe().to_dict(), interruptible=True
    )
    found = tried.estimate(wanted, Photographs(count=20))
    assert found.fit > 3
    assert found.price is not None
    assert 1000 < found.price.low <= found.price.likely <= found.price.high <= wanted.max_cost
    assert {bool(item.offer.bid) for item in found.candidates} >= {True}
    none = tried.estimate(
        JobRequest(
            dataset_id="", base="civitai:1", recipe=Recipe().to_dict(), gpu=GpuNeeds(max_price=1)
        ),
        Photographs(),
    )
    assert (none.fit, none.price) == (0, None)
    assert none.refused["for their price"] > 3
    assert sandbox.url
