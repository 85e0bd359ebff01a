"""`/v1/offers`: what the market has now, and what renting would make of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from pydantic import BaseModel, ConfigDict, Field

from gpu_agent import needs
from gpu_agent.recipe import Recipe
from orchestrator.api import present
from orchestrator.api.market import market
from orchestrator.api.schemas import Family, MicroUsd, Out
from orchestrator.deps import Deps
from state import money, ranking
from state.job import GpuNeeds, JobRequest
from state.offer import Offer
from state.ranking import Expectation
from tasks import search

#: Bytes of a dataset that nobody has named.
DATASET_BYTES = 50_000_000
_DEFAULT = GpuNeeds()


class OffersQuery(BaseModel):
    """What a machine must have; and for which training its cost is reckoned."""

    model_config = ConfigDict(extra="forbid")

    gpu: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._-]{1,40}$")]],
        Field(max_length=20, description="names of GPUs, as the market has them; any, if none"),
    ] = []
    min_vram_gb: Annotated[float, Field(ge=1, le=1000)] | None = Field(
        default=None, description="what the family's training takes, if left out"
    )
    disk_gb: Annotated[float, Field(ge=10, le=2000)] | None = None
    max_price: Annotated[int, Field(ge=1, le=100_000_000, description="micro-USD per hour")] = (
        _DEFAULT.max_price
    )
    min_reliability: Annotated[float, Field(ge=0, le=1)] = _DEFAULT.min_reliability
    min_download_mbps: Annotated[float, Field(ge=0, le=100_000)] = _DEFAULT.min_download_mbps
    verified_only: bool = _DEFAULT.verified_only
    min_cuda: Annotated[float, Field(ge=0, le=100)] = _DEFAULT.min_cuda
    interruptible: bool = Field(default=False, description="also what can be bid for")
    family: Family = Field(
        default="sd1", description="a LoRA of this family with the default recipe is reckoned with"
    )
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class MarketOffer(Out):
    """Something that can be rented now. Money is micro-USD, time is seconds."""

    id: str
    machine_id: str
    gpu: str
    geo: str
    vram_gb: float
    price_per_hour: MicroUsd
    by_bid: bool
    download_mbps: float
    reliability: float
    verdict: Literal["fit", "refused"]
    why: str = Field(description="why no job would take it; empty when one would")
    expected_cost: MicroUsd | None = Field(
        default=None, description="of the finished job; null when refused, as are those below"
    )
    boot_s: float | None = None
    download_s: float | None = None
    training_s: float | None = None
    chance: float | None = Field(
        default=None, description="that it sees the job through; 1 is certain"
    )
    display: str = Field(default="", description="expected_cost, for people")


class Offers(Out):
    data: list[MarketOffer] = Field(description="in the order in which a job would take them")
    fit: int
    refused: dict[str, int] = Field(description="how many, by reason")
    sentence: str = Field(description="why the first is the first")
    read_at: datetime


def offers(deps: Deps, query: OffersQuery) -> Offers:
    """What the market offers for these needs, with the ranking's verdicts.

    Raises:
        Refusal: 503, when there is no market.
        ProviderError: it cannot be asked.
    """
    now, provider = deps.clock(), market(deps)
    request = _request(query)
    work = search.workload(request, DATASET_BYTES, deps.settings.image_bytes)
    with deps.store.transaction() as tx:
        hosts = tx.hosts()
    found = search.offers(provider, request)
    choice = ranking.choose(found, work, hosts=hosts, now=now)
    fit = [_fit(offer, expected) for offer, expected in choice.ranked]
    barred = [_offer(offer, "refused", why) for offer, why in choice.barred]
    return Offers(
        data=[*fit, *barred][: query.limit],
        fit=len(fit),
        refused=dict(choice.refused),
        sentence=choice.explain() if found else "the market has nothing that meets these needs",
        read_at=now,
    )


def _request(query: OffersQuery) -> JobRequest:
    recipe = Recipe()
    gpu = GpuNeeds(
        min_vram_gb=query.min_vram_gb or needs.least(recipe, query.family),
        gpu_names=tuple(query.gpu),
        disk_gb=query.disk_gb or max(_DEFAULT.disk_gb, needs.disk(query.family)),
        max_price=query.max_price,
        min_reliability=query.min_reliability,
        min_download_mbps=query.min_download_mbps,
        verified_only=query.verified_only,
        min_cuda=query.min_cuda,
    )
    return JobRequest(
        dataset_id="",
        base="",
        base_family=query.family,
        recipe=recipe.to_dict(),
        gpu=gpu,
        interruptible=query.interruptible,
    )


def _fit(offer: Offer, expected: Expectation) -> MarketOffer:
    cost = round(expected.cost)
    return _offer(offer, "fit", "").model_copy(
        update={
            "expected_cost": cost,
            "boot_s": round(expected.boot_s, 1),
            "download_s": round(expected.download_s, 1),
            "training_s": round(expected.training_s, 1),
            "chance": round(expected.chance, 3),
            "display": money.dollars(cost),
        }
    )


def _offer(offer: Offer, verdict: Literal["fit", "refused"], why: str) -> MarketOffer:
    return MarketOffer(
        id=offer.id,
        machine_id=offer.machine_id,
        gpu=offer.gpu_name,
        geo=offer.geo,
        vram_gb=offer.vram_gb,
        price_per_hour=offer.price,
        by_bid=bool(offer.bid),
        download_mbps=offer.download_mbps,
        reliability=offer.reliability,
        verdict=verdict,
        why=why,
    )


def register(api: APIBlueprint, deps: Deps) -> None:
    """Put the route into `api`."""

    @api.get("/offers", operation_id="list_offers", responses={"200": Offers})
    def list_offers(query: OffersQuery) -> Response:
        """What the market has now, in the order in which a job would take it"""
        return present.answer(offers(deps, query))
