"""The market of machines that only pretend, behind the same door as a real one.

What is rented lies in one row among the beats, so that every process sees the same list: one may
rent, another play, a third release. The row is read and written under a lock of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from infra.provider import Account, Instance, LaunchSpec
from infra.rehearsal.machine import NEVER_S, Cue
from state import ranking, rehearsal
from state.errors import OfferGone, Refused, StoreUnavailable, Unknown, Unreadable
from state.job import GpuNeeds
from state.offer import Offer
from state.rehearsal import Rehearsal
from state.store import Store, Transaction

#: The name of the row, and of the lock on it.
ROW = "rehearsals"
#: All that is given out here begins so: offers, machines, instances. Real ones are numbers.
PREFIX = "test-"
#: A machine whose player was not heard of for so long is one whose process died.
LOST = timedelta(seconds=20)
#: What nobody released by then goes by itself.
FORGOTTEN = timedelta(hours=24)
PLAIN = Rehearsal()
#: Offers of each kind at a time.
EACH = 3
#: GPU, cents per hour, Mbit/s down, reliability: what such machines cost in 2026, about.
KINDS: tuple[tuple[str, int, float, float], ...] = (
    ("RTX 3060", 9, 420.0, 0.985),
    ("RTX 3090", 19, 640.0, 0.990),
    ("RTX 4090", 36, 860.0, 0.995),
    ("RTX 5090", 52, 900.0, 0.994),
    ("RTX A6000", 45, 700.0, 0.993),
    ("L40S", 78, 1500.0, 0.997),
    ("A100 SXM4", 98, 2400.0, 0.997),
    ("H100 SXM", 189, 4200.0, 0.998),
)


@dataclass(frozen=True, kw_only=True)
class Market:
    """See `infra.provider.Provider`.

    Attributes:
        play: is handed what each new machine is started with, and returns at once.
        part: what the job plays that rents now.
        first: it has rented nothing before.
    """

    store: Store
    clock: Callable[[], datetime]
    play: Callable[[Cue], None]
    part: Rehearsal = PLAIN
    first: bool = True

    def for_(self, part: Rehearsal, *, first: bool) -> Market:
        """The same market as a job sees it."""
        return dataclasses.replace(self, part=part, first=first)

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        """Always enough of each kind, save for whoever rehearses that there is none."""
        if interruptible or self.part.fixture == rehearsal.NO_OFFERS:
            return []
        made = (_offer(*kind, needs) for kind in KINDS for _ in range(EACH))
        found = [offer for offer in made if ranking.unmet(offer, needs) is None]
        return sorted(found, key=lambda offer: offer.price)[:limit]

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        if not (offer.id.startswith(PREFIX) and rehearsal.is_marked(spec.label)):
            raise Refused(f"{offer.id} for {spec.label} is no rehearsal", code="not_a_test")
        instance, now = PREFIX + secrets.token_hex(6), self.clock()
        cue = Cue(
            instance=instance,
            label=spec.label,
            offer=offer,
            part=self.part,
            first=self.first,
            url=spec.env["STOKER_URL"],
            token=spec.env["STOKER_TOKEN"],
        )
        runs_at = now + timedelta(seconds=min(cue.boot_s, NEVER_S) / self.part.time_scale)
        try:
            with self._rows() as rows:
                if any(row["offer"] == offer.id for row in rows.values()):
                    raise OfferGone(f"offer {offer.id} is no longer available", code="no_such_ask")
                rows[instance] = {
                    "label": spec.label,
                    "offer": offer.id,
                    "machine": offer.machine_id,
                    "price": offer.price,
                    "at": now.isoformat(),
                    "runs_at": runs_at.isoformat(),
                    "heard_at": now.isoformat(),
                }
        except (Unreadable, StoreUnavailable) as error:
            raise Unknown(f"the list of rehearsals: {error}") from None
        self.play(cue)
        return instance

    def instance(self, instance_id: str) -> Instance | None:
        return next((item for item in self.instances() if item.id == instance_id), None)

    def instances(self) -> list[Instance]:
        now = self.clock()
        try:
            with self.store.transaction() as tx:
                rows = _read(tx)
        except StoreUnavailable as error:
            raise Unreadable(f"the list of rehearsals: {error}") from None
        return [_seen(name, row, now) for name, row in rows.items()]

    def destroy(self, instance_id: str) -> None:
        if not instance_id.startswith(PREFIX):
            raise Refused(f"instance {instance_id} is no rehearsal's", code="not_a_test")
        try:
            with self._rows() as rows:
                rows.pop(instance_id, None)
        except (Unreadable, StoreUnavailable) as error:
            raise Unknown(f"the list of rehearsals: {error}") from None

    def is_wanted(self, instance_id: str) -> bool:
        """Whether a machine that is being played still exists; notes that it is."""
        with self._rows() as rows:
            if instance_id not in rows:
                return False
            rows[instance_id]["heard_at"] = self.clock().isoformat()
        return True

    def logs(self, instance_id: str, *, tail: int = 100) -> str:
        found = self.instance(instance_id)
        return "\n".join([found.message] if found else [])

    def account(self) -> Account:
        """There is no account: what is rehearsed costs nothing."""
        return Account(id="rehearsals", credit=1_000_000_000)

    def charges(self, labels: Collection[str], since: datetime) -> dict[str, int]:
        """Nobody charges for anything."""
        return {}

    @contextlib.contextmanager
    def _rows(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The row, to be changed within the block. Raises: Unreadable, StoreUnavailable."""
        now = self.clock()
        with self.store.transaction() as tx:
            tx.lock(ROW)
            rows = _read(tx)
            yield rows
            kept = {name: row for name, row in rows.items() if now - _at(row, "at") < FORGOTTEN}
            tx.beat(ROW, now, {"instances": kept})


