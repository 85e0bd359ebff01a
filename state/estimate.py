"""What a training would cost and take, reckoned before anything is rented.

It reads the same ranking that renting reads, so the first candidate is the offer that would be
rented now. Values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from gpu_agent import needs
from gpu_agent.recipe import Recipe
from state import money, policy, ranking
from state.events import HostRecord
from state.job import GpuNeeds, JobRequest, Reason
from state.money import dollars
from state.offer import Offer
from state.policy import Policy
from state.ranking import Choice, Expectation, Knowledge, Workload

#: So many of the best offers are shown; others may take the first before we do.
SHOWN = 5
#: How much slower than guessed a GPU may be of which nothing was measured yet.
UNMEASURED = 1.5


@dataclass(frozen=True, kw_only=True)
class Range:
    """`low`: nothing goes wrong. `likely`: what is expected, lost attempts and all. `high`: the
    dearest of the offers shown, all attempts but the last lost, and slower than guessed."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    offer: Offer
    expected: Expectation
    #: Whether this GPU's speed was measured here before.
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Cap:
    """Whether the order's cap pays for the likely course of things, and in words."""

    amount: int
    suffices: bool
    words: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """GB: what the training takes at least, with what it runs at full speed, its disk."""

    least_gb: float
    full_speed_gb: float
    disk_gb: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Prices in micro-USD, times in seconds.

    Attributes:
        price, seconds: None where no offer fits now.
        fit: how many offers do.
        refused: offers by the reason against them.
        nothing: why no offer fits, in words; empty where one does.
        brakes: what would hold the job now.
        assumed: what nobody knows yet and is guessed, in words.
    """

    price: Range | None
    seconds: Range | None
    candidates: tuple[Candidate, ...]
    fit: int
    refused: Mapping[str, int]
    nothing: str
    cap: Cap
    memory: Memory
    brakes: tuple[Reason, ...]
    assumed: tuple[str, ...]

    @property
    def sentences(self) -> list[str]:
        """For people."""
        return [*_of_price(self), *_of_offers(self), *_of_what_holds(self)]


def estimate(
    request: JobRequest,
    work: Workload,
    choice: Choice,
    hosts: Iterable[HostRecord],
    *,
    brakes: Sequence[Reason] = (),
    refused: Mapping[str, int] | None = None,
    nothing: str = "",
    assumed: Sequence[str] = (),
    rules: Policy = policy.DEFAULT,
) -> Estimate:
    """What `request`, which is `work`, comes to with the offers in `choice`.

    `refused` are more offers by the reason against them, `nothing` says why there is none.
    """
    known = Knowledge.of(hosts)
    shown = tuple(
        Candidate(offer=offer, expected=expected, measured=_measured(offer, known))
        for offer, expected in choice.ranked[:SHOWN]
    )
    price = _price(shown, request) if shown else None
    guessed = (*assumed, *_assumed(request, work, shown))
    return Estimate(
        price=price,
        seconds=_seconds(shown, request) if shown else None,
        candidates=shown,
        fit=len(choice.ranked),
        refused={**choice.refused, **(refused or {})},
        nothing="" if shown else nothing or choice.explain(),
        cap=_cap(request, work, shown, price, rules),
        memory=memory(request),
        brakes=tuple(brakes),
        assumed=guessed,
    )


def memory(request: JobRequest) -> Memory:
    """Raises: RecipeError."""
    recipe = Recipe.from_dict(request.recipe, request.base_family)
    rungs = needs.rungs(recipe, request.base_family)
    return Memory(
        least_gb=rungs[0][0],
        full_speed_gb=rungs[-1][0],
        disk_gb=max(request.gpu.disk_gb, needs.disk(request.base_family)),
    )


def _measured(offer: Offer, known: Knowledge) -> bool:
    return offer.gpu_name in known.speeds


def _slower(candidate: Candidate) -> float:
    return 1.0 if candidate.measured else UNMEASURED


def _price(shown: Sequence[Candidate], request: JobRequest) -> Range:
    lost = request.max_attempts - 1
    high = 0.0
    for one in shown:
        expected = one.expected
        longer = (_slower(one) - 1) * expected.training_s / 3600 * one.offer.price
        high = max(high, expected.once + longer + lost * expected.again)
    first = shown[0].expected
    # No job costs more than its cap, whatever happens.
    top = max(min(high, request.max_cost), first.cost)
    return Range(low=min(one.expected.once for one in shown), likely=first.cost, high=top)


def _seconds(shown: Sequence[Candidate], request: JobRequest) -> Range:
    lost = request.max_attempts - 1
    high = max(
        one.expected.once_s
        + (_slower(one) - 1) * one.expected.training_s
        + lost * one.expected.again_s
        for one in shown
    )
    first = shown[0].expected
    return Range(
        low=min(one.expected.once_s for one in shown),
        likely=first.once_s + first.lost * first.again_s,
        high=high,
    )


def _cap(
    request: JobRequest,
    work: Workload,
    shown: Sequence[Candidate],
    price: Range | None,
    rules: Policy,
) -> Cap:
    cap = request.max_cost
    if not shown or price is None:
        return Cap(amount=cap, suffices=True, words="nobody knows without an offer")
    first = shown[0]
    moved = ranking.bandwidth(first.offer, work)
    pays = money.span(first.offer.price, moved, cap, (), timedelta(0), rules)
    if pays < money.LEAST_SPAN:
        words = f"{dollars(cap)} pay a {first.offer.gpu_name} for {policy.words(pays)}: too little"
        return Cap(amount=cap, suffices=False, words=f"{words} to rent it at all")
    if cap < price.likely:
        likely = dollars(round(price.likely))
        words = f"{dollars(cap)} are less than the {likely} that it is expected to cost"
        return Cap(amount=cap, suffices=False, words=words)
    if timedelta(seconds=first.expected.once_s) > pays:
        words = f"no machine is held longer than {policy.words(pays)}, and this would take longer"
        return Cap(amount=cap, suffices=False, words=words)
    return Cap(amount=cap, suffices=True, words=f"{dollars(cap)} suffice")


def _assumed(request: JobRequest, work: Workload, shown: Sequence[Candidate]) -> Iterable[str]:
    yield f"the base model is taken to have {work.base_bytes / 1e9:.1f} GB, as its family has"
    if shown and not shown[0].measured:
        name = shown[0].offer.gpu_name
        yield f"no {name} trained here yet: its speed is a guess, and may be off by half"
    if Recipe.from_dict(request.recipe, request.base_family).patience:
        yield "the training may end before its last step, when it no longer gets better"


# --- in words ---------------------------------------------------------------------------------


def _of_price(what: Estimate) -> Iterable[str]:
    if what.price is None or what.seconds is None:
        return
    low, likely, high = (
        dollars(round(value)) for value in (what.price.low, what.price.likely, what.price.high)
    )
    yield f"It is expected to cost {likely}, between {low} and {high}."
    spans = (what.seconds.low, what.seconds.likely, what.seconds.high)
    short, usual, long = (policy.words(timedelta(seconds=value)) for value in spans)
    yield f"It is expected to take {usual}, between {short} and {long}."


def _of_offers(what: Estimate) -> Iterable[str]:
    if what.candidates:
        first = what.candidates[0]
        how = "by bid" if first.offer.bid else "on demand"
        where = f" in {first.offer.geo}" if first.offer.geo else ""
        yield (
            f"Now it would get a {first.offer.gpu_name}{where} {how} at "
            f"{dollars(first.offer.price)}/h; {what.fit} offers fit."
        )
    else:
        yield f"No offer fits now: {what.nothing}."
    if what.refused:
        counted = sorted(what.refused.items(), key=lambda item: (-item[1], item[0]))
        yield "Offers refused: " + ", ".join(f"{count} {why}" for why, count in counted) + "."


def _of_what_holds(what: Estimate) -> Iterable[str]:
    if not what.cap.suffices:
        yield f"The cap is too low: {what.cap.words}."
    for reason in what.brakes:
        yield f"It would wait: {reason.message}."


#: What a wider search asks for, to say what of the needs stands in the way.
WIDEST = GpuNeeds(
    min_vram_gb=0,
    disk_gb=10,
    max_price=1_000_000_000,
    min_reliability=0,
    min_download_mbps=0,
    verified_only=False,
    min_cuda=0,
)
