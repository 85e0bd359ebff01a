"""Leases that need a hand: settle what is unknown, destroy what must go, see that it is gone.

One readable list of the account serves all leases of a pass. A list that cannot be read changes
nothing: every lease keeps its status and is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog

from gpu_agent.wire import Fact, Order
from infra.provider import Instance, Provider
from state import boot, brakes, money, policy, record, renting
from state.errors import NotFound, ProviderError
from state.job import Job, Reason, Status
from state.lease import Lease, LeaseStatus
from state.policy import Policy
from state.store import Store, Transaction
from tasks import billing, orphans
from tasks.allocate import rented
from tasks.reconcile import RECEIVER

#: `released` needs so many readable lists in a row without the instance.
ABSENT_LISTS = 2
#: So many sweeps in a row may show none of our machines and are not believed.
DOUBTS = 2
_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Looks after leases. Every verb may be repeated at any time, by several at once.

    `image_bytes` is what a machine pulls before our script runs. With `rehearsed` it looks after
    the leases of machines that only pretend, and else after all others: what is of the other kind
    is left alone, whoever asks.
    """

    store: Store
    provider: Provider
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT
    image_bytes: int = 4_000_000_000
    rehearsed: bool = False

    def release_job(self, job_id: str) -> None:
        """Destroy, and then observe, whatever the job has that must go."""
        with self.store.transaction() as tx:
            ids = [item.id for item in tx.leases_of(job_id) if item.open]
        self.tend(ids)

    def tend(self, lease_ids: Sequence[str]) -> None:
        """One pass over these leases: end, destroy, look, record; and for those that are over,
        ask what the market charged."""
        for lease_id in lease_ids:
            self._mind_its_end(lease_id)
        with self.store.transaction() as tx:
            known = [lease for item in lease_ids if (lease := self._judged(tx, item))]
        billing.settle(self.store, self.provider, known, self.clock())
        leases = [item for item in known if item.open and item.status is not LeaseStatus.RENTED]
        if not leases:
            return
        confirmed: dict[str, datetime] = {}
        for lease in leases:
            doomed = lease.instance_id if lease.status is LeaseStatus.RELEASING else None
            if doomed and not lease.absent and self.destroy(doomed):
                confirmed[lease.id] = self.clock()
        try:
            listed = self.provider.instances()
        except ProviderError as error:
            _log.warning("the provider's list could not be read", error=str(error))
            return self._again([lease.id for lease in leases], confirmed)
        if self._is_doubtful(leases, listed):
            _log.warning("the provider's list shows none of our machines; it is not believed")
            return self._again([lease.id for lease in leases], confirmed)
        for lease in leases:
            self._observe(lease.id, listed, confirmed.get(lease.id))

    def _is_doubtful(self, leases: Sequence[Lease], listed: Sequence[Instance]) -> bool:
        """Whether a list that seems to prove something shows too little to be believed."""
        if self.rehearsed or all(_of(lease, listed) for lease in leases):
            return False
        with self.store.transaction() as tx:
            return renting.not_believable(tx.open_leases(), {item.id for item in listed})

    def _mind_its_end(self, lease_id: str) -> None:
        """A rented lease that ends soon: its training saves once more. One that ends now: its
        job goes on elsewhere, or fails when its money is used up."""
        now = self.clock()
        with self.store.transaction() as tx:
            try:
                # Jobs are locked before what hangs on them, here as everywhere.
                job = tx.job(tx.lease(lease_id).job, lock=True)
            except NotFound:
                return
            lease = tx.lease(lease_id, lock=True)
            if lease.rehearsed is not self.rehearsed:
                return
            early = lease.expires_at - renting.LAST_WORDS
            if lease.status is not LeaseStatus.RENTED or now < early:
                return
            if now >= lease.expires_at:
                record.machine_failed(tx, lease.id, self._ended(tx, job, lease), now, self.rules)
                return
            tx.save_lease(lease.evolve(due_at=lease.expires_at))
            if job.status is Status.TRAINING and job.lease == lease.id:
                record.order(tx, job.id, Order.CHECKPOINT_NOW, now)

    def _ended(self, tx: Transaction, job: Job, lease: Lease) -> Reason:
        """Why a lease ended: the job's money, if that made it shorter than leases are."""
        if lease.expires_at - lease.created_at >= self.rules.lease:
            return Reason(code="lease.ended", message="its machine was rented for no longer")
        leases, now = tx.leases_of(job.id), self.clock()
        remaining = money.left(job, money.closed(leases, now), leases, now)
        return money.used_up(job, job.request.max_cost - remaining)

    def _judged(self, tx: Transaction, lease_id: str) -> Lease | None:
        """The lease, turned to `releasing` if nothing wants it any more."""
        try:
            lease = tx.lease(lease_id, lock=True)
            job = tx.job(lease.job)
        except NotFound:
            return None
        if lease.rehearsed is not self.rehearsed:
            return None
        now = self.clock()
        why = renting.wants_release(lease, job, now)
        if why and lease.open:
            changes = {"why": why, "releasing_at": now, "due_at": now, "tries": 0, "absent": 0}
            lease = lease.to(LeaseStatus.RELEASING, **changes)
            tx.save_lease(lease)
        return lease

    def destroy(self, instance_id: str) -> bool:
        """Ask for an instance's end, and whether the market says so; that it came is seen in the
        list, later."""
        try:
            self.provider.destroy(instance_id)
        except ProviderError as error:
            # The lease stays `releasing` and due: it is asked again until it is seen gone.
            _log.warning("destroy was not confirmed", instance=instance_id, error=str(error))
            return False
        return True

    def is_gone(self, instance_id: str | None) -> bool:
        """A second opinion, asked of the instance itself: lists have left out what was there, and
        shown what was gone."""
        if instance_id is None:
            return True
        try:
            return self.provider.instance(instance_id) is None
        except ProviderError as error:
            _log.warning("an instance could not be asked for", error=str(error))
            return False

    def _again(self, lease_ids: Sequence[str], confirmed: Mapping[str, datetime]) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            for lease_id in lease_ids:
                lease = tx.lease(lease_id, lock=True)
                if lease.open:
                    due = now + renting.release_pause(lease.tries)
                    ended_at = lease.ended_at or confirmed.get(lease_id)
                    changes = {"tries": lease.tries + 1, "due_at": due, "ended_at": ended_at}
                    tx.save_lease(lease.evolve(**changes))

    def _observe(
        self, lease_id: str, listed: Sequence[Instance], confirmed: datetime | None
    ) -> None:
        """Record what a readable list says of this lease, whose end was `confirmed` then."""
        now = self.clock()
        surplus: list[Instance] = []
        with self.store.transaction() as tx:
            tx.job(tx.lease(lease_id).job, lock=True)
            lease = tx.lease(lease_id, lock=True)
            mine = _of(lease, listed)
            if lease.status in (LeaseStatus.INTENDED, LeaseStatus.UNKNOWN):
                surplus = self._settle(tx, lease, mine, now)
            elif lease.status is LeaseStatus.RELEASING:
                surplus = self._look_for_end(tx, lease, mine, now, confirmed)
        for instance in surplus:
            self.destroy(instance.id)

    def _settle(
        self, tx: Transaction, lease: Lease, mine: Sequence[Instance], now: datetime
    ) -> list[Instance]:
        """Adopt the newest instance with the label; the rest is returned, to be destroyed."""
        if mine:
            newest = max(
                mine, key=lambda instance: int(instance.id) if instance.id.isdigit() else 0
            )
            adopted = rented(tx, lease, newest.id, now)
            tx.save_lease(adopted.evolve(**_seen(adopted, [newest], now)))
            _log.info("adopted by label", lease=lease.id, instance=newest.id)
            return [instance for instance in mine if instance.id != newest.id]
        lease = lease.evolve(absent=lease.absent + 1)
        if lease.absent >= ABSENT_LISTS and renting.settled(lease, now, self.rules):
            self._close(tx, lease, now, "never made")
        else:
            due = now + renting.release_pause(lease.tries)
            tx.save_lease(lease.evolve(tries=lease.tries + 1, due_at=due))
        return []

    def _look_for_end(
        self,
        tx: Transaction,
        lease: Lease,
        mine: Sequence[Instance],
        now: datetime,
        confirmed: datetime | None,
    ) -> list[Instance]:
        due = now + renting.release_pause(lease.tries)
        if mine:
            known = lease.instance_id or mine[0].id
            changes = {"instance_id": known, "absent": 0, "tries": lease.tries + 1, "due_at": due}
            changes |= {"rented_at": lease.rented_at or now, **_seen(lease, mine, now)}
            tx.save_lease(lease.evolve(**changes))
            return [item for item in mine if item.id != lease.instance_id]
        ended_at = lease.ended_at or confirmed or now
        lease = lease.evolve(absent=lease.absent + 1, ended_at=ended_at)
        # What no list showed yet may still appear; so may what nobody could name.
        named = lease.instance_id is not None
        proven = (renting.is_proof if named else renting.settled)(lease, now, self.rules)
        if lease.absent >= ABSENT_LISTS and proven:
            self._close(tx, lease, now, lease.why)
        elif lease.absent >= ABSENT_LISTS:
            tx.save_lease(lease.evolve(tries=lease.tries + 1, due_at=due))
        else:
            tx.save_lease(lease.evolve(due_at=now + timedelta(seconds=1)))
        return []

    def _close(self, tx: Transaction, lease: Lease, now: datetime, why: str) -> None:
        lease = lease.to(LeaseStatus.RELEASED, released_at=now, due_at=None, why=why, tries=0)
        if lease.rented_at is not None:
            received, sent = self._traffic(tx, lease)
            lease = lease.evolve(received=received, sent=sent)
            lease = lease.evolve(cost=money.cost(lease, now).total)
            if not lease.rehearsed:  # for which nobody sends an invoice
                lease = lease.evolve(due_at=now + billing.ASKS[0])
                tx.add_spend(lease=lease.id, job=lease.job, at=now, amount=lease.cost)
        tx.save_lease(lease)
        job = tx.job(lease.job, lock=True)
        if job.active and job.attempt == lease.attempt and job.last_heard_at is None:
            # The attempt has no machine after all: look for another at once.
            tx.save_job(job.evolve(due_at=now))

    def _traffic(self, tx: Transaction, lease: Lease) -> tuple[int, int]:
        """Bytes that its machine received and sent, as its agent reported them; a download of
        which it did not report the end counts as expected."""
        if lease.ready_at is None:
            return self.image_bytes, 0
        told = [event for fact in _TRAFFIC for event in tx.events(lease.job, type=fact, limit=9999)]
        mine = [event for event in told if event.attempt == lease.attempt]
        got = {event.type: _size(event.data) for event in mine}
        sent = sum(_files_size(event.data) for event in mine)
        if not {Fact.IMAGES_READY, Fact.MODEL_READY} <= got.keys():
            return lease.received, sent
        earlier = [event for event in told if event.attempt < lease.attempt]
        kept = [event for event in earlier if event.type == Fact.TRAINING_CHECKPOINT]
        resumed = _files_size(max(kept, key=lambda event: event.seq).data) if kept else 0
        pulled = got[Fact.IMAGES_READY] + got[Fact.MODEL_READY]
        return self.image_bytes + pulled + resumed, sent


