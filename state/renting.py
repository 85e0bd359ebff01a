"""When a job needs a machine, and when a machine must go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from state import policy
from state.job import Job, Status
from state.lease import Lease, LeaseStatus
from state.policy import Policy, Step


def wanted(
    job: Job, leases: Sequence[Lease], now: datetime, rules: Policy = policy.DEFAULT
) -> bool:
    """Whether `job`, which has these leases, needs a machine now: its first, or one beside
    another that is slow to boot."""
    if policy.decide(job, now, rules).step is not Step.ALLOCATE:
        return False
    held = [lease for lease in leases if lease.open]
    if not held:
        return True
    hedge_at = hedged_from(job, held[0], rules)
    return len(held) == 1 and hedge_at is not None and now >= hedge_at


def hedged_from(job: Job, lease: Lease, rules: Policy = policy.DEFAULT) -> datetime | None:
    """When a second machine is rented beside `lease`, unless its agent is heard before; None
    for never."""
    may = job.request.hedge and lease.attempt == job.attempt
    if not may or lease.status is not LeaseStatus.RENTED or lease.rented_at is None:
        return None
    rules = policy.for_job(job, rules)
    expected = timedelta(seconds=lease.boot_s / rules.pace)
    return lease.rented_at + max(rules.hedge_least, expected)


#: Lists may lag behind a machine that boots fast for so long.
LIST_LAG = timedelta(seconds=30)


def release_pause(tries: int) -> timedelta:
    """Pause before the next look at a lease that is being released: 1, 2, 4 … 60 s, for ever."""
    return timedelta(seconds=min(60, 2 ** min(tries, 6)))


def settled(lease: Lease, now: datetime, rules: Policy = policy.DEFAULT) -> bool:
    """Whether a lease is so old that lists without its instance prove that there is none: a young
    instance may be in no list yet."""
    return now - (lease.rented_at or lease.created_at) >= rules.settle


def is_proof(lease: Lease, now: datetime, rules: Policy = policy.DEFAULT) -> bool:
    """Whether the absence of its instance from lists says that it is gone: one showed it before,
    or its agent was heard and lists had the time to catch up, or it is `settled`. The list of
    machines that pretend lags behind nothing."""
    if lease.seen_at is not None or lease.rehearsed:
        return True
    heard = lease.running_at is not None or lease.ready_at is not None
    caught_up = lease.rented_at is not None and now - lease.rented_at >= LIST_LAG
    return (heard and caught_up) or settled(lease, now, rules)


def last_words_at(lease: Lease, now: datetime) -> datetime:
    """When somebody must look at a rented lease again: in time for a last checkpoint, and when
    it ends."""
    early = lease.expires_at - LAST_WORDS
    return early if early > now else lease.expires_at


def not_believable(leases: Sequence[Lease], listed: Collection[str]) -> bool:
    """Whether a readable list of instance ids is likelier wrong than right: of several machines
    that were seen, and that nobody destroyed, it shows none."""
    rented = [lease for lease in leases if lease.status is LeaseStatus.RENTED and lease.seen_at]
    return len(rented) > 1 and not any(lease.instance_id in listed for lease in rented)


def wants_release(lease: Lease, job: Job | None, now: datetime) -> str | None:
    """Why this lease must go now, or None while it may stay."""
    if lease.status in (LeaseStatus.RELEASING, LeaseStatus.RELEASED):
        return None
    if job is None:
        return "its job is unknown"
    if now >= lease.expires_at:
        return "its lease ended"
    if job.terminal or job.status is Status.STALLED:
        return f"its job is {job.status}"
    if lease.attempt != job.attempt:
        return f"its job is at attempt {job.attempt}"
    if job.lease not in ("", lease.id):
        return LOST_RACE
    return None


#: A last checkpoint is ordered so long before a lease ends.
LAST_WORDS = timedelta(minutes=2)
#: Why the slower of two machines goes.
LOST_RACE = "another machine was ready first"
