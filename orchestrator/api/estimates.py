"""What a training would cost and take. Nothing is spent by asking, and nothing is kept."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import Field

from infra.rehearsal import Cue, Market
from orchestrator.api import schemas
from orchestrator.api.market import market
from orchestrator.api.problems import Refusal
from orchestrator.api.schemas import MicroUsd, Out
from orchestrator.deps import Deps
from state import estimate as reckoning
from state import policy
from state.errors import ProviderError, Throttled
from state.job import JobRequest
from state.money import dollars
from tasks.estimate import Estimator, Photographs
from tasks.search import Market as Searched

#: When a market that cannot be read may be asked again, unless it says so itself (seconds).
ASK_AGAIN_S = 10


class EstimateIn(schemas.TrainingIn):
    """A job's order, of which the photographs may not be there yet."""

    dataset_id: Annotated[str, Field(max_length=64)] | None = None
    images: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="photographs, where there is no dataset yet"
    )
    bytes: Annotated[int, Field(ge=1, le=10**12)] | None = Field(
        default=None, description="of them all; guessed by `images`, if left out"
    )


class Price(Out):
    """Micro-USD of the finished job, all attempts together."""

    low: MicroUsd = Field(description="nothing goes wrong")
    likely: MicroUsd = Field(description="what is expected, lost attempts and all")
    high: MicroUsd = Field(
        description="the dearest of the offers shown, slower than guessed, all attempts but the "
        "last lost; never above the cap"
    )
    currency: Literal["USD"] = "USD"
    display: str


class Duration(Out):
    """Seconds, by the first of the candidates; low and high as those of the price."""

    low_s: float
    likely_s: float
    high_s: float
    boot_s: float
    downloads_s: float
    training_s: float
    display: str


class EstimatedOffer(Out):
    """An offer, and what the finished job is expected to cost on it."""

    machine_id: str
    gpu: str
    vram_gb: float
    geo: str
    price_per_hour: MicroUsd
    interruptible: bool
    reliability: float
    expected_cost: MicroUsd
    display: str
    boot_s: float
    downloads_s: float
    training_s: float
    chance: float = Field(description="that the machine sees the job through")
    measured: bool = Field(description="whether this GPU's speed was measured here before")


class EstimatedCap(Out):
    amount: MicroUsd
    suffices: bool
    message: str
    display: str


class EstimatedMemory(Out):
    """GB, as offers count them."""

    least_gb: float = Field(description="no GPU with less is rented")
    full_speed_gb: float
    disk_gb: float


class Held(Out):
    code: str
    message: str


class Estimate(Out):
    """What a training would cost and take if it were ordered now."""

    at: datetime
    price: Price | None = Field(description="null where no offer fits now")
    time: Duration | None
    candidates: list[EstimatedOffer] = Field(description="the first is what would be rented now")
    offers_fit: int
    offers_refused: dict[str, int] = Field(description="offers, by the reason against them")
    no_offer: str | None = Field(description="why none fits")
    cap: EstimatedCap
    memory: EstimatedMemory
    brakes: list[Held] = Field(description="what would make the job wait")
    assumed: list[str] = Field(description="what nobody knows yet, and is guessed")
    sentences: list[str] = Field(description="all of this for people")


class Estimates:
    """Reckons with what the market offers. One for each server: it remembers the market's last
    answers for half a minute."""

    def __init__(self, deps: Deps) -> None:
        self._deps, settings = deps, deps.settings
        rules = dataclasses.replace(policy.DEFAULT, lease=timedelta(hours=settings.lease_hours))
        self._estimator = Estimator(
            deps.store,
            self._market,
            clock=deps.clock,
            limits=settings.limits,
            kill_switch=settings.kill_switch,
            image_bytes=settings.image_bytes,
            rules=rules,
            pause=deps.pause,
        )

    def of(self, request: JobRequest, photographs: Photographs) -> Estimate:
        """For a request that was checked.

        Raises: Refusal 503, with `Retry-After`, where the market cannot be asked.
        """
        try:
            found = self._estimator.estimate(request, photographs)
        except ProviderError as error:
            pause = error.retry_after if isinstance(error, Throttled) else ASK_AGAIN_S
            raise Refusal(
                503,
                "market_unavailable",
                f"the market cannot be asked now: {error}",
                headers={"Retry-After": str(max(1, round(pause)))},
                retryable=True,
            ) from None
        return _shown(found, self._deps.clock())

    def _market(self, request: JobRequest) -> Searched:
        """That of what is rehearsed only pretends. Raises: Refusal 503."""
        if request.rehearsal is None:
            return market(self._deps)
        made_up = Market(store=self._deps.store, clock=self._deps.clock, play=_nobody_plays)
        return made_up.for_(request.rehearsal, first=True)


def _nobody_plays(_: Cue) -> None:
    """An estimate rents nothing."""


def _shown(found: reckoning.Estimate, now: datetime) -> Estimate:
    return Estimate(
        at=now,
        price=_price(found.price) if found.price else None,
        time=_time(found, found.seconds) if found.seconds else None,
        candidates=[_candidate(item) for item in found.candidates],
        offers_fit=found.fit,
        offers_refused=dict(found.refused),
        no_offer=found.nothing or None,
        cap=EstimatedCap(
            amount=found.cap.amount,
            suffices=found.cap.suffices,
            message=found.cap.words,
            display=dollars(found.cap.amount),
        ),
        memory=EstimatedMemory(
            least_gb=found.memory.least_gb,
            full_speed_gb=found.memory.full_speed_gb,
            disk_gb=found.memory.disk_gb,
        ),
        brakes=[Held(code=item.code, message=item.message) for item in found.brakes],
        assumed=list(found.assumed),
        sentences=found.sentences,
    )


def _price(price: reckoning.Range) -> Price:
    low, likely, high = round(price.low), round(price.likely), round(price.high)
    display = f"{dollars(likely)} ({dollars(low)} to {dollars(high)})"
    return Price(low=low, likely=likely, high=high, display=display)


def _time(found: reckoning.Estimate, seconds: reckoning.Range) -> Duration:
    first = found.candidates[0].expected
    spans = (seconds.likely, seconds.low, seconds.high)
    likely, low, high = (policy.words(timedelta(seconds=span)) for span in spans)
    return Duration(
        low_s=round(seconds.low, 1),
        likely_s=round(seconds.likely, 1),
        high_s=round(seconds.high, 1),
        boot_s=round(first.boot_s, 1),
        downloads_s=round(first.download_s, 1),
        training_s=round(first.training_s, 1),
        display=f"{likely} ({low} to {high})",
    )


def _candidate(item: reckoning.Candidate) -> EstimatedOffer:
    offer, expected = item.offer, item.expected
    return EstimatedOffer(
        machine_id=offer.machine_id,
        gpu=offer.gpu_name,
        vram_gb=offer.vram_gb,
        geo=offer.geo,
        price_per_hour=offer.price,
        interruptible=bool(offer.bid),
        reliability=offer.reliability,
        expected_cost=round(expected.cost),
        display=dollars(round(expected.cost)),
        boot_s=round(expected.boot_s, 1),
        downloads_s=round(expected.download_s, 1),
        training_s=round(expected.training_s, 1),
        chance=round(expected.chance, 4),
        measured=item.measured,
    )
