"""What to do when: deadlines, retries, budgets, and which offer to take.

Values in, decisions out: nothing here reads a clock, a database or a market.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gpu_agent.wire import Fact, Recipe
from state.events import HostRecord
from state.job import GpuNeeds, Job, JobRequest, Reason, Status
from state.lease import Lease, LeaseStatus
from state.machine import Move
from state.offer import Offer

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers that an operator may turn.

    Attributes:
        deadlines: how long a job may stay in each state.
        silence: an agent unheard for so long has stalled (it reports at least every 10 s).
        retry_delays: pause before the second, third … attempt; the last one repeats.
        offer_pause: before looking for offers again when there was none.
        settle: how long a create call without an answer may take to show in the list.
        progress_pause: at most one `job.progress` webhook in this time.
    """

    deadlines: Mapping[Status, timedelta] = field(
        default_factory=lambda: {
            Status.PENDING: timedelta(hours=24),
            Status.PENDING_GPU: timedelta(minutes=20),
            Status.PENDING_IMAGES: timedelta(minutes=30),
            Status.PENDING_MODEL: timedelta(minutes=60),
            Status.TRAINING: timedelta(hours=12),
        }
    )
    silence: timedelta = timedelta(seconds=45)
    retry_delays: tuple[timedelta, ...] = (timedelta(seconds=5), timedelta(minutes=1))
    offer_pause: timedelta = timedelta(seconds=15)
    settle: timedelta = timedelta(seconds=60)
    lease: timedelta = timedelta(hours=12)
    progress_pause: timedelta = timedelta(seconds=5)
    host_penalty: timedelta = timedelta(hours=24)


DEFAULT = Policy()
#: Processes give a sign of life at least so often; a longer gap is a break.
LIFE_GAP = timedelta(seconds=20)
#: `since` for those who know of no time at which nobody listened.
ALWAYS = datetime.min.replace(tzinfo=UTC)


# --- the next step of a job -------------------------------------------------------------------


class Step(enum.Enum):
    """What a job that is due needs now."""

    WAIT = "wait"
    ALLOCATE = "allocate"
    VERIFY = "verify"
    STALL = "stall"
    RETRY = "retry"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`at` is when to look again; `reason` comes with `STALL`."""

    step: Step
    at: datetime | None = None
    reason: Reason | None = None


def decide(
    job: Job, now: datetime, policy: Policy = DEFAULT, *, since: datetime = ALWAYS
) -> Decision:
    """The one step that `job` needs at `now`.

    `since` is how long agents could be heard without a break: an agent that spoke to a server
    that was down has not been silent.
    """
    if job.terminal:
        return Decision(step=Step.WAIT)
    if job.status is Status.STALLED:
        if job.retry_at is not None and now >= job.retry_at:
            return Decision(step=Step.RETRY)
        return Decision(step=Step.WAIT, at=job.retry_at)
    if job.deadline_at is not None and now >= job.deadline_at:
        return Decision(step=Step.STALL, reason=_overdue(job, policy))
    silent_at = silent_from(job, policy, since)
    if silent_at is not None and now >= silent_at:
        message = f"the agent was not heard for {_words(policy.silence)}"
        return Decision(step=Step.STALL, reason=Reason(code="agent.silent", message=message))
    if job.status is Status.PENDING_GPU and job.last_heard_at is None:
        return Decision(step=Step.ALLOCATE)
    if to_verify(job):
        return Decision(step=Step.VERIFY)
    return Decision(step=Step.WAIT, at=next_look(job, policy, since))


def to_verify(job: Job) -> bool:
    """Whether uploaded weights wait for the server to read them back."""
    return (
        job.status is Status.TRAINING
        and Fact.WEIGHTS_UPLOADED in job.known
        and Move.WEIGHTS_VERIFIED not in job.known
    )


def silent_from(job: Job, policy: Policy = DEFAULT, since: datetime = ALWAYS) -> datetime | None:
    """When the agent counts as silent; never while the server itself verifies its upload."""
    if not job.active or job.last_heard_at is None or to_verify(job):
        return None
    return max(job.last_heard_at, since) + policy.silence


def listening_since(heard: tuple[datetime, Mapping[str, Any]] | None, now: datetime) -> datetime:
    """Since when reports could come in without a break, by the receivers' latest sign of life.

    Without a fresh one nobody listens, and silence means nothing: the answer is `now`.
    """
    if heard is None or now - heard[0] > LIFE_GAP:
        return now
    return datetime.fromisoformat(heard[1]["since"])


def sign_of_life(
    heard: tuple[datetime, Mapping[str, Any]] | None, now: datetime
) -> Mapping[str, Any]:
    """What a process that lives at `now` writes beside the time: since when, without a break."""
    return {"since": min(now, listening_since(heard, now)).isoformat()}


def next_look(job: Job, policy: Policy = DEFAULT, since: datetime = ALWAYS) -> datetime | None:
    """When somebody must look at `job` again if nothing is heard of it."""
    if job.terminal:
        return None
    if job.status is Status.STALLED:
        return job.retry_at
    silent_at = silent_from(job, policy, since)
    times = [at for at in (job.deadline_at, silent_at) if at is not None]
    return min(times, default=None)


def _overdue(job: Job, policy: Policy) -> Reason:
    allowed = _words(policy.deadlines[job.status])
    explained = job.progress.get("gpu_search")
    why = f": {explained}" if job.status is Status.PENDING_GPU and explained else ""
    return Reason(
        code=f"{job.status}.timeout",
        message=f"still {job.status} after {allowed}{why}",
        # A dataset that never came cannot be helped by another machine.
        retryable=job.status is not Status.PENDING,
    )


def _words(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"


def retry_at(job: Job, reason: Reason, now: datetime, policy: Policy = DEFAULT) -> datetime | None:
    """When the next attempt comes after `reason`; None when there will be none."""
    if not reason.retryable or not job.dataset_ready or job.attempt >= job.request.max_attempts:
        return None
    delays = policy.retry_delays
    return now + delays[min(job.attempt, len(delays)) - 1]


# --- money ------------------------------------------------------------------------------------


def cost(lease: Lease, now: datetime) -> int:
    """Micro-USD that a lease has cost until `now`, by its offered price.

    Counted from the answer to the create call until the instance was seen gone; what the market
    does not bill (loading is free on Vast.ai) makes the true figure smaller, never larger.
    """
    if lease.rented_at is None:
        return 0
    end = lease.released_at or now
    return round(lease.price * max(0.0, (end - lease.rented_at).total_seconds()) / 3600)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Micro-USD; a limit of 0 is none. `reserved` is what open leases may still cost."""

    per_hour: int = 0
    per_day: int = 0
    spent_hour: int = 0
    spent_day: int = 0
    reserved: int = 0


