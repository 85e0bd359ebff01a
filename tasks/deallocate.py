"""Leases that need a hand: settle what is unknown, destroy what must go, see that it is gone.

One readable list of the account serves all leases of a pass. A list that cannot be read changes
nothing: every lease keeps its status and is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from infra.provider import Instance, Provider
from state import money, policy, record, renting
from state.errors import NotFound, ProviderError
from state.job import Reason
from state.lease import Lease, LeaseStatus
from state.policy import Policy
from state.store import Store, Transaction
from tasks.allocate import rented

#: `released` needs so many readable lists in a row without the instance.
ABSENT_LISTS = 2
_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Looks after leases. Every verb may be repeated at any time, by several at once."""

    store: Store
    provider: Provider
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT

    def release_job(self, job_id: str) -> None:
        """Destroy, and then observe, whatever the job has that must go."""
        with self.store.transaction() as tx:
            ids = [item.id for item in tx.leases_of(job_id) if item.open]
        self.tend(ids)

    def tend(self, lease_ids: Sequence[str]) -> None:
        """One pass over these leases: destroy, look, record."""
        with self.store.transaction() as tx:
            leases = [lease for item in lease_ids if (lease := self._judged(tx, item))]
        leases = [lease for lease in leases if lease.status is not LeaseStatus.RENTED]
        if not leases:
            return
        for lease in leases:
            if lease.status is LeaseStatus.RELEASING and lease.instance_id and not lease.absent:
                self.destroy(lease.instance_id)
        try:
            listed = self.provider.instances()
        except ProviderError as error:
            _log.warning("the provider's list could not be read", error=str(error))
            return self._again([lease.id for lease in leases])
        for lease in leases:
            self._observe(lease.id, listed)

    def _judged(self, tx: Transaction, lease_id: str) -> Lease | None:
        """The lease, turned to `releasing` if nothing wants it any more."""
        try:
            lease = tx.lease(lease_id, lock=True)
            job = tx.job(lease.job)
        except NotFound:
            return None
        now = self.clock()
        why = renting.wants_release(lease, job, now)
        if why and lease.open:
            lease = lease.to(LeaseStatus.RELEASING, why=why, releasing_at=now, due_at=now, tries=0)
            tx.save_lease(lease)
        return lease if lease.open else None

    def destroy(self, instance_id: str) -> None:
        """Ask for an instance's end; whether it came is seen in the list, later."""
        try:
            self.provider.destroy(instance_id)
        except ProviderError as error:
            # The lease stays `releasing` and due: it is asked again until it is seen gone.
            _log.warning("destroy was not confirmed", instance=instance_id, error=str(error))

    def is_gone(self, instance_id: str | None) -> bool:
        """A second opinion, asked of the instance itself: lists have left out what was there."""
        if instance_id is None:
            return True
        try:
            return self.provider.instance(instance_id) is None
        except ProviderError as error:
            _log.warning("an instance could not be asked for", error=str(error))
            return False

    def _again(self, lease_ids: Sequence[str]) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            for lease_id in lease_ids:
                lease = tx.lease(lease_id, lock=True)
                if lease.open:
                    due = now + renting.release_pause(lease.tries)
                    tx.save_lease(lease.evolve(tries=lease.tries + 1, due_at=due))

    def _observe(self, lease_id: str, listed: Sequence[Instance]) -> None:
        """Record what a readable list says of this lease."""
        now = self.clock()
        surplus: list[Instance] = []
        with self.store.transaction() as tx:
            lease = tx.lease(lease_id, lock=True)
            mine = _of(lease, listed)
            if lease.status in (LeaseStatus.INTENDED, LeaseStatus.UNKNOWN):
                surplus = self._settle(tx, lease, mine, now)
            elif lease.status is LeaseStatus.RELEASING:
                surplus = self._look_for_end(tx, lease, mine, now)
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
            rented(tx, lease, newest.id, now)
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
        self, tx: Transaction, lease: Lease, mine: Sequence[Instance], now: datetime
    ) -> list[Instance]:
        if mine:
            known = lease.instance_id or mine[0].id
            due = now + renting.release_pause(lease.tries)
            changes = {"instance_id": known, "absent": 0, "tries": lease.tries + 1, "due_at": due}
            seen = {"rented_at": lease.rented_at or now, "seen_at": lease.seen_at or now}
            tx.save_lease(lease.evolve(**changes, **seen))
            return [item for item in mine if item.id != lease.instance_id]
        lease = lease.evolve(absent=lease.absent + 1)
        # What no list showed yet may still appear.
        proven = renting.was_shown(lease) or renting.settled(lease, now, self.rules)
        if lease.absent >= ABSENT_LISTS and proven:
            self._close(tx, lease, now, lease.why)
        else:
            tx.save_lease(lease.evolve(due_at=now + timedelta(seconds=1)))
        return []

    def _close(self, tx: Transaction, lease: Lease, now: datetime, why: str) -> None:
        lease = lease.to(LeaseStatus.RELEASED, released_at=now, due_at=None, why=why)
        lease = lease.evolve(cost=money.cost(lease, now))
        tx.save_lease(lease)
        if lease.rented_at is not None:
            tx.add_spend(lease=lease.id, job=lease.job, at=now, amount=lease.cost)
        job = tx.job(lease.job, lock=True)
        if job.active and job.attempt == lease.attempt and job.last_heard_at is None:
            # The attempt has no machine after all: look for another at once.
            tx.save_job(job.evolve(due_at=now))