#: Facts that tell of bytes over the line.
_TRAFFIC = (
    Fact.IMAGES_READY,
    Fact.MODEL_READY,
    Fact.TRAINING_CHECKPOINT,
    Fact.WEIGHTS_UPLOADED,
)


def _size(data: Mapping[str, Any]) -> int:
    size = data.get("bytes")
    return size if type(size) is int and size > 0 else 0


def _files_size(data: Mapping[str, Any]) -> int:
    files = data.get("files")
    if not isinstance(files, list):
        return 0
    return sum(_size(item) for item in files if isinstance(item, dict))


def _seen(lease: Lease, mine: Sequence[Instance], now: datetime) -> dict[str, Any]:
    """What changes on a lease because a list shows its instance: since when it runs, or not."""
    phases = {instance.phase for instance in mine}
    changes: dict[str, Any] = {"absent": 0, "seen_at": lease.seen_at or now}
    if "running" in phases:
        changes |= {"running_at": lease.running_at or now, "ended_at": None}
    elif "starting" in phases and lease.running_at is None:
        changes |= {"booting_at": now, "ended_at": None}
    elif phases == {"ended"}:
        changes["ended_at"] = lease.ended_at or now
    return {name: value for name, value in changes.items() if getattr(lease, name) != value}


def _of(lease: Lease, listed: Sequence[Instance]) -> list[Instance]:
    return [
        instance
        for instance in listed
        if instance.id == lease.instance_id or instance.label == lease.label
    ]