def over_budget(job: Job, spent: int, price: int, hours: float, budget: Budget) -> Reason | None:
    """Why `price` per hour for `hours` may not be rented for `job`, or None when it may."""
    coming = round(price * hours)
    if spent >= job.request.max_cost:
        return Reason(
            code="budget.job",
            message=f"the job has cost {dollars(spent)} of at most {dollars(job.request.max_cost)}",
            retryable=False,
        )
    for name, limit, used in (
        ("hour", budget.per_hour, budget.spent_hour),
        ("day", budget.per_day, budget.spent_day),
    ):
        if limit and used + budget.reserved + coming > limit:
            return Reason(
                code=f"budget.{name}",
                message=f"{dollars(used)} spent and {dollars(budget.reserved)} reserved of "
                f"{dollars(limit)} per {name}",
            )
    return None


def lease_hours(job: Job, spent: int, price: int, policy: Policy = DEFAULT) -> float:
    """How long a machine at `price` may be held: the policy's span, or what the cap still pays."""
    allowed = policy.lease.total_seconds() / 3600
    return min(allowed, max(0, job.request.max_cost - spent) / price) if price else allowed


def dollars(micro: int) -> str:
    """Micro-USD for people."""
    return f"${micro / 1_000_000:.4f}" if abs(micro) < 1_000_000 else f"${micro / 1_000_000:.2f}"


# --- offers -----------------------------------------------------------------------------------