def _of(lease: Lease, listed: Sequence[Instance]) -> list[Instance]:
    return [
        instance
        for instance in listed
        if instance.id == lease.instance_id or instance.label == lease.label
    ]


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep saw and did; ids of instances and leases."""

    seen: int = 0
    ours: int = 0
    destroyed: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unreadable: str = ""


def sweep(keeper: Keeper, deployment: str, *, dry_run: bool = False) -> Swept:
    """Compare the account with our leases, once.

    An instance with our prefix and without an open lease is a suspect at first sight and is
    destroyed at the second. One without our prefix is never touched. A rented lease whose
    instance is missing from two readable lists, or that ended by itself, stalls its job.
    """
    now = keeper.clock()
    try:
        listed = keeper.provider.instances()
    except ProviderError as error:
        _log.error("sweep: the list could not be read; nothing was done", error=str(error))
        if not dry_run:
            with keeper.store.transaction() as tx:
                tx.beat("sweep.unreadable", now, {"error": str(error)[:500]})
        return Swept(unreadable=str(error) or "unreadable")
    ours = [instance for instance in listed if instance.label.startswith(f"{deployment}/")]
    with keeper.store.transaction() as tx:
        leases = tx.open_leases()
        before = tx.beats().get("sweep")
    owned = {lease.label for lease in leases} | {lease.instance_id for lease in leases}
    unowned = [item for item in ours if item.label not in owned and item.id not in owned]
    known = set(before[1].get("suspects", ())) if before else set()
    doomed = [item.id for item in unowned if item.id in known]
    swept = Swept(
        seen=len(listed),
        ours=len(ours),
        destroyed=tuple(doomed),
        suspects=tuple(item.id for item in unowned if item.id not in known),
        lost=() if dry_run else tuple(_lost(keeper, leases, listed, now)),
    )
    if dry_run:
        return swept
    for instance_id in doomed:
        keeper.destroy(instance_id)
    with keeper.store.transaction() as tx:
        tx.beat("sweep", now, {"suspects": [item.id for item in unowned], "seen": len(listed)})
    return swept


def _lost(
    keeper: Keeper, leases: Sequence[Lease], listed: Sequence[Instance], now: datetime
) -> list[str]:
    """Stall jobs whose machine is no longer there, or will not run again by itself."""
    stalled: list[str] = []
    for lease in leases:
        if lease.status is not LeaseStatus.RENTED:
            continue
        mine = _of(lease, listed)
        ended = [item for item in mine if item.phase == "ended"]
        with keeper.store.transaction() as tx:
            row = tx.lease(lease.id, lock=True)
            if row.status is not LeaseStatus.RENTED:
                continue
            absent = 0 if mine else row.absent + 1
            seen_at = row.seen_at or (now if mine else None)
            if (absent, seen_at) != (row.absent, row.seen_at):
                tx.save_lease(row.evolve(absent=absent, seen_at=seen_at))
        if ended or (absent >= ABSENT_LISTS and keeper.is_gone(row.instance_id)):
            what = ended[0].message or "the instance ended" if ended else "the instance vanished"
            if _failed(keeper, lease, what, ended[0].preempted if ended else False, now):
                stalled.append(lease.id)
    return stalled


def _failed(keeper: Keeper, lease: Lease, what: str, preempted: bool, now: datetime) -> bool:
    """Whether the job of `lease` takes note of its end."""
    with keeper.store.transaction() as tx:
        code = "host.boot" if lease.ready_at is None else "host.ended"
        reason = Reason(code=record.OUTBID if preempted and lease.bid else code, message=what)
        return record.machine_failed(tx, lease.id, reason, now, keeper.rules) is not None
