"""A GPU market in memory, for the simulation and for tests: the same door as the real one.

One offer is one contract: a rented offer disappears, and its machine comes back under a new offer
id when the instance is destroyed. Time is the clock's that is handed in; nothing happens by
itself, what is seen is computed from the time at which it is looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from infra.provider import Account, Instance, LaunchSpec
from state import ranking
from state.errors import AccountFault, OfferGone
from state.job import GpuNeeds
from state.offer import Offer


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one call: `error` is raised, before or after the call's effect.

    Any exception will do: one that no caller catches is a caller that died there.

    A lost answer is `Fault(error=Unknown(...), after=True)`; a lost request the same without
    `after`; a refusal `Fault(error=OfferGone(...))`.
    """

    error: BaseException
    after: bool = False


#: Asked at each call, by the verb's name (`offers`, `create`, `instances` …).
Faults = Callable[[str], Fault | None]


def faultless(verb: str) -> Fault | None:
    """Nothing goes wrong."""
    del verb
    return None


@dataclass
class Rental:
    """One contract, from its creation until for ever: the ledger reads it after the end too."""

    id: str
    label: str
    offer: Offer
    spec: LaunchSpec
    created_at: datetime
    runs_from: datetime
    #: Set by hand where the course of things shall be another than boot and run.
    phase: str | None = None
    phase_since: datetime | None = None
    destroyed_at: datetime | None = None


