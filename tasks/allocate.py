"""Renting a GPU for a job, so that at every line somebody owns what may be billing.

Who owns the instance if the process dies (`tests/unit/tasks/test_dying.py` dies on each line)
  before `_intend` commits            nobody needs to: nothing was asked for
  between intent and create           the lease row (`intended`): `settle` finds nothing, closes it
  during or after create              the lease row: `settle` finds the instance by its label
  refused, before it is written       the lease row (`intended`): as above, also where an instance
                                      was named
  no clear answer, before it is       the lease row (`intended`): as above
  written
  in `_rented`, before its commit     the lease row (`intended`): `settle` finds the instance
  after `_rented` commits             the lease row, with the id
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from infra.provider import LaunchSpec, Provider
from state import brakes, money, policy, ranking, record, rehearsal, renting
from state.errors import AccountFault, NotFound, ProviderError, Refused, Throttled
from state.events import Attempt
from state.job import GpuNeeds, Job, Reason, Status
from state.lease import Lease, LeaseStatus
from state.money import Limits
from state.offer import Offer
from state.policy import Policy
from state.ranking import Choice, Workload
from state.store import Store, Transaction
from tasks import search

#: How many offers one pass may try: each is one create call that was clearly refused.
MAX_OFFERS_PER_PASS = 5
#: A create call that has not been heard of for so long belongs to a process that died.
CREATE_SPAN = timedelta(seconds=60)
#: Whoever was held up for longer between intent and create call asks for nothing: others may have
#: found the intent old, and nothing made of it.
STALE_INTENT = timedelta(seconds=15)
OTHERS_FIRST = "every offer that fits is being rented for another job"
#: Why a job waits for a GPU, where no brake is the reason (`progress.gpu_wait`).
NO_OFFER, UNREADABLE = "offers.none", "market.unreadable"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What renting needs to know of this installation. `image_bytes` is what a machine pulls
    before our script runs."""

    deployment: str
    image: str
    public_url: str
    onstart: str
    image_bytes: int = 4_000_000_000
    limits: Limits = money.NO_LIMITS
    #: Stops renting; never stops releasing. `stoker stop-renting` does the same while all runs.
    kill_switch: bool = False

    def label(self, job: Job) -> str:
        """Unique for each create call; begins with what the sweep calls ours."""
        return f"{self.deployment}/{job.id}/{job.attempt}-{secrets.token_hex(4)}"

    @property
    def rehearsed(self) -> bool:
        """Whether these are the terms of machines that only pretend."""
        return rehearsal.is_marked(self.deployment)

    @property
    def pace(self) -> float:
        """How many seconds are paid for in one real second."""
        return rehearsal.pace_of(self.deployment)


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

        A job is rented for on its own market only: what a test key ordered never gets a real
        machine, and what is real never one that pretends.
        """
        with self.store.transaction() as tx:
            try:
                job = tx.job(job_id)
            except NotFound:
                return None
            if (job.request.rehearsal is not None) is not self.terms.rehearsed:
                return None
            leases = tx.leases_of(job.id)
            if not renting.wanted(job, leases, self.clock(), self.rules):
                return None
            hosts = tx.hosts()
            zip_bytes = tx.dataset(job.request.dataset_id).zip_bytes
            work = search.workload(job.request, zip_bytes, self.terms.image_bytes)
            stopped = self._stopped(self._book(tx))
        if stopped is not None:
            self._wait(job_id, stopped.message, code=stopped.code, hold=True)
            return None
        try:
            offers = search.offers(
                self.provider, job.request, interruptions=job.interruptions, rules=self.rules
            )
        except ProviderError as error:
            pause = error.retry_after if isinstance(error, Throttled) else None
            words = f"the market could not be asked: {error}"
            self._wait(job_id, words, code=UNREADABLE, pause=pause)
            return None
        beside = [lease.machine_id for lease in leases if lease.open]
        choice = ranking.choose(
            offers,
            work,
            excluded=(*job.excluded_machines, *beside),
            given_up=[item.machine_id for item in leases if item.rented_at and not item.ready_at],
            hosts=hosts,
            now=self.clock(),
            waited=self.clock() - job.entered_at,
            rules=self.rules,
        )
        if not choice.ranked:
            words = choice.explain() if offers else nothing_fits(job.request.gpu)
            self._wait(job_id, words, refused=choice.refused)
            return None
        return self._try_offers(job_id, choice, work)

    def _try_offers(self, job_id: str, choice: Choice, work: Workload) -> Lease | None:
        refusals: list[str] = []
        untried = choice.offers
        boots = {offer.id: expected.boot_s for offer, expected in choice.ranked}
        while untried and len(refusals) < MAX_OFFERS_PER_PASS:
            intended = self._intend(job_id, untried, boots, work)
            if intended is None:
                return None
            lease, token, offer = intended
            untried = untried[untried.index(offer) + 1 :]
            if self.clock() - lease.created_at > STALE_INTENT:
                self._refused(lease, Refused("this process was held up; nothing was asked for"))
                return None
            try:
                instance_id = self.provider.create(offer, self._launch(lease, token, offer))
            except Refused as error:
                self._refused(lease, error)
                refusals.append(f"{offer.gpu_name} on machine {offer.machine_id}: {error}")
                if isinstance(error, (AccountFault, Throttled)) or error.code == "unreachable":
                    # No other offer would fare better now.
                    pause = error.retry_after if isinstance(error, Throttled) else None
                    account = isinstance(error, AccountFault)
                    code = error.code or UNREADABLE
                    self._wait(job_id, str(error), code=code, pause=pause, hold=account)
                    return None
            except ProviderError as error:
                self._unknown(lease, error)
                return None
            else:
                return self._rented(lease, instance_id, choice, offer)
        words = f"all offers were refused ({'; '.join(refusals)})"
        self._wait(job_id, words, refused=choice.refused)
        return None

    def _wanted(self, tx: Transaction, job: Job) -> bool:
        return renting.wanted(job, tx.leases_of(job.id), self.clock(), self.rules)

    def _book(self, tx: Transaction) -> brakes.Book:
        if self.terms.rehearsed:
            # Nobody's money, so no budget, no credit, no breaker; and no operator's word.
            return brakes.Book(leases=tx.open_rehearsals(), beats={})
        return brakes.read(tx, self.terms.limits, self.clock(), self.rules)

    def _stopped(self, book: brakes.Book) -> Reason | None:
        now, limits = self.clock(), self.terms.limits
        return brakes.stopped(book, limits, now, kill_switch=self.terms.kill_switch)

    def _intend(
        self, job_id: str, offers: Sequence[Offer], boots: Mapping[str, float], work: Workload
    ) -> tuple[Lease, str, Offer] | None:
        """Write down that the first of `offers` which no other job of ours is after, and which
        the job can pay, is about to be rented; None when that may not be, or there is none.

        Whatever it may cost is set aside in the transaction that decides: budgets are sums over
        all leases, so only one at a time comes through here.
        """
        now = self.clock()
        with self.store.transaction() as tx:
            tx.lock("rehearse" if self.terms.rehearsed else "rent")
            job = tx.job(job_id, lock=True)
            if not self._wanted(tx, job):
                return None
            leases = tx.leases_of(job.id)
            closed = money.closed(leases, now)
            taken = tx.offers_taken([offer.id for offer in offers])
            # The machines that failed the job may be more by now than when the market was asked.
            failed = job.excluded_machines
            free = [
                offer
                for offer in offers
                if offer.id not in taken and offer.machine_id not in failed
            ]
            if not free:
                self._explain(tx, job, OTHERS_FIRST, now)
                return None
            spans = {offer.id: self._span(job, offer, work, leases, closed, now) for offer in free}
            least = money.LEAST_SPAN / self.terms.pace
            offer = next((item for item in free if spans[item.id] >= least), None)
            if offer is None and any(lease.open for lease in leases):
                words = "the job's cap pays for no second machine"
                self._explain(tx, job, words, now, code=money.JOB)
                return None
            if offer is None:
                record.stall(tx, job.id, money.used_up(job, closed), now, self.rules)
                return None
            token = secrets.token_urlsafe(32)
            lease = self._lease(job, offer, leases, token, spans[offer.id], boots[offer.id], work)
            book = self._book(tx)
            reason = self._stopped(book) or brakes.refused(book, self.terms.limits, lease, now)
            if reason is not None:
                self._explain(tx, job, reason.message, now, code=reason.code, hold=True)
                return None
            for other in _racing(leases):
                self._shorten(tx, job, other, lease, closed, leases, now)
            tx.add_lease(lease)
            if not any(item.number == job.attempt for item in tx.list_attempts(job.id)):
                tx.add_attempt(Attempt(job=job.id, number=job.attempt, created_at=now))
            return lease, token, offer

    def _span(
        self,
        job: Job,
        offer: Offer,
        work: Workload,
        leases: Sequence[Lease],
        closed: int,
        now: datetime,
    ) -> timedelta:
        """How long the job can pay for `offer`."""
        moved = ranking.bandwidth(offer, work)
        remaining, race = money.left(job, closed, leases, now), _race(job, now)
        price = round(offer.price * self.terms.pace)
        return money.span(price, moved, remaining, _racing(leases), race, self.rules)

    def _shorten(
        self,
        tx: Transaction,
        job: Job,
        lease: Lease,
        rival: Lease,
        closed: int,
        leases: Sequence[Lease],
        now: datetime,
    ) -> None:
        """The machine that `rival` is rented beside leaves it what the race costs."""
        remaining = money.left(job, closed, leases, now) - money.bandwidth(rival)
        price = round(lease.price * lease.pace)
        pays = money.span(price, 0, remaining, [rival], _race(job, now), self.rules)
        lease = lease.evolve(expires_at=min(lease.expires_at, now + pays))
        due_at = min(lease.due_at or lease.expires_at, lease.expires_at)
        tx.save_lease(lease.evolve(reserved=money.worst(lease), due_at=due_at))

    def _lease(
        self,
        job: Job,
        offer: Offer,
        leases: Sequence[Lease],
        token: str,
        span: timedelta,
        boot_s: float,
        work: Workload,
    ) -> Lease:
        now = self.clock()
        return search.lease(
            offer,
            job.request,
            work,
            now=now,
            span=span,
            # Counted under the job's lock, so that leases sort as they were made.
            id=f"{job.id}.{len(leases) + 1:03d}",
            job=job.id,
            attempt=job.attempt,
            label=self.terms.label(job),
            # The token is all that the machine will be given; its hash is all that we keep.
            token_hash=hashlib.sha256(token.encode()).hexdigest(),
            token_expires_at=now + self.rules.token,
            hedge=any(item.open and not item.hedge for item in leases),
            boot_s=boot_s,
            due_at=now + CREATE_SPAN,
            why="a GPU is being rented",
        )

    def _launch(self, lease: Lease, token: str, offer: Offer) -> LaunchSpec:
        return LaunchSpec(
            label=lease.label,
            image=self.terms.image,
            disk_gb=lease.disk_gb,
            onstart=self.terms.onstart,
            env={"STOKER_URL": self.terms.public_url, "STOKER_TOKEN": token},
            bid=offer.bid,
        )

    def _rented(self, lease: Lease, instance_id: str, choice: Choice, offer: Offer) -> Lease:
        """Put the id on disk, also when the job was cancelled meanwhile; and why this offer."""
        now = self.clock()
        with self.store.transaction() as tx:
            job = tx.job(lease.job, lock=True)
            lease = rented(tx, tx.lease(lease.id, lock=True), instance_id, now)
            when = record.rfc3339(now)
            words = f"rented {lease.gpu_name} on machine {lease.machine_id} at {when}"
            # Those that were lost before cost what they cost; this one what it is expected to.
            lost = money.closed(tx.leases_of(job.id), now)
            quoted = lost + round(choice.expected(offer).cost)
            job = _with_search(
                job, words, gpu_choice=choice.explain(offer), gpu_wait=None, quoted=quoted
            )
            tx.save_job(job.evolve(due_at=self._next_look(job, lease)))
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
                changes |= {"releasing_at": now, "why": f"refused: {error}"}
                tx.save_lease(lease.to(LeaseStatus.RELEASING, **changes))
            elif lease.open:
                closed = {"released_at": now, "due_at": None, "why": f"refused: {error}"}
                tx.save_lease(lease.to(LeaseStatus.RELEASED, **closed))

    def _unknown(self, lease: Lease, error: ProviderError) -> None:
        now = self.clock()
        with self.store.transaction() as tx:
            lease = tx.lease(lease.id, lock=True)
            if not lease.open:
                return  # found old and closed meanwhile; what was made all the same is the sweep's
            if lease.status is LeaseStatus.INTENDED:
                lease = lease.to(LeaseStatus.UNKNOWN)
            known = error.instance_id or lease.instance_id
            why = f"the create call had no clear answer: {error}"
            tx.save_lease(lease.evolve(instance_id=known, due_at=now, why=why))

    def _wait(self, job_id: str, why: str, **more: Any) -> None:
        """As `_explain`, unless the job needs no machine any more."""
        now = self.clock()
        with self.store.transaction() as tx:
            job = tx.job(job_id, lock=True)
            if self._wanted(tx, job):
                self._explain(tx, job, why, now, **more)

    def _explain(
        self,
        tx: Transaction,
        job: Job,
        why: str,
        now: datetime,
        *,
        code: str = NO_OFFER,
        refused: Mapping[str, int] | None = None,
        pause: float | None = None,
        hold: bool = False,
    ) -> None:
        """Say on the job why there is no GPU yet, and when we look again. With `hold` its
        deadline waits too: where nobody may rent, another attempt would fare no better.
        `refused` are offers by the reason against them."""
        span = self.rules.offer_pause if pause is None else timedelta(seconds=pause)
        again = now + span
        if hold:
            job = job.evolve(deadline_at=now + self.rules.deadlines[Status.PENDING_GPU])
        if job.deadline_at is not None:
            again = min(again, job.deadline_at)
        wait = {"code": code, "at": record.rfc3339(now), "hold": hold, "refused": refused or {}}
        tx.save_job(_with_search(job, why, gpu_wait=wait).evolve(due_at=again))


def _racing(leases: Sequence[Lease]) -> list[Lease]:
    """The machines beside which another is rented, until one of them is ready."""
    return [item for item in leases if item.open and item.status is not LeaseStatus.RELEASING]


def _race(job: Job, now: datetime) -> timedelta:
    """How long two machines of an attempt can be held at most: until the job stalls."""
    return max(timedelta(0), job.deadline_at - now) if job.deadline_at else timedelta(0)


def rented(tx: Transaction, lease: Lease, instance_id: str, now: datetime) -> Lease:
    """Record the id of a lease's instance; one that is being released stays so, due at once."""
    changes: Mapping[str, object] = {"instance_id": instance_id, "rented_at": now}
    if lease.status is LeaseStatus.RELEASING:
        lease = lease.evolve(**changes, due_at=now, tries=0, absent=0)
    else:
        why = "its job is running on it"
        due_at = renting.last_words_at(lease, now)
        lease = lease.to(LeaseStatus.RENTED, **changes, due_at=due_at, why=why)
    tx.save_lease(lease)
    return lease


def _with_search(job: Job, words: str, **more: Any) -> Job:
    """With what the search came to; what is None is forgotten."""
    said = {**job.progress, "gpu_search": words, **more}
    return job.evolve(progress={key: value for key, value in said.items() if value is not None})


def nothing_fits(needs: GpuNeeds) -> str:
    wanted = f"{needs.min_vram_gb:g} GB VRAM at most {money.dollars(needs.max_price)}/h"
    names = f" ({', '.join(needs.gpu_names)})" if needs.gpu_names else ""
    return f"no offer meets the needs: {wanted}{names}, reliability {needs.min_reliability:g}"
