"""The market in memory, made as bad as the profile says, with a ledger of what was true."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from random import Random

from infra.provider import Instance, LaunchSpec
from infra.provider_memory import Fault, MemoryProvider, Rental
from orchestrator.sim.invariants import Checker
from orchestrator.sim.kernel import Kernel
from state.errors import OfferGone, ProviderError, Refused, Throttled, Unknown, Unreadable
from state.job import GpuNeeds
from state.offer import Offer

#: Labels of somebody else on the same account.
FOREIGN = ("somebody-else/job-7", "stoker-dev-not-ours", "")
#: How long each call takes (seconds, at least and at most).
LASTS = {"create": (0.5, 4.0), "instances": (0.1, 0.8), "offers": (0.1, 0.8), "destroy": (0.1, 1.0)}
READS = frozenset({"offers", "instances", "instance", "account", "logs"})
GPUS = (("RTX 3090", 24.0, 220_000), ("RTX 4090", 24.0, 380_000), ("RTX 5090", 32.0, 600_000))


def hosts(random: Random, count: int, first: int = 1) -> list[Offer]:
    """`count` machines for rent, numbered from `first`."""
    offers = []
    for number in range(first, first + count):
        name, vram, price = random.choice(GPUS)
        price = round(price * random.uniform(0.7, 1.4))
        offers.append(
            Offer(
                id=str(number),
                machine_id=f"m{number}",
                gpu_name=name,
                num_gpus=1,
                vram_gb=vram,
                price=price,
                storage_price=price // 40,
                download_price=0,
                upload_price=0,
                download_mbps=random.uniform(200, 2000),
                upload_mbps=random.uniform(100, 1000),
                reliability=random.uniform(0.92, 0.999),
                verified=True,
                cuda=12.8,
                disk_gb=200.0,
                duration_s=30 * 86400.0,
            )
        )
    return offers


class Market(MemoryProvider):
    """See `infra.provider_memory`. Asks `hit` whether a fault of a kind comes now.

    Attributes:
        down: nothing answers.
        lied: by instance, how many readable lists left it out although it lived and was old
            enough to be shown.
        lists: how many lists were handed out.
    """

    def __init__(
        self,
        kernel: Kernel,
        offers: Sequence[Offer],
        hit: Callable[[str], bool],
        checker: Checker,
        *,
        boundary: Callable[[str], None],
        on_begin: Callable[[Rental], None],
        on_end: Callable[[Rental], None],
    ) -> None:
        lag = kernel.random.uniform(0.5, 20.0) if hit("list.lag") else 0.0
        linger = kernel.random.uniform(2.0, 30.0) if hit("destroy.lingers") else 0.0
        super().__init__(
            kernel.now,
            offers,
            boot_s=self._boots_in,
            credit=10**12,
            read_lag_s=lag,
            linger_s=linger,
            faults=self._fault,
        )
        self.kernel, self.hit, self.checker = kernel, hit, checker
        self.down = False
        self.lied: Counter[str] = Counter()
        self.lists = 0
        self.calls: Counter[str] = Counter()
        self._boundary, self._on_begin, self._on_end = boundary, on_begin, on_end
        self._older: deque[tuple[float, list[Instance]]] = deque(maxlen=16)
        for number, label in enumerate(FOREIGN, start=1):
            spec = LaunchSpec(label=label, image="", disk_gb=1, onstart="")
            offer = hosts(Random(number), 1)[0]
            self._open[f"9{number}"] = self.rentals[f"9{number}"] = Rental(
                id=f"9{number}",
                label=label,
                offer=offer,
                spec=spec,
                created_at=kernel.now(),
                runs_from=kernel.now(),
            )

    def _boots_in(self, offer: Offer) -> float:
        del offer
        return min(600.0, self.kernel.random.lognormvariate(3.8, 0.5))

    def _fault(self, verb: str) -> Fault | None:
        self.checker.call_made(verb)
        self.calls[verb] += 1
        self._boundary(f"before {verb}")
        self.kernel.pause(self.kernel.random.uniform(*LASTS.get(verb, (0.1, 0.5))))
        unclear: type[ProviderError] = Unreadable if verb in READS else Unknown
        if self.down:
            return Fault(error=unclear("no connection"))
        if self.hit("api.throttled"):
            return Fault(error=Throttled("API requests too frequent", retry_after=4.5))
        if self.hit("api.5xx"):
            return Fault(error=unclear("502"), after=verb not in READS and self.hit("destroy.lies"))
        if verb == "create":
            return self._bad_create()
        if verb == "destroy" and self.hit("destroy.fails"):
            return Fault(error=Unknown("timeout"), after=self.kernel.random.random() < 0.5)
        if verb == "instances" and self.hit("list.unreadable"):
            what = self.kernel.random.choice(("410 deprecated", "''", "HTML", "truncated JSON"))
            return Fault(error=Unreadable(what))
        return None

    def _bad_create(self) -> Fault | None:
        if self.hit("create.lost_after"):
            return Fault(error=Unknown("connection reset after sending"), after=True)
        if self.hit("create.lost_before"):
            return Fault(error=Unknown("connection reset"))
        if self.hit("create.gone"):
            return Fault(error=OfferGone("no_such_ask", code="no_such_ask"))
        return None

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        self.checker.create_called(offer, spec)
        try:
            instance_id = super().create(offer, spec)
        except Refused:
            self.checker.refused.add(spec.label)
            raise
        self._boundary("after create")
        if self.hit("create.refused_with_id"):
            if instance_id in self._open:  # it may have been destroyed while the answer came
                self.set_phase(instance_id, "ended")
            raise Refused("success: false, and yet a contract", instance_id=instance_id)
        return instance_id

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        """Every machine here meets every need, so nothing is compared."""
        after = self._fault("offers")
        if after is not None:
            raise after.error
        return [] if interruptible else list(self._offers.values())[:limit]

    def instances(self) -> list[Instance]:
        listed = super().instances()
        told = self._told(listed)
        self._older.append((self.kernel.t, listed))
        self.lists += 1
        self.checker.listed(told)
        self._boundary("after instances")
        return told

    def _told(self, listed: list[Instance]) -> list[Instance]:
        told = listed
        if self.hit("list.empty"):
            told = []
        elif self.hit("list.half"):
            told = [item for item in listed if self.kernel.random.random() < 0.5]
        elif self.hit("list.stale") and self._older:
            told = self._older[0][1]
        if told is not listed:
            shown = {item.id for item in told}
            self.lied.update(item.id for item in listed if item.id not in shown)
        return told

    def destroy(self, instance_id: str) -> None:
        rental = self.rentals.get(instance_id)
        self.checker.destroy_called(instance_id, rental)
        if self.hit("destroy.lies") and not self.down:
            self._fault("destroy")
            return
        super().destroy(instance_id)
        self._boundary("after destroy")

    def began(self, rental: Rental) -> None:
        self._on_begin(rental)

    def ended(self, rental: Rental) -> None:
        self._on_end(rental)

    def replace(self, rental: Rental) -> None:
        """The machine of an ended rental leaves the market, and one that nobody knows comes."""
        again = next(reversed(self._offers))
        if self._offers[again].machine_id == rental.offer.machine_id:
            del self._offers[again]
            number = next(self._ids)
            (offer,) = hosts(self.kernel.random, 1, number)
            self._offers[offer.id] = offer

    def ours(self, prefix: str) -> list[Rental]:
        """What lives with our prefix, whether a list shows it or not."""
        return [item for item in self.running() if item.label.startswith(prefix)]

    @property
    def read_lag(self) -> timedelta:
        """How long no list shows what was just made."""
        return self._read_lag

    def stop(self, instance_id: str) -> None:
        """Its own key may not destroy it, and stops it instead."""
        if self.rentals[instance_id].destroyed_at is None:
            self.set_phase(instance_id, "ended")

    def stop_all(self) -> list[str]:
        """The credit is used up: whatever runs is stopped; their ids."""
        stopped = [item.id for item in self.running() if item.phase is None]
        for instance_id in stopped:
            self.set_phase(instance_id, "ended")
        return stopped


def owner_of(label: str) -> str:
    """The job in a label of ours, else nothing."""
    parts = label.split("/")
    return parts[1] if len(parts) > 2 else ""
