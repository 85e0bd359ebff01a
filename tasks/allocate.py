"""Renting a GPU for a job, so that at every line somebody owns what may be billing.

Who owns the instance if the process dies
  before `_intend` commits            nobody needs to: nothing was asked for
  between intent and create           the lease row (`intended`): `settle` finds nothing, closes it
  during or after create              the lease row: `settle` finds the instance by its label
  after `_rented` commits             the lease row, with the id
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from infra.provider import LaunchSpec, Provider
from state import money, policy, ranking, record, renting
from state.errors import AccountFault, NotFound, ProviderError, Refused, Throttled
from state.events import Attempt
from state.job import Job, Reason
from state.lease import Lease, LeaseStatus
from state.money import Budget
from state.offer import Offer
from state.policy import Policy
from state.store import Store, Transaction

#: How many offers one pass may try: each is one create call that was clearly refused.
MAX_OFFERS_PER_PASS = 5
#: A create call that has not been heard of for so long belongs to a process that died.
CREATE_SPAN = timedelta(seconds=60)
OTHERS_FIRST = "every offer that fits is being rented for another job"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What renting needs to know of this installation. Limits are micro-USD, 0 is none."""

    deployment: str
    image: str
    public_url: str
    onstart: str
    per_hour_limit: int = 0
    per_day_limit: int = 0
    #: Stops renting; never stops releasing.
    kill_switch: bool = False

    def label(self, job: Job) -> str:
        """Unique for each create call; begins with what the sweep calls ours."""
        return f"{self.deployment}/{job.id}/{job.attempt}-{secrets.token_hex(4)}"


