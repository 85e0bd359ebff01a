"""What money went into: training, boots, failures and the rest. Micro-USD; pure.

`state.money.spent` alone says what a lease cost; here that amount is only given a name, so sums
agree with the leases to the micro-dollar. A machine counts where it was rented: on that day (UTC),
for that job, on that host. An orphan, which nobody rented, counts where it began.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from state import money
from state.job import Job, Status
from state.lease import Lease, LeaseStatus
from state.orphan import Orphan
from state.renting import LOST_RACE


class GroupBy(enum.StrEnum):
    DAY = "day"
    HOST = "host"
    GPU = "gpu"
    JOB = "job"
    OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Split:
    """Money by what it went into.

    Attributes:
        machines: instances that were rented; orphans are none of them.
        completed: jobs that were completed, counted with the machine that did it.
        training: of machines whose agent said hello, from then on, unless their attempt failed.
        boot: of the same machines, from the create call until the hello; and of those that boot.
        failed: of machines whose attempt failed, or that never became ready, from first to last.
        other: of machines that nobody is to blame for and that trained nothing: the slower of two
            that were rented for one attempt, those whose job was cancelled while they booted.
        orphan: of instances that no open lease was for, as `state.money.orphaned` says; of one
            whose lease was closed too early, what it cost after that.
    """

    machines: int = 0
    completed: int = 0
    training: int = 0
    boot: int = 0
    failed: int = 0
    other: int = 0
    orphan: int = 0

    @property
    def total(self) -> int:
        return self.training + self.boot + self.failed + self.other + self.orphan

    @property
    def per_completed(self) -> int | None:
        """What a completed job cost, with all that went wrong beside it."""
        return round(self.total / self.completed) if self.completed else None

    def __add__(self, more: Split) -> Split:
        return Split(
            self.machines + more.machines,
            self.completed + more.completed,
            self.training + more.training,
            self.boot + more.boot,
            self.failed + more.failed,
            self.other + more.other,
            self.orphan + more.orphan,
        )


NOTHING = Split()


def of(lease: Lease, job: Job | None, now: datetime) -> Split:
    """One lease's money. `job` is the one that it was rented for, where there still is one."""
    if lease.rented_at is None:
        return NOTHING
    amount = money.spent(lease, now)
    won = job is not None and job.status is Status.COMPLETED and job.lease == lease.id
    if _failed(lease, job):
        return Split(1, failed=amount)
    if lease.ready_at is not None:
        boot = _until(lease.ready_at, amount, lease, now)
        return Split(1, int(won), training=amount - boot, boot=boot)
    if _goes(lease) or job is None:
        return Split(1, other=amount)
    return Split(1, boot=amount)


def _goes(lease: Lease) -> bool:
    return lease.status in (LeaseStatus.RELEASING, LeaseStatus.RELEASED)


def _failed(lease: Lease, job: Job | None) -> bool:
    if job is None or lease.why == LOST_RACE:
        return False
    if lease.attempt < job.attempt or job.status in (Status.STALLED, Status.FAILED):
        return True
    return _goes(lease) and lease.ready_at is None and job.status is not Status.CANCELLED


def _until(when: datetime, amount: int, lease: Lease, now: datetime) -> int:
    """The share of `amount` that the time until `when` has in the lease's whole time."""
    began = lease.rented_at or when
    whole = ((lease.released_at or now) - began).total_seconds()
    part = min(max(0.0, (when - began).total_seconds()), whole)
    return round(amount * part / whole) if whole > 0 else amount


_KEYS: Mapping[GroupBy, Callable[[Lease | Orphan, datetime, Job | None], str]] = {
    GroupBy.DAY: lambda machine, began, job: began.astimezone(UTC).date().isoformat(),
    GroupBy.HOST: lambda machine, began, job: machine.machine_id,
    GroupBy.GPU: lambda machine, began, job: machine.gpu_name,
    GroupBy.JOB: lambda machine, began, job: machine.job,
    GroupBy.OWNER: lambda machine, began, job: job.owner if job else "",
}


def add(
    groups: dict[str, Split],
    leases: Iterable[Lease],
    jobs: Mapping[str, Job],
    group_by: GroupBy,
    now: datetime,
) -> None:
    """Add these leases to their `groups`; what was never rented cost nothing, and is in none."""
    key = _KEYS[group_by]
    for lease in leases:
        job = jobs.get(lease.job)
        split = of(lease, job, now)
        if split.machines:
            name = key(lease, lease.created_at, job)
            groups[name] = groups.get(name, NOTHING) + split


def add_orphans(
    groups: dict[str, Split],
    orphans: Iterable[Orphan],
    jobs: Mapping[str, Job],
    group_by: GroupBy,
    now: datetime,
) -> None:
    """Add what these orphans cost to their `groups`; those that cost nothing are in none."""
    key = _KEYS[group_by]
    for orphan in orphans:
        if amount := money.orphaned(orphan, now):
            name = key(orphan, orphan.started_at, jobs.get(orphan.job))
            groups[name] = groups.get(name, NOTHING) + Split(orphan=amount)