#: How fast each GPU trains SD 1.x at 512 px beside an RTX 4090. Guesses, not measurements: only the
#: order of offers depends on them.
GPU_SPEED: dict[str, float] = {
    "RTX 3060": 0.30,
    "RTX 3090": 0.55,
    "RTX 4090": 1.00,
    "RTX 5090": 1.35,
    "RTX A5000": 0.50,
    "RTX A6000": 0.60,
    "L40S": 1.05,
    "A100 SXM4": 1.15,
    "A100 PCIE": 1.05,
    "H100 SXM": 1.90,
    "H100 PCIE": 1.50,
}
UNKNOWN_GPU_SPEED = 0.3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a job will do on whatever machine it gets. Bytes, and seconds on an RTX 4090.

    The defaults are guesses for SD 1.x; they decide the order of offers and nothing else.
    """

    image_bytes: int = 4_000_000_000
    base_bytes: int = 2_200_000_000
    dataset_bytes: int = 50_000_000
    output_bytes: int = 200_000_000
    training_s: float = 900.0
    boot_s: float = 120.0


#: Guessed seconds on an RTX 4090 for one image of 512 px, forward and back.
SECONDS_PER_IMAGE = 0.15
#: Guessed seconds for loading, caching, validating and uploading.
SECONDS_AROUND = 120.0


def workload(request: JobRequest, dataset_bytes: int) -> Workload:
    """What `request` will do: its steps, batch and resolution decide how long it trains.

    Raises: RecipeError, when the recipe cannot be trained.
    """
    recipe = Recipe.from_dict(request.recipe)
    images = recipe.steps * recipe.batch_size * recipe.gradient_accumulation
    seconds = images * SECONDS_PER_IMAGE * (recipe.resolution / 512) ** 2
    return Workload(dataset_bytes=dataset_bytes, training_s=SECONDS_AROUND + seconds)


def expected_cost(offer: Offer, work: Workload, host: HostRecord | None = None) -> float:
    """Micro-USD for a *finished* job on `offer`.

    Time is boot, download (at the smaller of what is promised and what we measured) and training
    at the GPU's speed; money is that time at the hourly price plus bandwidth; the whole is divided
    by the chance that the machine sees it through (its reliability, lowered by our own record
    with one good and one bad outcome assumed beforehand).
    """
    incoming = work.image_bytes + work.base_bytes + work.dataset_bytes
    promised = offer.download_mbps or 1.0
    rate = min(promised, host.download_mbps) if host and host.download_mbps else promised
    download_s = incoming * 8 / (rate * 1e6)
    speed = GPU_SPEED.get(offer.gpu_name, UNKNOWN_GPU_SPEED)
    boot_s = host.boot_s if host and host.boot_s else work.boot_s
    hours = (boot_s + download_s + work.training_s / speed) / 3600
    money = (
        hours * offer.price
        + incoming / 1e9 * offer.download_price
        + work.output_bytes / 1e9 * offer.upload_price
    )
    chance = max(0.05, offer.reliability)
    if host:
        chance *= (host.good + 1) / (host.good + host.bad + 1)
    return money / chance


def rank(
    offers: Sequence[Offer],
    work: Workload,
    *,
    excluded: Sequence[str] = (),
    hosts: Mapping[str, HostRecord] | None = None,
    now: datetime | None = None,
    policy: Policy = DEFAULT,
) -> list[Offer]:
    """`offers` by expected cost of the finished job, without excluded and just-failed machines."""
    hosts = hosts or {}

    def usable(offer: Offer) -> bool:
        if offer.machine_id in excluded:
            return False
        record = hosts.get(offer.machine_id)
        if record is None or record.last_failed_at is None or now is None:
            return True
        return record.good > record.bad or now - record.last_failed_at > policy.host_penalty

    kept = [offer for offer in offers if usable(offer)]
    return sorted(
        kept, key=lambda offer: (expected_cost(offer, work, hosts.get(offer.machine_id)), offer.id)
    )


def unmet(offer: Offer, needs: GpuNeeds) -> str | None:
    """The first need that `offer` does not meet, in words; None when it meets all."""
    checks = (
        (not needs.gpu_names or offer.gpu_name in needs.gpu_names, "GPU name"),
        (offer.vram_gb >= needs.min_vram_gb, "VRAM"),
        (offer.disk_gb >= needs.disk_gb, "disk"),
        (offer.price <= needs.max_price, "price"),
        (offer.reliability >= needs.min_reliability, "reliability"),
        (offer.download_mbps >= needs.min_download_mbps, "download rate"),
        (offer.verified or not needs.verified_only, "verification"),
        (offer.cuda >= needs.min_cuda, "CUDA version"),
    )
    return next((name for met, name in checks if not met), None)


# --- leases -----------------------------------------------------------------------------------


def release_pause(tries: int) -> timedelta:
    """Pause before the next look at a lease that is being released: 1, 2, 4 … 60 s, for ever."""
    return timedelta(seconds=min(60, 2 ** min(tries, 6)))


def settled(lease: Lease, now: datetime, policy: Policy = DEFAULT) -> bool:
    """Whether a lease is so old that lists without its instance prove that there is none."""
    return now - lease.created_at >= policy.settle


def wants_release(lease: Lease, job: Job | None, now: datetime) -> str | None:
    """Why this lease must go now, or None while it may stay."""
    if lease.status in (LeaseStatus.RELEASING, LeaseStatus.RELEASED):
        return None
    if job is None:
        return "its job is unknown"
    if now >= lease.expires_at:
        return "its lease ended"
    if job.terminal or job.status is Status.STALLED:
        return f"its job is {job.status}"
    if lease.attempt != job.attempt:
        return f"its job is at attempt {job.attempt}"
    return None