@dataclass(frozen=True, kw_only=True)
class Renter:
    """Rents for jobs. Everything that it talks to is handed in."""

    store: Store
    provider: Provider
    terms: Terms
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT

    def allocate(self, job_id: str) -> Lease | None:
        """Rent a GPU if the job needs one now; the lease, or None when nothing was rented.

        Whatever stands in the way is written on the job (`progress.gpu_search`), with the time
        of the next try. Raises `Unknown` only after the lease says so too.
        """
        with self.store.transaction() as tx:
            try:
                job = tx.job(job_id)
            except NotFound:
                return None
            leases = tx.leases_of(job.id)
            if not renting.wanted(job, leases, self.clock(), self.rules):
                return None
            hosts = {host.machine_id: host for host in tx.hosts()}
            work = ranking.workload(job.request, tx.dataset(job.request.dataset_id).zip_bytes)
        if self.terms.kill_switch:
            self._wait(job_id, "renting is switched off by the operator")
            return None
        try:
            offers = self._offers(job)
        except ProviderError as error:
            pause = error.retry_after if isinstance(error, Throttled) else None
            self._wait(job_id, f"the market could not be asked: {error}", pause=pause)
            return None
        beside = [lease.machine_id for lease in leases if lease.open]
        ranked = ranking.rank(
            offers,
            work,
            excluded=(*job.excluded_machines, *beside),
            hosts=hosts,
            now=self.clock(),
            rules=self.rules,
        )
        if not ranked:
            self._wait(job_id, _nothing_fits(job, offers))
            return None
        boots = {offer.id: ranking.boot_s(work, hosts.get(offer.machine_id)) for offer in ranked}
        return self._try_offers(job_id, ranked, boots)

    def _offers(self, job: Job) -> list[Offer]:
        """What is for rent; for an interruptible job also by bid, until it was outbid too often."""
        needs = job.request.gpu
        offers = self.provider.offers(needs)
        if job.request.interruptible and job.interruptions < self.rules.interruptions:
            offers += self.provider.offers(needs, interruptible=True)
        return offers

    def _try_offers(
        self, job_id: str, ranked: Sequence[Offer], boots: Mapping[str, float]
    ) -> Lease | None:
        refusals: list[str] = []
        untried = list(ranked)
        while untried and len(refusals) < MAX_OFFERS_PER_PASS:
            intended = self._intend(job_id, untried, boots)
            if intended is None:
                return None
            lease, token, offer = intended
            untried = untried[untried.index(offer) + 1 :]
            try:
                instance_id = self.provider.create(offer, self._launch(lease, token, offer))
            except Refused as error:
                self._refused(lease, error)
                refusals.append(f"{offer.gpu_name} on machine {offer.machine_id}: {error}")
                if isinstance(error, (AccountFault, Throttled)) or error.code == "unreachable":
                    # No other offer would fare better now.
                    pause = error.retry_after if isinstance(error, Throttled) else None
                    self._wait(job_id, str(error), pause=pause)
                    return None
            except ProviderError as error:
                self._unknown(lease, error)
                return None
            else:
                return self._rented(lease, instance_id)
        self._wait(job_id, f"all offers were refused ({'; '.join(refusals)})")
        return None

    def _wanted(self, tx: Transaction, job: Job) -> bool:
        return renting.wanted(job, tx.leases_of(job.id), self.clock(), self.rules)

    def _intend(
        self, job_id: str, offers: Sequence[Offer], boots: Mapping[str, float]
    ) -> tuple[Lease, str, Offer] | None:
        """Write down that the first of `offers` which no other job of ours is after is about to
        be rented; None when that may not be, or there is none."""
        now = self.clock()
        with self.store.transaction() as tx:
            # One at a time through here: budgets are sums over all leases.
            tx.lock("rent")
            job = tx.job(job_id, lock=True)
            if not self._wanted(tx, job):
                return None
            taken = tx.offers_taken([offer.id for offer in offers])
            offer = next((offer for offer in offers if offer.id not in taken), None)
            if offer is None:
                self._explain(tx, job, Reason(code="gpu.none", message=OTHERS_FIRST), now)
                return None
            spent = tx.spend_of(job.id)
            hours = money.lease_hours(job, spent, offer.price, self.rules)
            budget = Budget(
                per_hour=self.terms.per_hour_limit,
                per_day=self.terms.per_day_limit,
                spent_hour=tx.spend_since(now - timedelta(hours=1)),
                spent_day=tx.spend_since(now - timedelta(days=1)),
                reserved=tx.reserved(),
            )
            reason = money.over_budget(job, spent, offer.price, hours, budget)
            if reason is not None and not reason.retryable:
                record.stall(tx, job.id, reason, now, self.rules)
                return None
            if reason is not None:
                self._explain(tx, job, reason, now)
                return None
            token, leases = secrets.token_urlsafe(32), tx.leases_of(job.id)
            lease = Lease(
                # Counted under the job's lock, so that leases sort as they were made.
                id=f"{job.id}.{len(leases) + 1:03d}",
                job=job.id,
                attempt=job.attempt,
                label=self.terms.label(job),
                created_at=now,
                expires_at=now + timedelta(hours=hours),
                # The token is all that the machine will be given; its hash is all that we keep.
                token_hash=hashlib.sha256(token.encode()).hexdigest(),
                token_expires_at=now + self.rules.token,
                hedge=any(item.open and not item.hedge for item in leases),
                offer_id=offer.id,
                machine_id=offer.machine_id,
                gpu_name=offer.gpu_name,
                geo=offer.geo,
                price=offer.price,
                storage_price=offer.storage_price,
                download_price=offer.download_price,
                upload_price=offer.upload_price,
                bid=offer.bid,
                vram_gb=offer.vram_gb,
                disk_gb=offer.disk_gb,
                download_mbps=offer.download_mbps,
                boot_s=boots[offer.id],
                reserved=round(offer.price * hours),
                due_at=now + CREATE_SPAN,
                why="a GPU is being rented",
            )
            tx.add_lease(lease)
            if not any(item.number == job.attempt for item in tx.list_attempts(job.id)):
                tx.add_attempt(Attempt(job=job.id, number=job.attempt, created_at=now))
            return lease, token, offer

    def _launch(self, lease: Lease, token: str, offer: Offer) -> LaunchSpec:
        return LaunchSpec(
            label=lease.label,
            image=self.terms.image,
            disk_gb=40.0 if offer.disk_gb >= 40 else offer.disk_gb,
            onstart=self.terms.onstart,
            env={"STOKER_URL": self.terms.public_url, "STOKER_TOKEN": token},
            bid=offer.bid,
        )

    def _rented(self, lease: Lease, instance_id: str) -> Lease:
        """Put the id on disk, also when the job was cancelled meanwhile."""
        now = self.clock()
        with self.store.transaction() as tx:
            lease = rented(tx, tx.lease(lease.id, lock=True), instance_id, now)
            job = tx.job(lease.job, lock=True)
            when = record.rfc3339(now)
            search = f"rented {lease.gpu_name} on machine {lease.machine_id} at {when}"
            tx.save_job(_with_search(job, search).evolve(due_at=self._next_look(job, lease)))
        return lease

    def _next_look(self, job: Job, lease: Lease) -> datetime | None:
        """The job's next look, or earlier: when a second machine is to be rented."""
        times = (policy.next_look(job, self.rules), renting.hedged_from(job, lease, self.rules))
        return min((at for at in times if at is not None), default=None)

    def _refused(self, lease: Lease, error: Refused) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            lease = tx.lease(lease.id, lock=True)
            if error.instance_id:
                # Refused, and yet an instance was named: it may be billing.
                changes = {"instance_id": error.instance_id, "rented_at": now, "due_at": now}
                tx.save_lease(lease.to(LeaseStatus.RELEASING, why=str(error), **changes))
            elif lease.open:
                closed = {"released_at": now, "due_at": None, "why": f"refused: {error}"}
                tx.save_lease(lease.to(LeaseStatus.RELEASED, **closed))

    def _unknown(self, lease: Lease, error: ProviderError) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            lease = tx.lease(lease.id, lock=True)
            if lease.status is LeaseStatus.INTENDED:
                lease = lease.to(LeaseStatus.UNKNOWN)
            known = error.instance_id or lease.instance_id
            why = f"the create call had no clear answer: {error}"
            tx.save_lease(lease.evolve(instance_id=known, due_at=now, why=why))

    def _wait(self, job_id: str, why: str, *, pause: float | None = None) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            job = tx.job(job_id, lock=True)
            if self._wanted(tx, job):
                self._explain(tx, job, Reason(code="gpu.none", message=why), now, pause=pause)

    def _explain(
        self, tx: Transaction, job: Job, reason: Reason, now: datetime, pause: float | None = None
    ) -> None:
        """Say on the job why there is no GPU yet, and when we look again."""
        span = self.rules.offer_pause if pause is None else timedelta(seconds=pause)
        again = now + span
        if job.deadline_at is not None:
            again = min(again, job.deadline_at)
        tx.save_job(_with_search(job, reason.message).evolve(due_at=again))


def rented(tx: Transaction, lease: Lease, instance_id: str, now: datetime) -> Lease:
    """Record the id of a lease's instance; one that is being released stays so, due at once."""
    changes: Mapping[str, object] = {"instance_id": instance_id, "rented_at": now}
    if lease.status is LeaseStatus.RELEASING:
        lease = lease.evolve(**changes, due_at=now, tries=0, absent=0)
    else:
        why = "its job is running on it"
        lease = lease.to(LeaseStatus.RENTED, **changes, due_at=lease.expires_at, why=why)
    tx.save_lease(lease)
    return lease


def _with_search(job: Job, words: str) -> Job:
    return job.evolve(progress={**job.progress, "gpu_search": words})


def _nothing_fits(job: Job, offers: Sequence[Offer]) -> str:
    needs = job.request.gpu
    wanted = f"{needs.min_vram_gb:g} GB VRAM at most {money.dollars(needs.max_price)}/h"
    names = f" ({', '.join(needs.gpu_names)})" if needs.gpu_names else ""
    if offers:
        return f"{len(offers)} offers meet the needs, but each machine failed a job before"
    return f"no offer meets the needs: {wanted}{names}, reliability {needs.min_reliability:g}"
