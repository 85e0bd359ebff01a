"""Which offer a job takes: the one on which the *finished* job is expected to cost least.

What we measured goes before what is promised, what is promised before our guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import fmean

from gpu_agent import needs
from gpu_agent.recipe import Recipe
from state import hosts as memory
from state import policy
from state.events import HostRecord
from state.job import GpuNeeds, JobRequest
from state.money import dollars
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
#: GB of memory by GPU, as the market counts them; a customer may ask for a GPU by name.
GPU_MEMORY: dict[str, float] = {
    "RTX 3060": 12.288,
    "RTX 3090": 24.576,
    "RTX 4090": 24.564,
    "RTX 5090": 32.607,
    "RTX A5000": 24.564,
    "RTX A6000": 49.14,
    "L40S": 46.068,
    "A100 SXM4": 81.92,
    "A100 PCIE": 81.92,
    "H100 SXM": 81.559,
    "H100 PCIE": 81.559,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a job will do on whatever machine it gets. Bytes, and seconds on an RTX 4090.

    The defaults are guesses for SD 1.x; they decide the order of offers, and what is estimated.
    """

    image_bytes: int = 4_000_000_000
    base_bytes: int = 2_200_000_000
    dataset_bytes: int = 50_000_000
    output_bytes: int = 200_000_000
    training_s: float = 900.0
    boot_s: float = 120.0
    #: What is lost of the training when a machine goes, at most.
    checkpoint_s: float = 120.0
    #: How much slower it trains on less memory than it could use: (GB, factor), most memory last.
    rungs: tuple[tuple[float, float], ...] = ()

    def slowness(self, vram_gb: float) -> float:
        """That of the highest rung that a GPU of so many GB reaches."""
        return next((slow for least, slow in reversed(self.rungs) if least <= vram_gb), 1.0)


#: Guessed seconds on an RTX 4090 for one image of 512 px in SD 1.x, forward and back.
SECONDS_PER_IMAGE = 0.15
#: Guessed seconds for loading, caching, validating and uploading.
SECONDS_AROUND = 120.0


def workload(request: JobRequest, dataset_bytes: int) -> Workload:
    """What `request` will do: its steps, batch and resolution decide how long it trains.

    Raises: RecipeError, when the recipe cannot be trained.
    """
    recipe = Recipe.from_dict(request.recipe, request.base_family)
    images = recipe.steps * memory.size_of_step(request)
    training_s = SECONDS_AROUND + images * SECONDS_PER_IMAGE
    return Workload(
        base_bytes=round(needs.base_gb(request.base_family) * 1e9),
        dataset_bytes=dataset_bytes,
        training_s=training_s,
        checkpoint_s=min(training_s, recipe.checkpoint_s or training_s),
        rungs=needs.rungs(recipe, request.base_family),
    )


def traffic(work: Workload) -> tuple[int, int]:
    """Bytes that a machine is expected to receive, and to send."""
    return work.image_bytes + work.base_bytes + work.dataset_bytes, work.output_bytes


def bandwidth(offer: Offer, work: Workload) -> int:
    """Micro-USD that those bytes cost on `offer`."""
    received, sent = traffic(work)
    return round((received * offer.download_price + sent * offer.upload_price) / 1e9)


#: A bid is lost so often per hour. A guess: a public test of five runs lost four, each in hours.
INTERRUPTIONS_PER_HOUR = 0.3
#: Never less than this chance, or the expected number of tries has no end.
LEAST_CHANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What is known of hosts, for ranking: their records, and how fast each GPU was seen to be.

    Attributes:
        speeds: by GPU model, beside an RTX 4090 that trains as fast as we guess.
        usual: how fast GPUs are beside our table, where only others of them were seen.
    """

    hosts: Mapping[str, HostRecord] = field(default_factory=dict)
    speeds: Mapping[str, float] = field(default_factory=dict)
    usual: float = 1.0

    @classmethod
    def of(cls, hosts: Iterable[HostRecord]) -> Knowledge:
        known = {host.machine_id: host for host in hosts}
        seen: dict[str, list[float]] = {}
        for host in known.values():
            if host.steps_per_s and host.gpu_name:
                seen.setdefault(host.gpu_name, []).append(host.steps_per_s * SECONDS_PER_IMAGE)
        speeds = {name: fmean(values) for name, values in seen.items()}
        ratios = [speed / _tabulated(name) for name, speed in speeds.items()]
        return cls(hosts=known, speeds=speeds, usual=fmean(ratios) if ratios else 1.0)

    def speed(self, offer: Offer) -> float:
        """Of the machine itself, else of others with its GPU, else by the table."""
        host = self.hosts.get(offer.machine_id)
        if host and host.steps_per_s and host.gpu_name == offer.gpu_name:
            return host.steps_per_s * SECONDS_PER_IMAGE
        return self.speeds.get(offer.gpu_name) or self.usual * _tabulated(offer.gpu_name)

    def download_mbps(self, offer: Offer) -> float:
        """The smaller of what is promised and what we saw."""
        host, promised = self.hosts.get(offer.machine_id), offer.download_mbps or 1.0
        return min(promised, host.download_mbps) if host and host.download_mbps else promised


def _tabulated(gpu_name: str) -> float:
    return GPU_SPEED.get(gpu_name, UNKNOWN_GPU_SPEED)


def boot_s(work: Workload, host: HostRecord | None = None) -> float:
    """Seconds from the create call to the agent's hello: this machine's own, or a guess."""
    return host.boot_s if host and host.boot_s else work.boot_s


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a finished job on an offer comes to: seconds, micro-USD.

    Attributes:
        chance: that the machine sees it through.
        lost: how many attempts are lost until one does, on the average.
        once, once_s: what it costs and takes if none is lost.
        again, again_s: what each lost one adds.
        cost: what is expected, lost attempts and all.
    """

    boot_s: float
    download_s: float
    training_s: float
    chance: float
    lost: float
    once: float
    again: float
    again_s: float
    cost: float

    @property
    def once_s(self) -> float:
        return self.boot_s + self.download_s + self.training_s