class MemoryProvider:
    """See `infra.provider.Provider`.

    Args:
        clock: aware UTC now.
        offers: what is for rent at the beginning.
        boot_s: seconds from contract to `running`, by offer.
        credit: micro-USD on the account at the beginning.
        read_lag_s: how long a new instance is in no record and no list yet.
        linger_s: how long a destroyed one is still in them.
        faults: what goes wrong, by call.
    """

    def __init__(
        self,
        clock: Callable[[], datetime],
        offers: Sequence[Offer],
        *,
        boot_s: Callable[[Offer], float] = lambda offer: 60.0,
        credit: int = 100_000_000,
        read_lag_s: float = 0.0,
        linger_s: float = 0.0,
        faults: Faults = faultless,
    ) -> None:
        self.faults, self.credit = faults, credit
        #: By those destroyed, in micro-USD.
        self._spent = 0
        self._clock, self._boot_s = clock, boot_s
        self._read_lag, self._linger = timedelta(seconds=read_lag_s), timedelta(seconds=linger_s)
        self._offers = {offer.id: offer for offer in offers}
        #: By id, those destroyed too.
        self.rentals: dict[str, Rental] = {}
        self._open: dict[str, Rental] = {}
        self._labelled: dict[str, list[Rental]] = {}
        ids = [int(offer.id) for offer in offers if offer.id.isdigit()]
        self._ids = itertools.count(max(ids, default=0) + 1)
        self._lock = threading.RLock()

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        after = self._before("offers")
        with self._lock:
            listed = [item for item in self._offers.values() if bool(item.bid) is interruptible]
        found = [item for item in listed if ranking.unmet(item, needs) is None]
        _raise(after)
        return sorted(found, key=lambda offer: offer.price)[:limit]

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        after = self._before("create")
        with self._lock:
            if self.account_credit() <= 0:
                raise AccountFault("the account has no credit", code="insufficient_credit")
            taken = self._offers.pop(offer.id, None)
            if taken is None:
                raise OfferGone(f"offer {offer.id} is no longer available", code="no_such_ask")
            now = self._clock()
            rental = Rental(
                id=str(next(self._ids)),
                label=spec.label,
                offer=taken,
                spec=spec,
                created_at=now,
                runs_from=now + timedelta(seconds=self._boot_s(taken)),
            )
            self.rentals[rental.id] = self._open[rental.id] = rental
            self._labelled.setdefault(rental.label, []).append(rental)
        self.began(rental)
        _raise(after)
        return rental.id

    def instance(self, instance_id: str) -> Instance | None:
        after = self._before("instance")
        with self._lock:
            rental = self.rentals.get(instance_id)
            found = self._seen(rental) if rental and self._shown(rental) else None
        _raise(after)
        return found

    def instances(self) -> list[Instance]:
        after = self._before("instances")
        with self._lock:
            listed = [self._seen(item) for item in self._open.values() if self._shown(item)]
            self._forget()
        _raise(after)
        return listed

    def destroy(self, instance_id: str) -> None:
        after = self._before("destroy")
        self.vanish(instance_id)
        _raise(after)

    def logs(self, instance_id: str, *, tail: int = 100) -> str:
        after = self._before("logs")
        found = self.instance(instance_id)
        _raise(after)
        lines = [found.message] if found else []
        return "\n".join(lines[-tail:])

    def account(self) -> Account:
        after = self._before("account")
        credit = self.account_credit()
        _raise(after)
        return Account(id="memory", credit=credit)

    def charges(self, labels: Collection[str], since: datetime) -> dict[str, int]:
        after = self._before("charges")
        found: dict[str, int] = {}
        with self._lock:
            for label in labels:
                for rental in self._labelled.get(label, ()):
                    found[label] = found.get(label, 0) + self._cost(rental)
        _raise(after)
        return found

    # what a simulation does to the market, and reads from it

    def add_offer(self, offer: Offer) -> None:
        with self._lock:
            self._offers[offer.id] = offer

    def set_phase(self, instance_id: str, phase: str) -> None:
        """From now on the instance is `ended`, `lost`, or `running` again."""
        with self._lock:
            rental = self._open[instance_id]
            rental.phase, rental.phase_since = phase, self._clock()

    def vanish(self, instance_id: str) -> None:
        """The instance goes, as if it destroyed itself; nothing when it is gone already."""
        with self._lock:
            rental = self._open.get(instance_id)
            if rental is None or rental.destroyed_at is not None:
                return
            rental.destroyed_at = self._clock()
            self._spent += self._cost(rental)
            if not self._linger:
                del self._open[rental.id]
            fresh = dataclasses.replace(rental.offer, id=str(next(self._ids)))
            self._offers[fresh.id] = fresh
        self.ended(rental)

    def began(self, rental: Rental) -> None:
        """A contract was made, whatever its maker will be told. For subclasses."""

    def ended(self, rental: Rental) -> None:
        """A contract came to its end. For subclasses."""

    def running(self) -> list[Rental]:
        """Whatever costs money now, whether a list shows it or not."""
        with self._lock:
            return [item for item in self._open.values() if item.destroyed_at is None]

    def cost(self, instance_id: str) -> int:
        """Micro-USD so far: the disk from creation on, the GPU while running."""
        with self._lock:
            return self._cost(self.rentals[instance_id])

    def account_credit(self) -> int:
        """Micro-USD left."""
        with self._lock:
            return self.credit - self._spent - sum(self._cost(item) for item in self.running())

    def _before(self, verb: str) -> Fault | None:
        """Raise the call's fault, or hand back one that comes after the effect."""
        fault = self.faults(verb)
        if fault is not None and not fault.after:
            raise fault.error
        return fault

    def _shown(self, rental: Rental) -> bool:
        now = self._clock()
        if now < rental.created_at + self._read_lag:
            return False
        return rental.destroyed_at is None or now < rental.destroyed_at + self._linger

    def _forget(self) -> None:
        """Let go of destroyed instances that no list shows any more."""
        gone = [item.id for item in self._open.values() if item.destroyed_at]
        for name in gone:
            if not self._shown(self._open[name]):
                del self._open[name]

    def _seen(self, rental: Rental) -> Instance:
        booted = self._clock() >= rental.runs_from
        return Instance(
            id=rental.id,
            label=rental.label,
            machine_id=rental.offer.machine_id,
            phase=rental.phase or ("running" if booted else "starting"),
            gpu_name=rental.offer.gpu_name,
            message="running" if booted else "Pull complete",
            started_at=rental.created_at,
            price=rental.offer.price,
        )

    def _cost(self, rental: Rental) -> int:
        until = rental.destroyed_at or self._clock()
        stopped = rental.phase is not None and rental.phase != "running"
        ran_until = min(until, rental.phase_since or until) if stopped else until
        lasted = (until - rental.created_at).total_seconds()
        ran = max(0.0, (ran_until - rental.runs_from).total_seconds())
        gpu_price = rental.offer.price - rental.offer.storage_price
        return round((rental.offer.storage_price * lasted + gpu_price * ran) / 3600)


def _raise(fault: Fault | None) -> None:
    if fault is not None:
        raise fault.error