def _read(tx: Transaction) -> dict[str, dict[str, Any]]:
    """Raises: Unreadable."""
    _, said = tx.beats().get(ROW, (None, {"instances": {}}))
    try:
        rows = {str(name): dict(row) for name, row in said["instances"].items()}
        for row in rows.values():
            _ = row["label"], row["machine"], row["price"], row["offer"]
            _ = _at(row, "at"), _at(row, "runs_at"), _at(row, "heard_at")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(f"the list of rehearsals cannot be read: {error!r}") from None
    return rows


def _at(row: Mapping[str, Any], name: str) -> datetime:
    return datetime.fromisoformat(row[name])


def _seen(name: str, row: Mapping[str, Any], now: datetime) -> Instance:
    phase, message = "running", "running"
    if now - _at(row, "heard_at") > LOST:
        phase, message = "ended", "the process that played this machine is gone"
    elif now < _at(row, "runs_at"):
        phase, message = "starting", "Pull complete"
    return Instance(
        id=name,
        label=row["label"],
        machine_id=row["machine"],
        phase=phase,
        message=message,
        started_at=_at(row, "at"),
        price=row["price"],
    )


def _offer(gpu: str, cents: int, mbps: float, reliability: float, needs: GpuNeeds) -> Offer:
    number = secrets.token_hex(4)
    storage = round(0.0002 * needs.disk_gb * 1_000_000)
    return Offer(
        id=f"{PREFIX}offer-{number}",
        machine_id=f"{PREFIX}{number}",
        gpu_name=gpu,
        num_gpus=1,
        vram_gb=ranking.GPU_MEMORY[gpu],
        price=cents * 10_000 + storage,
        storage_price=storage,
        download_price=0,
        upload_price=0,
        download_mbps=mbps,
        upload_mbps=mbps / 2,
        reliability=reliability,
        verified=True,
        cuda=12.8,
        disk_gb=max(500.0, needs.disk_gb),
        geo="test mode",
        dlperf=0.0,
    )
