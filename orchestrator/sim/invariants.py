"""What must never be otherwise, checked after every commit and every call, by what it touched.

The names are those of `docs/simulation.md`. Each check looks at the rows that changed and at the
truth that only the simulation knows: which instances really live, what customers really took,
which lists lied. Nothing here decides anything; it only refuses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from gpu_agent.wire import Fact
from infra.provider import Instance, LaunchSpec
from infra.provider_memory import Rental
from orchestrator.sim.kernel import Kernel, seconds
from state import machine, policy
from state.events import Event, Outgoing, OutgoingStatus
from state.job import ACTIVE, TERMINAL, Job, Status
from state.lease import MOVES, Lease, LeaseStatus
from state.machine import MILESTONES, TABLE
from state.memory import Changes
from state.offer import Offer
from tasks.relay import SCHEDULE_S

if TYPE_CHECKING:
    from orchestrator.sim.world import World

#: Seconds from a job's end to the end of its machines, when nothing goes wrong.
T_DESTROY = 60.0
#: The same, after all faults were healed.
T_HEALED = 600.0
#: What one fault may add: the longest pause between two tries, or a claim of somebody who died.
PER_FAULT = 75.0
#: One look at a lease that has run out, in seconds.
TICK = 90.0
#: What the market promises; the policy must wait at least so long.
SETTLE = policy.DEFAULT.settle
EDGES = frozenset((row.source, row.target) for row in TABLE)


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: str, job: str, words: str) -> None:
        super().__init__(f"{invariant}: {job}: {words}")
        self.invariant, self.job, self.words = invariant, job, words


@dataclass
class Life:
    """What the checker knows of one job, from the commits that it saw."""

    status: Status
    attempt: int = 1
    seq: int = 0
    owed: int = 0
    taken: int = 0
    ended_at: float | None = None
    faults_at_end: float = 0.0
    facts: dict[int, list[str]] = field(default_factory=dict)


class Checker:
    """Raises `Violation` as soon as something is wrong."""

    def __init__(self, kernel: Kernel, prefix: str) -> None:
        self.kernel, self.prefix = kernel, prefix
        self.lives: dict[str, Life] = {}
        #: seconds that faults may have cost so far; see `PER_FAULT`
        self.trouble = 0.0
        #: of those that last: until when they may be felt, and what they cost
        self._lasting: list[tuple[float, float]] = []
        self.healed_at: float | None = None
        self.orphan_s = 0.0
        self._events: set[str] = set()
        self._labels: set[str] = set()
        #: by open lease: how many readable lists were without its instance
        self._missing: dict[str, int] = {}
        #: labels of create calls that were answered with a clear no
        self.refused: set[str] = set()
        #: how often each webhook was sent
        self._posts: Counter[str] = Counter()
        self._taken: set[str] = set()
        self.rentals: defaultdict[str, list[Rental]] = defaultdict(list)
        self.of_job: defaultdict[str, list[Rental]] = defaultdict(list)
        self.world: World

    def _refuse(self, invariant: str, job: str, words: str) -> None:
        self.kernel.note(job, f"{invariant} does not hold: {words}")
        raise Violation(invariant, job, words)

    def fault(self, seconds: float = PER_FAULT) -> None:
        """Something was made to go wrong: what waits for it may take so much longer."""
        self.trouble += seconds
        if seconds > PER_FAULT:
            self._lasting.append((self.kernel.t + seconds, seconds))

    def _over(self) -> float:
        """The `trouble` that nobody feels any more."""
        self._lasting = [item for item in self._lasting if item[0] > self.kernel.t]
        return self.trouble - sum(seconds for _, seconds in self._lasting)

    # --- commits

    def watch(self, changes: Changes) -> None:
        """Look at what a commit changed."""
        jobs: dict[str, tuple[Job | None, Job]] = {}
        leases: dict[str, tuple[Lease | None, Lease]] = {}
        for old, new in changes:
            kind = type(new)
            if kind is Job:
                jobs.setdefault(new.id, (old, new))
                if old is None:
                    self.lives[new.id] = Life(status=Status.PENDING)
            elif kind is Lease:
                leases.setdefault(new.id, (old, new))
            elif kind is Event:
                self._event(new)
            elif kind is Outgoing:
                self._outgoing(old, new)
            elif new is None and type(old) in (Job, Lease, Event, Outgoing):
                self._refuse("I10", "", f"a row was deleted: {old}")
        for was, job in jobs.values():
            self._job(was, job)
        for before, lease in leases.values():
            self._lease(before, lease)

    def _event(self, event: Event) -> None:
        life = self.lives[event.job]
        if event.seq != life.seq + 1:
            self._refuse("I10", event.job, f"event {event.seq} after {life.seq}")
        life.seq = event.seq
        if event.webhook_id is not None:
            if event.webhook_id in self._events:
                self._refuse("I8", event.job, f"report {event.webhook_id} is in the events twice")
            self._events.add(event.webhook_id)
            if event.attempt != life.attempt or life.status not in ACTIVE:
                words = f"{event.type} of attempt {event.attempt} was taken at {life.attempt}"
                self._refuse("I11", event.job, f"{words}, {life.status}")
            life.facts.setdefault(event.attempt, []).append(event.type)
        elif event.type == "transition":
            source, target = Status(event.data["from"]), Status(event.data["to"])
            if source is not life.status or (source, target) not in EDGES:
                self._refuse("I10", event.job, f"{life.status}: {source} to {target}")
            life.status = target
            self.kernel.note(event.job, f"{source} -> {target} ({event.data['cause']})")
        if "whsec_" in str(event.data):
            self._refuse("I17", event.job, f"a secret is in event {event.seq}")

    def _outgoing(self, old: Outgoing | None, new: Outgoing) -> None:
        life = self.lives[new.job]
        if old is None:
            if new.seq != life.owed + 1:
                self._refuse("I12", new.job, f"webhook {new.seq} after {life.owed}")
            life.owed = new.seq
        elif old.status is not OutgoingStatus.WAITING and new != old:
            self._refuse("I12", new.job, f"webhook {new.seq} was {old.status} and is {new.status}")
        elif new.status is OutgoingStatus.DELIVERED and new.id not in self._taken:
            self._refuse("I12", new.job, f"webhook {new.seq} counts as delivered; nobody took it")
        elif new.status is OutgoingStatus.EXHAUSTED and new.tries <= len(SCHEDULE_S):
            self._refuse("I12", new.job, f"webhook {new.seq} was given up after {new.tries} tries")
        elif new.status is OutgoingStatus.WAITING and new.due_at is None:
            self._refuse("I20", new.job, f"webhook {new.seq} waits and nobody looks again")

    def _job(self, old: Job | None, job: Job) -> None:
        life = self.lives[job.id]
        if job.status is not life.status or job.seq != life.seq or job.owed != life.owed:
            words = f"{job.status}, {job.seq} events, {job.owed} webhooks in its row"
            self._refuse("I10", job.id, f"{words}, not {life.status}, {life.seq}, {life.owed}")
        if old is not None and not old.attempt <= job.attempt <= old.attempt + 1:
            self._refuse("I10", job.id, f"attempt {old.attempt} became {job.attempt}")
        life.attempt = job.attempt
        if job.status not in TERMINAL:
            if job.due_at is None:
                self._refuse("I20", job.id, f"{job.status} and nobody looks at it again")
            return
        if life.ended_at is None:
            life.ended_at, life.faults_at_end = self.kernel.t, self._over()
            self._ended(job)

    def _ended(self, job: Job) -> None:
        wanted = (LeaseStatus.RELEASING, LeaseStatus.RELEASED)
        for lease in self.world.leases_of(job.id):
            if lease.status not in wanted:
                self._refuse("I4", job.id, f"{job.status}, and {lease.id} is {lease.status}")
        if job.status is Status.COMPLETED:
            wrong = self.world.storage.wrong_with(job.id)
            if wrong:
                self._refuse("I16", job.id, wrong)
        self.world.job_ended(job)

    def _lease(self, old: Lease | None, lease: Lease) -> None:
        if old is None:
            if lease.status is not LeaseStatus.INTENDED:
                self._refuse("I1", lease.job, f"{lease.id} begins as {lease.status}")
            self._alone(lease)
            self._missing[lease.id] = 0
        elif lease.status is not old.status:
            if lease.status not in MOVES[old.status]:
                self._refuse("I10", lease.job, f"{lease.id}: {old.status} became {lease.status}")
            self.kernel.note(lease.job, f"{lease.id} {old.status} -> {lease.status} ({lease.why})")
            if lease.status is LeaseStatus.RELEASED:
                self._released(old, lease)
            elif lease.status is LeaseStatus.RELEASING and "vanished" in _why(lease, self.world):
                self._vanished(lease)
        if lease.open and lease.due_at is None:
            self._refuse("I20", lease.job, f"{lease.id} is {lease.status}; nobody looks again")

    def _alone(self, lease: Lease) -> None:
        """One open lease per job; a hedge may stand beside the first of the same attempt."""
        self.kernel.note(lease.job, f"{lease.id} intended on machine {lease.machine_id}")
        others = [
            item for item in self.world.leases_of(lease.job) if item.open and item.id != lease.id
        ]
        for other in others:
            pair = other.attempt == lease.attempt and other.hedge is not lease.hedge
            if not pair or len(others) > 1:
                self._refuse("I3", lease.job, f"{lease.id} begins while {other.id} is open")

    def _vanished(self, lease: Lease) -> None:
        """A machine is given up because lists lack it: then it must be gone."""
        for rental in self.rentals[lease.label]:
            if rental.destroyed_at is None and rental.id == lease.instance_id:
                self._refuse("I7", lease.job, f"instance {rental.id} is not gone, a list lied")

    def _released(self, old: Lease, lease: Lease) -> None:
        made = self.rentals[lease.label]
        lists = self._missing.pop(lease.id)
        if not made and (lease.label in self.refused or lease.label not in self._labels):
            return  # a clear no, or nobody asked, and indeed nothing was made
        if lists < 2:
            self._refuse("I5", lease.job, f"{lease.id} is released after {lists} lists without it")
        for rental in made:
            if rental.destroyed_at is None and not self._hidden(rental, lease):
                words = f"{lease.id} is released, and instance {rental.id} lives"
                self._refuse("I5", lease.job, words)

    def _hidden(self, rental: Rental, lease: Lease | None) -> bool:
        """Whether nobody could know of an instance: a readable list lied, or its create call came
        so late, from a process that was not given the CPU, that lists of the settling time could
        not show it. Then the sweep must find it; see I2 and I4."""
        if self.world.market.lied[rental.id]:
            return True
        if lease is None:
            return False
        shown = rental.created_at - lease.created_at + self.world.market.read_lag
        return shown > SETTLE

    # --- calls to the market

    def call_made(self, verb: str) -> None:
        if self.world.store.within:
            self._refuse("I15", "", f"{verb} was called inside a transaction")

    def create_called(self, offer: Offer, spec: LaunchSpec) -> None:
        lease = self.world.lease_by_label(spec.label)
        if lease is None:
            self._refuse("I1", "", "create was called without an intent")
            return
        if spec.label in self._labels:
            self._refuse("I15", lease.job, f"{lease.id}: create was called twice")
        self._labels.add(spec.label)
        self.kernel.note(lease.job, f"create for {lease.id} on machine {offer.machine_id}")
        # One whose lease is closed by now comes too late; the sweep will find it.
        if lease.open and offer.machine_id in self.world.job(lease.job).excluded_machines:
            self._refuse("hosts", lease.job, f"machine {offer.machine_id} failed it before")
        if set(spec.env) != {"STOKER_URL", "STOKER_TOKEN"} or "whsec_" in str(spec.env):
            self._refuse("I17", lease.job, f"the environment holds {sorted(spec.env)}")

    def began(self, rental: Rental) -> None:
        """An instance was made, whatever we will be told."""
        job = _job_of(rental.label)
        if self.world.lease_by_label(rental.label) is None:
            self._refuse("I1", job, f"instance {rental.id} has no lease")
        for other in self.of_job[job]:
            lease = self.world.lease_by_label(other.label)
            if other.destroyed_at is not None or self._hidden(other, lease):
                continue
            if lease is None or not lease.open:
                words = f"instance {rental.id} begins; {other.id} lives and is nobody's"
                self._refuse("I3", job, words)
        self.rentals[rental.label].append(rental)
        self.of_job[job].append(rental)
        self.kernel.note(job, f"instance {rental.id} begins")

    def destroy_called(self, instance_id: str, rental: Rental | None) -> None:
        if rental is None or not rental.label.startswith(self.prefix):
            self._refuse("I6", "", f"destroy of {instance_id}, which is not ours")
            return
        lease = self.world.lease_by_label(rental.label)
        rented = lease is not None and lease.status is LeaseStatus.RENTED
        if lease is not None and rented and lease.instance_id == instance_id:
            self._refuse("I7", lease.job, f"{lease.id} is rented and is being destroyed")
        self.kernel.note(_job_of(rental.label), f"destroy {instance_id}")

    def listed(self, told: list[Instance]) -> None:
        """A readable list was handed out, true or not."""
        self.kernel.note("-", f"list of {len(told)}")
        shown = {item.label for item in told}
        leases = self.world.store._data.leases
        for name in self._missing:
            if leases[name].label not in shown:
                self._missing[name] += 1

    def ended(self, rental: Rental) -> None:
        """An instance came to its end: was it in time?"""
        job = _job_of(rental.label)
        self.kernel.note(job, f"instance {rental.id} ends")
        life = self.lives.get(job)
        if life is not None and life.ended_at is not None:
            since = max(life.ended_at, seconds(rental.created_at))
            self._in_time(job, self.kernel.t - since, since, life)

    def _in_time(self, job: str, late: float, since: float, life: Life) -> None:
        self.orphan_s = max(self.orphan_s, late)
        if self.healed_at is not None:
            late = self.kernel.t - max(since, self.healed_at)
            if late > T_HEALED:
                self._refuse("I2", job, f"a machine lived {late:.0f} s after its end, healed")
        elif late > T_DESTROY + self.trouble - life.faults_at_end:
            self._refuse("I4", job, f"a machine lived {late:.0f} s after its job's end")

    # --- reports

    def answered(self, name: str, job: str, outcome: str, wrote: int) -> None:
        """A report was answered by `outcome`; its commit changed `wrote` rows."""
        if outcome in ("applied", "duplicate") and name not in self._events:
            self._refuse("I8", job, f"report {name} was acknowledged and is in no event")
        if outcome == "duplicate" and wrote:
            self._refuse("I9", job, f"report {name} came again and changed {wrote} rows")
        if outcome in ("stale", "unknown_job") and wrote:
            self._refuse("I11", job, f"stale report {name} changed {wrote} rows")

    def attacked(self, job: str, what: str, status: int, wrote: int) -> None:
        """Somebody without the right to it sent a report."""
        if status not in (401, 0, 503):
            self._refuse("I18", job, f"{what} was answered with {status}")
        if wrote:
            self._refuse("I18", job, f"{what} changed {wrote} rows")

    # --- what goes out

    def post_began(self, name: str, url: str, body: bytes) -> None:
        job = name.rpartition(".")[0]
        self._posts[name] += 1
        if self._posts[name] > self.world.outgoing(name).tries:
            self._refuse("I15", job, f"webhook {name} is sent by one who has not claimed it")
        if b"whsec_" in body or "STOKER_TOKEN" in str(body):
            self._refuse("I17", job, f"a secret is in webhook {name}")
        if url.startswith("http://"):
            self._refuse("I19", job, f"webhook {name} goes to {url}")

    def customer_took(self, job: str, name: str) -> None:
        life, seq = self.lives[job], int(name.rpartition(".")[2])
        if seq > life.taken + 1:
            for missing in range(life.taken + 1, seq):
                if self.world.outgoing(f"{job}.{missing}").status is OutgoingStatus.WAITING:
                    self._refuse("I12", job, f"webhook {seq} came before {missing}")
        life.taken = max(life.taken, seq)
        self._taken.add(name)

    # --- the whole world

    def look(self) -> None:
        """After the healing, from time to time: everything must be on its way to its end."""
        if self.healed_at is None:
            return
        for rental in self.world.market.ours(self.prefix):
            job = _job_of(rental.label)
            ended = self.lives[job].ended_at
            since = max(seconds(rental.created_at), self.healed_at, ended or 0.0)
            lease = self.world.lease_by_label(rental.label)
            wanted = ended is None and lease is not None and lease.open
            if not wanted and self.kernel.t - since > T_HEALED:
                self._refuse("I2", job, f"instance {rental.id} lives on, healed")
        for job_id, life in self.lives.items():
            if life.ended_at is None:
                self._moving(self.world.job(job_id))

    def _moving(self, job: Job) -> None:
        at = job.retry_at if job.status is Status.STALLED else job.deadline_at
        if at is None or self.healed_at is None:
            return
        late = self.kernel.t - max(seconds(at), self.healed_at)
        if late > 120.0:
            self._refuse("I20", job.id, f"{job.status} for {late:.0f} s longer than it may")

    def finish(self, random: Random) -> None:
        """At the end of a world that was healed: nothing is open."""
        for job_id, life in self.lives.items():
            job = self.world.job(job_id)
            if life.ended_at is None:
                self._refuse("I20", job_id, f"is {job.status} at the end")
            for lease in self.world.leases_of(job_id):
                if lease.open:
                    self._refuse("I20", job_id, f"{lease.id} is {lease.status} at the end")
            for row in self.world.outgoing_of(job_id):
                if row.status is OutgoingStatus.WAITING:
                    self._refuse("I12", job_id, f"webhook {row.seq} waits at the end")
            self._cap(job)
            self._any_order(job, life, random)
        for rental in self.world.market.ours(self.prefix):
            self._refuse("I2", _job_of(rental.label), f"instance {rental.id} lives at the end")
        with self.world.store.transaction() as tx:
            for orphan in tx.open_orphans():
                self._refuse("I20", orphan.job, f"orphan {orphan.id} costs money at the end")

    def _cap(self, job: Job) -> None:
        """What its machines cost until we let them go, by the market's ledger."""
        paid, allowed = 0.0, float(job.request.max_cost)
        for rental in self.of_job[job.id]:
            lease = self.world.lease_by_label(rental.label)
            if lease is None or rental.destroyed_at is None:
                continue
            let_go = lease.releasing_at or lease.released_at or rental.destroyed_at
            until = min(let_go, rental.destroyed_at)
            paid += rental.offer.price * max(0.0, (until - rental.created_at).total_seconds())
            allowed += rental.offer.price * TICK / 3600
        if paid / 3600 > allowed and not self.world.had_trouble:
            self._refuse("I4", job.id, f"cost {paid / 3600:.0f} of at most {allowed:.0f} micro-USD")

    def _any_order(self, job: Job, life: Life, random: Random) -> None:
        """The facts of its last attempt, twice each and shuffled, lead to the same state."""
        facts = life.facts.get(job.attempt, [])
        if job.status is not Status.COMPLETED or random.random() > 0.2:
            return
        fresh = job.evolve(status=Status.PENDING_GPU, known=frozenset())
        shuffled = facts * 2
        random.shuffle(shuffled)
        for fact in shuffled:
            if fact in MILESTONES:
                fresh, _, _ = machine.learn(fresh, Fact(fact), job.attempt, self.kernel.now())
        fresh, _ = machine.move(fresh, machine.Move.WEIGHTS_VERIFIED, self.kernel.now())
        if (fresh.status, fresh.known) != (job.status, job.known):
            self._refuse("I9", job.id, f"shuffled facts lead to {fresh.status}")


def _why(lease: Lease, world: World) -> str:
    """Why a machine goes: its own reason, or that of its job."""
    reason = world.job(lease.job).reason
    return f"{lease.why} {reason.message if reason else ''}"


def _job_of(label: str) -> str:
    parts = label.split("/")
    return parts[1] if len(parts) > 2 else ""
