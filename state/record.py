"""Writing what happened: machine, events, outbox and due times, inside one transaction.

Every change of a job goes through here, so that these always commit together: the new status,
the event that tells of it, the webhook that the customer is owed, the release of machines that
the job no longer needs, and the time at which somebody must look again.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from gpu_agent.wire import Fact, Order, Report
from state import hosts, machine, policy, progress
from state.endpoints import Endpoint
from state.errors import AttemptOver, Conflict, IllegalMove, NotFound, TokenRefused
from state.events import (
    Attempt,
    Dataset,
    DatasetStatus,
    Event,
    HostRecord,
    Outgoing,
    Secret,
)
from state.job import ACTIVE, Job, JobRequest, Reason, Status, Transition
from state.lease import Lease, LeaseStatus
from state.machine import Effect, Move
from state.policy import Policy
from state.renting import LOST_RACE
from state.store import Transaction

#: What the customer's webhook is called, by the status entered.
WEBHOOK_TYPES: Mapping[Status, str] = {
    Status.PENDING_GPU: "job.pending_gpu",
    Status.PENDING_IMAGES: "job.pending_images",
    Status.PENDING_MODEL: "job.pending_model",
    Status.TRAINING: "job.training",
    Status.STALLED: "job.stalled",
    Status.COMPLETED: "job.completed",
    Status.FAILED: "job.failed",
    Status.CANCELLED: "job.cancelled",
}
#: Somebody bid more for the machine than we did.
OUTBID = "host.outbid"
#: What an agent says when its machine is being taken away.
TERMINATED = "agent.terminated"
#: Whether these are so is not for an agent to say: they cost no try, or blame nobody.
SERVERS_WORDS = (OUTBID, "account.", "budget.", "image.", "pending.")
#: Reasons that say nothing against the machine on which they happened …
NOT_THE_HOSTS_FAULT = (
    *("dataset.", "model.", "image.", "recipe.", "training.", "budget.", "account.", "pending."),
    "lease.",
    OUTBID,
)
#: … and those of their kind that do.
THE_HOSTS_FAULT = ("training.frozen", "training.slowing")


class Outcome(enum.Enum):
    """What became of a report."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    #: Of an old attempt or a finished one: the agent must stop.
    STALE = "stale"
    UNKNOWN_JOB = "unknown_job"


@dataclass(frozen=True)
class Taken:
    """The answer to one report. `wake` names the tasks to wake for its job after the commit."""

    outcome: Outcome
    orders: tuple[Order, ...] = ()
    wake: tuple[str, ...] = ()


