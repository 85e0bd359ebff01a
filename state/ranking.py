"""Which offer a job takes: the one on which the *finished* job costs least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from gpu_agent.wire import Recipe
from state import policy
from state.events import HostRecord
from state.job import GpuNeeds, JobRequest
from state.offer import Offer
from state.policy import Policy

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


def boot_s(work: Workload, host: HostRecord | None = None) -> float:
    """Seconds from the create call to the agent's hello: this machine's own, or a guess."""
    return host.boot_s if host and host.boot_s else work.boot_s


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
    hours = (boot_s(work, host) + download_s + work.training_s / speed) / 3600
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
    rules: Policy = policy.DEFAULT,
) -> list[Offer]:
    """`offers` by expected cost of the finished job, without excluded and just-failed machines."""
    hosts = hosts or {}

    def usable(offer: Offer) -> bool:
        if offer.machine_id in excluded:
            return False
        record = hosts.get(offer.machine_id)
        if record is None or record.last_failed_at is None or now is None:
            return True
        return record.good > record.bad or now - record.last_failed_at > rules.host_penalty

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