# --- the sweep --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One instance of the account, and what a sweep makes of it. Micro-USD per hour, seconds.

    `verdict` is one of `foreign`, `kept`, `releasing`, `suspect`, `destroyed`.
    """

    instance: str
    label: str
    machine: str
    age_s: int
    price: int
    verdict: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep saw and did; ids of instances and leases.

    `doubtful` says that the list was read, and showed too little to be believed yet.
    """

    seen: int = 0
    ours: int = 0
    destroyed: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unreadable: str = ""
    doubtful: bool = False
    sights: tuple[Sight, ...] = ()


#: What no open lease is for; of so many at most the last sweep is remembered.
_STRANGE, SHOWN = frozenset({"foreign", "suspect", "destroyed"}), 20


def sweep(keeper: Keeper, deployment: str, *, dry_run: bool = False) -> Swept:
    """Compare the account with our leases, once; and see what credit it has.

    An instance with our prefix and without an open lease is a suspect at first sight and is
    destroyed at the second. One without our prefix is never touched. A rented lease whose
    instance is missing from two readable lists, or that ended by itself, stalls its job. A list
    that suddenly shows none of our machines is believed at the third sight. What orphans cost is
    written down before they are destroyed.
    """
    now = keeper.clock()
    try:
        listed = keeper.provider.instances()
    except ProviderError as error:
        _log.error("sweep: the list could not be read; nothing was done", error=str(error))
        if not dry_run:
            _note_unreadable(keeper.store, brakes.UNREADABLE, brakes.SWEEP, error, now)
        return Swept(unreadable=str(error) or "unreadable")
    with keeper.store.transaction() as tx:
        leases, before = tx.open_leases(), tx.beats().get(brakes.SWEEP)
    said = before[1] if before else {}
    ours = [instance for instance in listed if instance.label.startswith(f"{deployment}/")]
    unbelieved = renting.not_believable(leases, {item.id for item in listed})
    doubts = int(said.get("doubts", 0)) + 1 if unbelieved else 0
    doubtful = 0 < doubts <= DOUBTS
    owned = {lease.label for lease in leases} | {lease.instance_id for lease in leases}
    unowned = [item for item in ours if item.label not in owned and item.id not in owned]
    known = set(said.get("suspects", ()))
    doomed = [item.id for item in unowned if item.id in known and not doubtful]
    swept = Swept(
        seen=len(listed),
        ours=len(ours),
        destroyed=tuple(doomed),
        suspects=tuple(item.id for item in unowned if item.id not in known),
        doubtful=doubtful,
        sights=tuple(_sight(item, deployment, leases, doomed, now) for item in listed),
    )
    if dry_run:
        return swept
    if not doubtful:
        orphans.note(keeper.store, unowned, listed, keeper.is_gone, keeper.image_bytes, now)
    for instance_id in doomed:
        if keeper.destroy(instance_id):
            orphans.ended(keeper.store, instance_id, keeper.clock())
    credit = _read_credit(keeper, now)
    if doubtful:
        _log.error("sweep: the list shows none of our machines; not believed yet", sight=doubts)
    lost = () if doubtful else tuple(stall_lost(keeper, leases, listed, now, credit))
    with keeper.store.transaction() as tx:
        suspects = [item.id for item in unowned]
        strangers = [item for item in swept.sights if item.verdict in _STRANGE]
        foreign = len(listed) - len(ours)
        counts = {"seen": len(listed), "ours": len(ours), "foreign": foreign, "doubts": doubts}
        # Ours without a lease before others'.
        strangers.sort(key=lambda item: item.verdict == "foreign")
        shown = [asdict(item) for item in strangers[:SHOWN]]
        tx.beat(brakes.SWEEP, now, {"suspects": suspects, "strangers": shown, **counts})
    return replace(swept, lost=lost)


