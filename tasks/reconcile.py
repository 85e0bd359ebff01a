"""Finding due work in the database, so that no lost message is ever missed.

The pass costs what is due, not what exists. It makes the server's own moves (stall, retry) and
wakes tasks for whatever needs the network. Two passes at once take different rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from state import policy, record
from state.errors import IllegalMove
from state.job import Job
from state.policy import Policy, Step
from state.store import Store, Transaction

#: For so long a claimed row is left to whoever was woken for it; then it is due again.
CLAIM = timedelta(seconds=30)
BATCH = 200
#: Under this name the receivers of reports give their sign of life.
RECEIVER = "receiver"

#: Steps that a task does; the job stays claimed, and is due again if the message is lost.
_WOKEN = {Step.ALLOCATE: ("allocate",), Step.VERIFY: ("verify",)}

#: wake(task, subject ids): a message to a worker; losing it costs only latency.
Wake = Callable[[str, Sequence[str]], None]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass took in hand."""

    jobs: int = 0
    leases: int = 0
    datasets: int = 0
    webhooks: int = 0

    @property
    def total(self) -> int:
        return self.jobs + self.leases + self.datasets + self.webhooks


def reconcile(
    store: Store, wake: Wake, now: datetime, rules: Policy = policy.DEFAULT, batch: int = BATCH
) -> Pass:
    """One pass over all that is due at `now`."""
    until = now + CLAIM
    with store.transaction() as tx:
        jobs = tx.claim_due_jobs(now, until, batch)
        since = policy.listening_since(tx.beats().get(RECEIVER), now)
    for job in jobs:
        for task in _look(store, job, now, rules, since):
            wake(task, [job.id])
    with store.transaction() as tx:
        leases = tx.claim_due_leases(now, until, batch)
        datasets = tx.claim_due_datasets(now, until, batch)
        # Not claimed here: the relay claims each row itself, for its own span.
        webhooks = tx.claim_due_outgoing(now, now, batch)
        tx.beat("reconcile", now)
    if leases:
        wake("tend", [lease.id for lease in leases])
    for dataset in datasets:
        wake("build", [dataset.id])
    for job_id in webhooks:
        wake("relay", [job_id])
    return Pass(jobs=len(jobs), leases=len(leases), datasets=len(datasets), webhooks=len(webhooks))


def _look(store: Store, job: Job, now: datetime, rules: Policy, since: datetime) -> tuple[str, ...]:
    """Do the one step that `job` needs; the tasks to wake for it."""
    step = policy.decide(job, now, rules, since=since).step
    if step in _WOKEN:
        return _WOKEN[step]
    with store.transaction() as tx:
        # The claim showed the job as it was; under the lock it may have moved on.
        job = tx.job(job.id, lock=True)
        decision = policy.decide(job, now, rules, since=since)
        if decision.step in _WOKEN:
            return _WOKEN[decision.step]
        try:
            moved = _move(tx, job, decision, now, rules)
        except IllegalMove:
            return ()
        if moved is None:
            tx.save_job(job.evolve(due_at=decision.at))
            return ()
    return record.wakes(moved)


def _move(
    tx: Transaction, job: Job, decision: policy.Decision, now: datetime, rules: Policy
) -> Job | None:
    if decision.step is Step.RETRY:
        return record.retry(tx, job.id, now, rules)
    if decision.step is Step.STALL and decision.reason is not None:
        return record.stall(tx, job.id, decision.reason, now, rules)
    return None
