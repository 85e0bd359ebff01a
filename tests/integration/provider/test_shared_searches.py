"""Vast wants six seconds between searches; jobs that want the same machine share each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state.errors import Throttled
from state.job import GpuNeeds

KEY = "shared-searches"
NEEDS, OTHER_NEEDS = GpuNeeds(), GpuNeeds(gpu_names=("RTX 4090",))


class Seconds:
    """A clock that stands still; who sleeps, fails."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        raise AssertionError(f"a thread was held for {seconds} s")


@pytest.fixture
def time() -> Seconds:
    return Seconds()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with running_sandbox(account_key=KEY) as sandbox:
        yield sandbox


@pytest.fixture
def vast(sandbox: Sandbox, time: Seconds) -> VastProvider:
    return VastProvider(KEY, sandbox.url, clock=time, sleep=time.sleep)


def test_jobs_that_want_the_same_share_a_search(vast: VastProvider) -> None:
    first = vast.offers(NEEDS)
    assert first
    assert vast.offers(NEEDS) == first


def test_a_shared_answer_is_no_older_than_three_turns(
    vast: VastProvider, time: Seconds, sandbox: Sandbox
) -> None:
    assert vast.offers(NEEDS)
    sandbox.market.asks.clear()
    time.now += 17.9
    assert vast.offers(NEEDS)
    time.now += 0.2
    assert vast.offers(NEEDS) == []


def test_another_search_is_told_its_turn_and_holds_no_thread(
    vast: VastProvider, time: Seconds
) -> None:
    vast.offers(NEEDS)
    time.now += 2
    with pytest.raises(Throttled) as caught:
        vast.offers(OTHER_NEEDS)
    assert caught.value.retry_after == 4
    time.now += 4
    assert {offer.gpu_name for offer in vast.offers(OTHER_NEEDS)} == {"RTX 4090"}


def test_who_wants_two_answers_has_both_when_the_second_turn_comes(
    vast: VastProvider, time: Seconds
) -> None:
    """A job that takes bids asks for both, each time anew from the beginning."""
    assert vast.offers(NEEDS)
    with pytest.raises(Throttled) as caught:
        vast.offers(NEEDS, interruptible=True)
    # whoever looks for due work is there up to a second and a half late
    time.now += caught.value.retry_after + 1.5
    assert vast.offers(NEEDS)
    assert vast.offers(NEEDS, interruptible=True)