def _sight(
    item: Instance, deployment: str, leases: Sequence[Lease], doomed: Sequence[str], now: datetime
) -> Sight:
    owners = [lease for lease in leases if _of(lease, [item])]
    if not item.label.startswith(f"{deployment}/"):
        verdict, why = "foreign", "its label is not ours; it is never touched"
    elif owners:
        going = owners[0].status is LeaseStatus.RELEASING
        verdict, why = "releasing" if going else "kept", owners[0].why
    elif item.id in doomed:
        verdict, why = "destroyed", "no open lease is for it, seen twice"
    else:
        verdict, why = "suspect", "no open lease is for it; it goes if the next sweep sees it again"
    return Sight(
        instance=item.id,
        label=item.label,
        machine=item.machine_id,
        age_s=round((now - item.started_at).total_seconds()) if item.started_at else 0,
        price=item.price,
        verdict=verdict,
        why=why,
    )


def _note_unreadable(
    store: Store, name: str, good: str, error: ProviderError, now: datetime
) -> None:
    """Note that something could not be read, and since when."""
    with store.transaction() as tx:
        since = brakes.unreadable_since(tx.beats(), name, good) or now
        tx.beat(name, now, {"error": str(error)[:500], "since": since.isoformat()})


def _read_credit(keeper: Keeper, now: datetime) -> int | None:
    """Micro-USD on the account; None where it cannot be read."""
    try:
        there = keeper.provider.account().credit
    except ProviderError as error:
        _note_unreadable(keeper.store, brakes.NO_CREDIT_READ, brakes.CREDIT, error, now)
        return None
    with keeper.store.transaction() as tx:
        tx.beat(brakes.CREDIT, now, {"credit": there})
    return there