def rfc3339(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Pen:
    """Collects what a transaction writes about some jobs, and writes it in few statements."""

    def __init__(self, tx: Transaction, now: datetime, rules: Policy) -> None:
        self.tx, self.now, self.rules = tx, now, rules
        self.jobs: dict[str, Job] = {}
        self._events: list[Event] = []
        self._outgoing: list[Outgoing] = []
        self._endpoints: dict[str, list[Endpoint]] = {}
        self._wake: dict[str, set[str]] = {}

    def woken(self, job_id: str) -> tuple[str, ...]:
        """The tasks to wake for a job once this is committed."""
        return tuple(sorted(self._wake.get(job_id, ())))

    def wake(self, job: Job, task: str) -> None:
        self._wake.setdefault(job.id, set()).add(task)

    def note(
        self, job: Job, kind: str, data: Mapping[str, Any], report: Report | None = None
    ) -> Job:
        """Add an event to the job's history."""
        job = job.evolve(seq=job.seq + 1)
        self._events.append(
            Event(
                job=job.id,
                seq=job.seq,
                attempt=report.attempt if report else job.attempt,
                type=kind,
                at=self.now,
                data=data,
                agent_seq=report.seq if report else None,
                webhook_id=report.webhook_id if report else None,
            )
        )
        return job

    def owe(self, job: Job, kind: str, data: Mapping[str, Any]) -> Job:
        """Promise the customer a webhook, at each place that is to be told; due at once."""
        takers = self._takers(job, kind)
        if not takers:
            return job
        job = job.evolve(owed=job.owed + 1)
        payload = {
            "type": kind,
            "timestamp": rfc3339(self.now),
            "data": {
                "job": job.id,
                "seq": job.owed,
                "status": str(job.status),
                "attempt": job.attempt,
                "livemode": job.request.rehearsal is None,
                "metadata": dict(job.request.metadata),
                **data,
            },
        }
        for endpoint, due_at in takers:
            self._outgoing.append(
                Outgoing(
                    id=f"{job.id}.{job.owed}.{endpoint}" if endpoint else f"{job.id}.{job.owed}",
                    job=job.id,
                    seq=job.owed,
                    type=kind,
                    created_at=self.now,
                    payload=payload,
                    due_at=due_at,
                    endpoint=endpoint,
                    owner=job.owner,
                )
            )
        self.wake(job, "relay")
        return job

    def _takers(self, job: Job, kind: str) -> list[tuple[str, datetime]]:
        """The endpoints to be told ("": the job's own webhook), and when that is due."""
        takers = [("", self.now)] if job.request.webhook_url else []
        known = self._endpoints.get(job.owner)
        if known is None:
            # once for all that this transaction owes the owner
            known = self._endpoints[job.owner] = self.tx.endpoints(job.owner)
        for endpoint in known:
            if endpoint.takes(kind, self.now):
                takers.append((endpoint.id, endpoint.due(self.now)))
        return takers

    def passed(self, job: Job, transitions: Iterable[Transition]) -> Job:
        """Record transitions, owe their webhooks, set the new state's deadline."""
        final = job
        for step in transitions:
            data: dict[str, Any] = {"from": str(step.source), "to": str(step.target)}
            data["cause"] = step.cause
            if step.reason:
                data["reason"] = step.reason.to_dict()
            if step.target is Status.STALLED:
                data["stalled_from"] = str(step.source)
                data["retry_at"] = rfc3339(final.retry_at) if final.retry_at else None
            job = self.note(job, "transition", data)
            retrying = step.cause == Move.RETRY
            kind = "job.retrying" if retrying else WEBHOOK_TYPES[step.target]
            # Each webhook tells the status of its own step, also when several steps came at once.
            job = self.owe(job, kind, {**data, "status": str(step.target)})
            job = self._entered(job, step.target)
        return job

    def _entered(self, job: Job, target: Status) -> Job:
        span = policy.for_job(job, self.rules).deadlines.get(target)
        job = job.evolve(deadline_at=self.now + span if span else None)
        if target is Status.PENDING_GPU:
            self.wake(job, "allocate")
            # Due now: if the wake-up is lost, the reconcile pass finds it.
            return job.evolve(due_at=self.now)
        if target not in ACTIVE and target is not Status.PENDING:
            self.release(job, f"its job is {target}")
        return job.evolve(due_at=policy.next_look(job, self.rules))

    def release(self, job: Job, why: str, *, but: str = "") -> None:
        """Every machine of the job must go, save that of the lease `but`."""
        for lease in self.tx.leases_of(job.id):
            if lease.open and lease.status is not LeaseStatus.RELEASING and lease.id != but:
                self.let_go(lease, why)
                self.wake(job, "deallocate")
                if why == LOST_RACE and lease.machine_id:
                    self.remember(lease, hosts.outrun(_host(self.tx, lease), lease, self.now))

    def let_go(self, lease: Lease, why: str) -> None:
        """This machine must go."""
        changes = {"why": why, "releasing_at": self.now, "due_at": self.now, "tries": 0}
        # What lists lacked before says nothing of whether it is gone after a destroy.
        self.tx.save_lease(lease.to(LeaseStatus.RELEASING, **changes, absent=0))

    def stall(self, job: Job, reason: Reason) -> Job:
        """Stall, and fail at once when no retry will come."""
        machines = _machines_of(self.tx, job)
        if reason.code == TERMINATED and any(lease.bid for lease in machines):
            # The agent cannot know why; the market's list says so only after this.
            reason = dataclasses.replace(reason, code=OUTBID)
        if reason.code == OUTBID or reason.code.startswith("account."):
            job = job.evolve(interruptions=job.interruptions + 1)
        again = policy.retry_at(job, reason, self.now, self.rules)
        for lease in machines:
            job = self.blame(job, lease, reason)
        job, steps = machine.move(job, Move.STALL, self.now, reason=reason, retry_at=again)
        job = self.passed(job, steps)
        if again is None:
            job, steps = machine.move(job, Move.FAIL, self.now, reason=reason)
            job = self.passed(job, steps)
        return job

    def blame(self, job: Job, lease: Lease, reason: Reason) -> Job:
        """Remember what happened on a machine, if it says something against that machine."""
        if not _blames_host(reason) or not lease.machine_id:
            return job
        self.remember(lease, hosts.failed(_host(self.tx, lease), lease, job, reason, self.now))
        others = (item for item in job.excluded_machines if item != lease.machine_id)
        return job.evolve(excluded_machines=(*others, lease.machine_id))

    def remember(self, lease: Lease, host: HostRecord) -> None:
        """Keep what is known of the lease's machine by now, if there is one."""
        if not lease.rehearsed:
            self.tx.save_host(host)

    def flush(self, jobs: Iterable[Job]) -> None:
        self.tx.save_jobs(list(jobs))
        if self._events:
            self.tx.add_events(self._events)
        if self._outgoing:
            self.tx.add_outgoing(self._outgoing)


def _blames_host(reason: Reason) -> bool:
    return reason.code in THE_HOSTS_FAULT or not reason.code.startswith(NOT_THE_HOSTS_FAULT)


def _machines_of(tx: Transaction, job: Job) -> list[Lease]:
    """Whose fault it may be when the present attempt fails: the machine that has it, or all that
    are booting for it."""
    leases = (lease for lease in tx.leases_of(job.id) if lease.attempt == job.attempt)
    if job.lease:
        return [lease for lease in leases if lease.id == job.lease]
    return [lease for lease in leases if lease.status is LeaseStatus.RENTED]


def _host(tx: Transaction, lease: Lease) -> HostRecord:
    return tx.host(lease.machine_id) or HostRecord(machine_id=lease.machine_id)


# --- the agent's reports ----------------------------------------------------------------------


def take_reports(
    tx: Transaction, reports: Sequence[Report], now: datetime, rules: Policy = policy.DEFAULT
) -> list[Taken]:
    """Apply a group of verified reports, in the order given. Duplicates do nothing."""
    pen = _Pen(tx, now, rules)
    # Locked first: while we wait for a job, another process may take the same report.
    jobs = tx.jobs({report.job for report in reports}, lock=True)
    known = tx.known_reports([report.webhook_id for report in reports])
    touched: set[str] = set()
    outcomes: list[tuple[Outcome, tuple[Order, ...]]] = []
    for report in reports:
        job = jobs.get(report.job)
        if job is None:
            outcomes.append((Outcome.UNKNOWN_JOB, ()))
        elif report.webhook_id in known:
            over = report.attempt != job.attempt or not job.active
            outcomes.append((Outcome.STALE if over else Outcome.DUPLICATE, ()))
        else:
            job, outcome, orders = _take(pen, job, report)
            outcomes.append((outcome, orders))
            if outcome is Outcome.APPLIED:
                known.add(report.webhook_id)
                touched.add(job.id)
                jobs[job.id] = job
    pen.flush(jobs[job_id] for job_id in sorted(touched))
    return [
        Taken(outcome, orders, pen.woken(report.job) if outcome is Outcome.APPLIED else ())
        for (outcome, orders), report in zip(outcomes, reports, strict=True)
    ]


def _take(pen: _Pen, job: Job, report: Report) -> tuple[Job, Outcome, tuple[Order, ...]]:
    learnt, steps, effect = machine.learn(job, report.type, report.attempt, pen.now)
    if effect is Effect.STALE:
        return job, Outcome.STALE, ()
    first_word = job.last_heard_at is None
    orders = tuple(Order(item) for item in job.orders)
    job = progress.heard(learnt, report.type, report.data, pen.now)
    job = job.evolve(last_heard_at=pen.now, orders=())
    job = pen.note(job, str(report.type), report.data, report)
    job = pen.passed(job, steps)
    if policy.slowing(job, pen.rules):
        job = job.evolve(due_at=pen.now)
    elif first_word or not steps:
        job = job.evolve(due_at=_earlier(job.due_at, policy.next_look(job, pen.rules)))
    if report.type is Fact.ERROR:
        job = pen.stall(job, _reason(report.data))
        orders = (Order.STOP,)
    elif policy.to_verify(job):
        pen.wake(job, "verify")
        job = job.evolve(due_at=pen.now)
    elif report.type is Fact.TRAINING_PROGRESS:
        job = _relay_progress(pen, job)
    elif report.type is Fact.TRAINING_SAMPLE:
        job = pen.owe(job, "job.sample", {"sample": dict(report.data)})
    return job, Outcome.APPLIED, orders


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    return min((at for at in (one, other) if at is not None), default=None)


def _reason(data: Mapping[str, Any]) -> Reason:
    code = str(data.get("code") or "agent.error")[:100]
    if code.startswith(SERVERS_WORDS):
        code = f"agent.{code}"
    return Reason(
        code=code,
        message=str(data.get("message") or "the agent reported an error without a message")[:2000],
        retryable=bool(data.get("retryable", True)),
    )


def _relay_progress(pen: _Pen, job: Job) -> Job:
    """Owe a `job.progress`: on whole per cents, and not more often than the policy says."""
    training = job.progress.get("training", {})
    step, total = training.get("step"), training.get("total")
    if not isinstance(step, int) or not isinstance(total, int) or total < 1:
        return job
    percent = 100 * step // total
    last = job.progress.get("relayed", {})
    pause = policy.for_job(job, pen.rules).progress_pause
    soon = pen.now.timestamp() - last.get("at", 0.0) < pause.total_seconds()
    if soon or percent == last.get("percent"):
        return job
    relayed = {"at": pen.now.timestamp(), "percent": percent}
    job = job.evolve(progress={**job.progress, "relayed": relayed})
    return pen.owe(job, "job.progress", {"progress": dict(training)})


# --- the agent's hello, and machines that fail before it --------------------------------------

#: The same nonce within this time gets the same answer: the first one may have been lost.
HELLO_AGAIN = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A machine whose agent may have its job now; `again`, when it has it already."""

    job: Job
    attempt: Attempt
    lease: Lease
    again: bool


def knock(
    tx: Transaction, token_hash: str, nonce: str, now: datetime, *, lock: bool = False
) -> Admission:
    """Who is there with a token, and may it come in? Whoever is let in runs: with `lock`, that
    is kept on its lease.

    Raises:
        TokenRefused: the token is unknown, expired, revoked, or was used by somebody else.
        AttemptOver: the attempt is over, or another machine of it was ready first.
    """
    found = tx.lease_by_token(token_hash)
    if found is None:
        raise TokenRefused
    # Jobs are locked before what hangs on them, here as everywhere.
    job = tx.job(found.job, lock=lock)
    lease = tx.lease(found.id, lock=lock)
    attempt = tx.attempt(job.id, lease.attempt, lock=lock)
    again = job.lease == lease.id
    late = attempt.hello_at is None or now - attempt.hello_at > HELLO_AGAIN
    if again and (late or attempt.nonce != nonce):
        raise TokenRefused
    if lease.token_expires_at is None or now >= lease.token_expires_at:
        raise TokenRefused
    over = lease.attempt != job.attempt or not job.active or not lease.open
    if over or lease.status is LeaseStatus.RELEASING or job.lease not in ("", lease.id):
        raise AttemptOver
    if lock and lease.running_at is None:
        lease = lease.evolve(running_at=now)
        tx.save_lease(lease)
    return Admission(job=job, attempt=attempt, lease=lease, again=again)


def admit(
    tx: Transaction,
    seen: Admission,
    *,
    nonce: str,
    secret: Secret,
    now: datetime,
    machine: Mapping[str, Any] | None = None,
    rules: Policy = policy.DEFAULT,
) -> Secret:
    """Give the attempt to the machine of `seen` (knocked with `lock`); the secret that its agent
    signs with: `secret`, or the one that it got before. The other machine of a hedged boot goes.
    """
    if seen.again and seen.attempt.secret is not None:
        return seen.attempt.secret
    tx.save_attempt(seen.attempt.evolve(nonce=nonce, hello_at=now, secret=secret))
    tx.save_lease(seen.lease.evolve(ready_at=now))
    pen = _Pen(tx, now, rules)
    job = seen.job.evolve(lease=seen.lease.id, last_heard_at=now, moved_at=now)
    job = pen.note(job, "agent.hello", {"lease": seen.lease.id, "machine": dict(machine or {})})
    pen.release(job, LOST_RACE, but=seen.lease.id)
    pen.flush([job.evolve(due_at=policy.next_look(job, rules))])
    return secret


def token_reused(
    tx: Transaction, token_hash: str, nonce: str, now: datetime, rules: Policy = policy.DEFAULT
) -> Job | None:
    """A refused token: if it was used before with another nonce, two parties know it. Then it is
    revoked and the job goes elsewhere; the stalled job, else None."""
    found = tx.lease_by_token(token_hash)
    if found is None:
        return None
    job = tx.job(found.job, lock=True)
    lease = tx.lease(found.id, lock=True)
    attempt = tx.attempt(job.id, lease.attempt, lock=True)
    mine = job.lease == lease.id and job.active
    if not mine or attempt.nonce == nonce:
        return None
    tx.save_lease(lease.evolve(token_expires_at=lease.created_at))
    pen = _Pen(tx, now, rules)
    job = pen.note(job, "agent.token_reused", {"lease": lease.id})
    words = "the machine's bootstrap token was used a second time, by somebody else"
    job = pen.stall(job, Reason(code="host.token_reused", message=words))
    pen.flush([job])
    return job


def machine_failed(
    tx: Transaction, lease_id: str, reason: Reason, now: datetime, rules: Policy = policy.DEFAULT
) -> Job | None:
    """The machine of a lease will not do its job: the job as it is now, None when nothing changed.

    Before its agent said hello another machine is tried within the same attempt; after that, when
    no machine would do, and when the attempt has tried enough of them, the job stalls.
    """
    try:
        job = tx.job(tx.lease(lease_id).job, lock=True)
    except NotFound:
        return None
    lease = tx.lease(lease_id, lock=True)
    if not lease.open or lease.status is LeaseStatus.RELEASING:
        return None
    if not job.active or job.attempt != lease.attempt or job.lease not in ("", lease.id):
        return None
    pen = _Pen(tx, now, rules)
    leases = (item for item in tx.leases_of(job.id) if item.attempt == job.attempt)
    tried = [item for item in leases if item.rented_at]
    alone = not any(item.open and item.id != lease.id for item in tried)
    if job.lease or not reason.retryable or (alone and len(tried) >= rules.machines):
        if policy.to_verify(job):
            return None
        job = pen.stall(job, reason)
    else:
        data = {"lease": lease.id, "machine": lease.machine_id, "reason": reason.to_dict()}
        job = pen.note(pen.blame(job, lease, reason), "machine.failed", data)
        pen.let_go(lease, reason.message)
        job = job.evolve(due_at=now)
    pen.flush([job])
    return job


# --- the server's own moves -------------------------------------------------------------------


def create_job(
    tx: Transaction,
    request: JobRequest,
    *,
    owner: str,
    now: datetime,
    job_id: str,
    webhook_secrets: Sequence[Secret] = (),
    rules: Policy = policy.DEFAULT,
) -> Job:
    """Store a new job; with a ready dataset it starts as `pendingGpu` at once.

    Raises:
        NotFound: no such dataset.
        Conflict: the dataset was refused.
    """
    dataset = tx.dataset(request.dataset_id, lock=True)
    if dataset.status is DatasetStatus.REFUSED:
        raise Conflict(f"dataset {dataset.id} has no usable image; see its report")
    deadline = now + rules.deadlines[Status.PENDING]
    job = Job(
        id=job_id,
        owner=owner,
        request=request,
        created_at=now,
        entered_at=now,
        deadline_at=deadline,
        due_at=deadline,
    )
    tx.add_job(job, webhook_secrets=webhook_secrets)
    pen = _Pen(tx, now, rules)
    job = pen.note(job, "job.created", {"dataset": request.dataset_id, "base": request.base})
    if dataset.status is DatasetStatus.READY:
        job, steps = machine.move(job, Move.DATASET_READY, now)
        job = pen.passed(job, steps)
    pen.flush([job])
    return job


def seal(tx: Transaction, dataset_id: str, now: datetime) -> Dataset:
    """No more uploads; the zip is to be built. Sealing twice is harmless. Raises: NotFound."""
    dataset = tx.dataset(dataset_id, lock=True)
    if dataset.status is DatasetStatus.OPEN:
        dataset = dataset.evolve(status=DatasetStatus.BUILDING, due_at=now)
        tx.save_dataset(dataset)
    return dataset


def dataset_built(
    tx: Transaction, dataset: Dataset, now: datetime, rules: Policy = policy.DEFAULT
) -> list[Job]:
    """Store a dataset that is now ready or refused, and move the jobs that waited for it."""
    tx.save_dataset(dataset.evolve(due_at=None))
    waiting = tx.list_jobs(dataset=dataset.id, statuses=[Status.PENDING], limit=10_000)
    jobs = tx.jobs([job.id for job in waiting], lock=True)
    pen = _Pen(tx, now, rules)
    moved: list[Job] = []
    for job in jobs.values():
        if job.status is not Status.PENDING:
            continue
        if dataset.status is DatasetStatus.READY:
            job, steps = machine.move(job, Move.DATASET_READY, now)
            moved.append(pen.passed(job, steps))
        else:
            message = str(dataset.report.get("message", "no usable image in the dataset"))
            reason = Reason(code="dataset.refused", message=message, retryable=False)
            moved.append(pen.stall(job, reason))
    pen.flush(moved)
    return moved


def stall(
    tx: Transaction, job_id: str, reason: Reason, now: datetime, rules: Policy = policy.DEFAULT
) -> Job:
    """Stall a job. Raises: NotFound, IllegalMove (it is stalled or over already)."""
    job = tx.job(job_id, lock=True)
    pen = _Pen(tx, now, rules)
    job = pen.stall(job, reason)
    pen.flush([job])
    return job


def verified(
    tx: Transaction, job_id: str, attempt: int, now: datetime, rules: Policy = policy.DEFAULT
) -> Job:
    """The uploaded weights of `attempt` are what the agent said. Raises: NotFound, IllegalMove."""
    job = tx.job(job_id, lock=True)
    if job.attempt != attempt:
        raise IllegalMove(f"job {job.id}", f"weights.verified of attempt {attempt}", job.status)
    pen = _Pen(tx, now, rules)
    job, steps = machine.move(job, Move.WEIGHTS_VERIFIED, now)
    job = pen.passed(job, steps)
    lease = next(iter(_machines_of(tx, job)), None)
    if job.status is Status.COMPLETED and lease is not None:
        pen.remember(lease, hosts.finished(_host(tx, lease), lease, job, now))
    pen.flush([job])
    return job


def cancel(tx: Transaction, job_id: str, now: datetime, rules: Policy = policy.DEFAULT) -> Job:
    """Cancel a job; again is harmless. Raises: NotFound, IllegalMove (completed or failed)."""
    job = tx.job(job_id, lock=True)
    if job.status is Status.CANCELLED:
        return job
    pen = _Pen(tx, now, rules)
    job, steps = machine.move(job, Move.CANCEL, now)
    job = pen.passed(job, steps)
    pen.flush([job])
    return job


def retry(tx: Transaction, job_id: str, now: datetime, rules: Policy = policy.DEFAULT) -> Job:
    """Start the next attempt of a stalled job now; again is harmless, as long as it waits for its
    machine. Raises: NotFound, IllegalMove."""
    job = tx.job(job_id, lock=True)
    if job.status is Status.PENDING_GPU and job.attempt > 1:
        return job
    pen = _Pen(tx, now, rules)
    job, steps = machine.move(job, Move.RETRY, now)
    job = pen.passed(job, steps)
    pen.flush([job])
    return job


def order(tx: Transaction, job_id: str, what: Order, now: datetime) -> Job:
    """Give the agent an order with its next report. Raises: NotFound, IllegalMove."""
    job = tx.job(job_id, lock=True)
    if job.status is not Status.TRAINING:
        raise IllegalMove(f"job {job.id}", str(what), job.status)
    if what not in job.orders:
        job = job.evolve(orders=(*job.orders, str(what)))
        tx.save_job(job)
    return job


def wakes(job: Job) -> tuple[str, ...]:
    """The tasks that a job as it now stands may need; waking one too many is harmless."""
    if job.status is Status.PENDING_GPU:
        return ("allocate", "relay")
    if policy.to_verify(job):
        return ("verify", "relay")
    return ("deallocate", "relay") if not job.active else ("relay",)