def expect(
    offer: Offer, work: Workload, known: Knowledge, now: datetime | None = None
) -> Expectation:
    """Time is boot, download and training; money is that time at the hourly price, plus bandwidth.
    Each attempt that is lost on the way costs its boot, its downloads and at most what was
    trained since the last checkpoint once more. Attempts are lost by hosts that fail (by their
    reliability and their record with us) and, for a bid, by higher ones.
    """
    host = known.hosts.get(offer.machine_id)
    incoming, _ = traffic(work)
    boot, download_s = boot_s(work, host), incoming * 8 / (known.download_mbps(offer) * 1e6)
    speed = known.speed(offer)
    training_s = work.training_s * work.slowness(offer.vram_gb) / speed
    hours = (boot + download_s + training_s) / 3600
    pulled = incoming / 1e9 * offer.download_price
    once = hours * offer.price + pulled + work.output_bytes / 1e9 * offer.upload_price
    again_s = boot + download_s + min(work.checkpoint_s, training_s)
    again = again_s / 3600 * offer.price + pulled
    chance = max(LEAST_CHANCE, offer.reliability * memory.standing(host, now).chance)
    lost = (1 - chance) / chance + (INTERRUPTIONS_PER_HOUR * hours if offer.bid else 0.0)
    return Expectation(
        boot_s=boot,
        download_s=download_s,
        training_s=training_s,
        chance=chance,
        lost=lost,
        once=once,
        again=again,
        again_s=again_s,
        cost=once + lost * again,
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Offers by the expected cost of the finished job, cheapest first, and why others are none:
    each with its reason (`barred`), and how many by reason."""

    ranked: tuple[tuple[Offer, Expectation], ...] = ()
    barred: tuple[tuple[Offer, str], ...] = ()

    @property
    def refused(self) -> Mapping[str, int]:
        return dict(Counter(reason for _, reason in self.barred))

    @property
    def offers(self) -> list[Offer]:
        return [offer for offer, _ in self.ranked]

    def expected(self, taken: Offer) -> Expectation:
        """What was reckoned of a ranked offer. Raises: LookupError."""
        found = next((expected for offer, expected in self.ranked if offer.id == taken.id), None)
        if found is None:
            raise LookupError(f"offer {taken.id} is not ranked")
        return found

    def explain(self, taken: Offer | None = None) -> str:
        """Why this offer (the first, if none is named), beside the next one; why not the others."""
        rows = [row for row in self.ranked if taken is None or row[0].id == taken.id]
        words = ["no offer is fit" if not rows else _because(*rows[0])]
        after = next((row for row in self.ranked if rows and row[0].id != rows[0][0].id), None)
        if after is not None:
            offer, expected = after
            next_best = f"{offer.gpu_name} on {offer.machine_id}"
            words.append(f"the next is {next_best} at {dollars(round(expected.cost))}")
        if self.refused:
            counted = sorted(self.refused.items(), key=lambda item: (-item[1], item[0]))
            refused = ", ".join(f"{number} {reason}" for reason, number in counted)
            words.append(f"refused: {refused}")
        return "; ".join(words)


def _because(offer: Offer, expected: Expectation) -> str:
    how = "by bid" if offer.bid else "on demand"
    times = (
        f"boot {expected.boot_s:.0f} s, download {expected.download_s:.0f} s, "
        f"training {expected.training_s:.0f} s"
    )
    return (
        f"{offer.gpu_name} on {offer.machine_id} {how} at {dollars(offer.price)}/h: the finished "
        f"job is expected to cost {dollars(round(expected.cost))} ({times}, "
        f"{100 * expected.chance:.0f} % sure)"
    )


def choose(
    offers: Sequence[Offer],
    work: Workload,
    *,
    excluded: Collection[str] = (),
    given_up: Collection[str] = (),
    hosts: Iterable[HostRecord] = (),
    now: datetime,
    waited: timedelta = timedelta(),
    rules: Policy = policy.DEFAULT,
) -> Choice:
    """Which of `offers` a job that has `waited` may take, in which order. `excluded` are machines
    that failed it before, or that it has already; those that it has `given_up` before they
    were ready come last. Where nothing else is left, machines that failed others lately are better
    than none."""
    known = Knowledge.of(hosts)
    ranked: list[tuple[Offer, Expectation]] = []
    doubtful: list[tuple[Offer, Expectation]] = []
    barred: list[tuple[Offer, str]] = []
    for offer in offers:
        expected = expect(offer, work, known, now)
        shunned = memory.shunned(known.hosts.get(offer.machine_id), now, rules)
        if offer.machine_id in excluded:
            barred.append((offer, "failed this job before, or tried for it now"))
        elif shunned and shunned != memory.FAILED_LATELY:
            barred.append((offer, shunned))
        elif offer.duration_s and offer.duration_s < ENDS_TOO_SOON * expected.once_s:
            barred.append((offer, "ending before the job would"))
        else:
            (doubtful if shunned else ranked).append((offer, expected))
    if not ranked and waited >= rules.last_resort:
        ranked = doubtful
    else:
        barred += [(offer, memory.FAILED_LATELY) for offer, _ in doubtful]
    ranked.sort(key=lambda row: (row[0].machine_id in given_up, row[1].cost, row[0].id))
    return Choice(ranked=tuple(ranked), barred=tuple(barred))


#: A contract must last so many times longer than the job is expected to.
ENDS_TOO_SOON = 1.5


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