def stall_lost(
    keeper: Keeper,
    leases: Sequence[Lease],
    listed: Sequence[Instance],
    now: datetime,
    credit: int | None,
) -> list[str]:
    """Note what the list says of rented machines; stall the jobs of those that are no longer
    there, will not come up, or will not run again by themselves."""
    stalled: list[str] = []
    with keeper.store.transaction() as tx:
        since = policy.listening_since(tx.beats().get(RECEIVER), now)
    for lease in leases:
        if lease.status is not LeaseStatus.RENTED:
            continue
        mine = _of(lease, listed)
        # What no list showed yet may still appear.
        proven = renting.is_proof(lease, now, keeper.rules)
        vanished = not mine and proven and lease.absent + 1 >= ABSENT_LISTS
        vanished = vanished and keeper.is_gone(lease.instance_id)
        with keeper.store.transaction() as tx:
            # Jobs are locked before what hangs on them; `machine_failed` wants it.
            if not tx.jobs([lease.job], lock=True):
                continue
            row = tx.lease(lease.id, lock=True)
            if row.status is not LeaseStatus.RENTED:
                continue
            changes, reason = _verdict(row, mine, vanished, since, now, keeper.rules)
            if changes:
                tx.save_lease(row.evolve(**changes))
            gone = vanished or (bool(mine) and all(item.phase == "ended" for item in mine))
            if reason and gone and credit is not None and credit <= 0:
                reason = _out_of_credit(credit)
            if reason and record.machine_failed(tx, row.id, reason, now, keeper.rules):
                stalled.append(lease.id)
    return stalled


def _verdict(
    lease: Lease,
    mine: Sequence[Instance],
    vanished: bool,
    since: datetime,
    now: datetime,
    rules: Policy,
) -> tuple[dict[str, Any], Reason | None]:
    """What changes on a rented lease by a list, and why its machine is none any more."""
    if not mine:
        changes = {"absent": lease.absent + 1, "ended_at": lease.ended_at or now}
        code = "host.boot" if lease.ready_at is None else "host.ended"
        return changes, Reason(code=code, message="the instance vanished") if vanished else None
    # One that lives speaks for all of a label.
    shown = min(mine, key=lambda item: item.phase == "ended")
    verdict = boot.verdict(lease, shown, now, rules, since=since)
    changes = _seen(lease, mine, now)
    if (verdict.note, verdict.noted_at) != (lease.note, lease.noted_at):
        changes |= {"note": verdict.note, "noted_at": verdict.noted_at}
    return changes, verdict.reason


def _out_of_credit(credit: int) -> Reason:
    message = f"the market stopped our machines: {money.dollars(credit)} of credit are left"
    return Reason(code=brakes.CREDIT_GONE, message=message)
