"""What machines cost, and what may still be spent. Micro-USD throughout.

Values in, decisions out: nothing here reads a clock, a database or a market.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from state import policy
from state.job import Job, Reason
from state.lease import Lease, LeaseStatus
from state.orphan import Orphan
from state.policy import Policy

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
#: A machine that cannot be paid for so long is not worth its boot.
LEAST_SPAN = timedelta(minutes=3)
#: Failed machines are forgotten after so long.
FAILURES_REMEMBERED = timedelta(hours=6)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a machine cost, by what the market bills apart."""

    gpu: int = 0
    disk: int = 0
    bandwidth: int = 0

    @property
    def total(self) -> int:
        return self.gpu + self.disk + self.bandwidth


def cost(lease: Lease, now: datetime) -> Cost:
    """What a lease has cost until `now` by our own count.

    The disk is billed from the create call until the instance is gone, the GPU only while it
    runs: that began between the last look that showed it booting and the first that showed it
    running. While it is open the count is never less than the truth; once it is released, it
    takes the middle of that time, and is wrong by half of it at most.
    """
    if lease.rented_at is None:
        return Cost()
    gone = lease.released_at or now
    began = lease.booting_at or lease.rented_at
    ran_from = began if lease.running_at is None else min(began, lease.running_at)
    if lease.released_at and lease.running_at:
        ran_from += (lease.running_at - ran_from) / 2
    ran_until = min(lease.ended_at or gone, gone)
    return Cost(
        gpu=_for(lease.price - lease.storage_price, (ran_until - ran_from) * lease.pace),
        disk=_for(lease.storage_price, (gone - lease.rented_at) * lease.pace),
        bandwidth=bandwidth(lease),
    )


def bandwidth(lease: Lease) -> int:
    return round((lease.received * lease.download_price + lease.sent * lease.upload_price) / 1e9)


def spent(lease: Lease, now: datetime) -> int:
    """What counts for a lease: what the market charged once that is final, until then the more
    of that and of our own count."""
    if lease.billed is None:
        return lease.cost if lease.released_at else cost(lease, now).total
    final = lease.released_at is not None and lease.due_at is None
    return lease.billed if final else max(lease.billed, lease.cost)


def worst(lease: Lease) -> int:
    """What an open lease may cost in all."""
    return _for(lease.price, (lease.expires_at - lease.created_at) * lease.pace) + bandwidth(lease)


def within(lease: Lease, start: datetime, end: datetime, now: datetime) -> int:
    """What a lease costs at most between two times; an open one may last until it expires."""
    began = lease.rented_at or lease.created_at
    if not lease.open and lease.rented_at is None:
        return 0
    last = lease.released_at or max(lease.expires_at, now)
    moved = bandwidth(lease) if start <= began < end else 0
    return _for(lease.price, min(last, end) - max(began, start)) + moved


def orphaned(orphan: Orphan, now: datetime) -> int:
    """What an orphan cost from its start to its end, or until `now`: its whole price, which is
    more than the truth by the GPU's part of the time in which it did not run, and its image."""
    return _for(orphan.price, (orphan.end or now) - orphan.started_at) + orphan.pulled


def orphaned_within(orphan: Orphan, start: datetime, end: datetime, now: datetime) -> int:
    """What an orphan cost between two times, as far as they have come."""
    pulled = orphan.pulled if start <= orphan.started_at < end else 0
    lasted = min(orphan.end or now, end) - max(orphan.started_at, start)
    return _for(orphan.price, lasted) + pulled


def _for(price: int, span: timedelta) -> int:
    """`price` per hour for `span`; nothing for a span that ended before it began."""
    return round(price * max(0.0, span.total_seconds()) / 3600)


# --- one job's money --------------------------------------------------------------------------


def closed(leases: Sequence[Lease], now: datetime) -> int:
    """What those of `leases` cost that are over."""
    return sum(spent(lease, now) for lease in leases if not lease.open)


def left(job: Job, closed: int, leases: Sequence[Lease], now: datetime) -> int:
    """What `job` may still spend: its cap, less what its closed leases cost (`closed`), and less
    what its open ones have cost so far, counted from their creation where nobody knows better."""
    opened = (lease for lease in leases if lease.open)
    known = (lease.evolve(rented_at=lease.rented_at or lease.created_at) for lease in opened)
    return job.request.max_cost - closed - sum(cost(lease, now).total for lease in known)


def span(
    price: int,
    moved: int,
    remaining: int,
    beside: Sequence[Lease],
    race: timedelta,
    rules: Policy = policy.DEFAULT,
) -> timedelta:
    """How long a machine at `price` may be held by a job with `remaining` to spend, that moves
    bytes for `moved`: the policy's span, or what is left when those `beside` it, which will be
    gone after the `race`, are paid."""
    pays = remaining - moved - sum(_for(lease.price, race * lease.pace) for lease in beside)
    if pays <= 0:
        return timedelta(0)
    return min(rules.lease, timedelta(hours=pays / price)) if price else rules.lease


#: The code of a job whose own cap stands in the way.
JOB = "budget.job"


def used_up(job: Job, closed: int) -> Reason:
    cap, so_far = dollars(job.request.max_cost), dollars(closed)
    message = f"the job has cost {so_far} of at most {cap}; the rest pays for no machine"
    return Reason(code=JOB, message=message, retryable=False)


# --- the deployment's money -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a deployment may spend and hold. Micro-USD; a limit of 0 is none.

    Attributes:
        per_hour, per_day: spent within a clock hour or a day of UTC, and within the next one.
        total: spent in all, ever.
        machines: rented at the same time.
        rate: micro-USD per hour for all machines together.
        runway: the account's credit must pay all machines for so long.
        rentals_per_minute, rentals_per_hour: instances created.
        failures: instances in a row that never became ready; then renting pauses.
    """

    per_hour: int = 0
    per_day: int = 0
    total: int = 0
    machines: int = 0
    rate: int = 0
    runway: timedelta = timedelta(0)
    rentals_per_minute: int = 0
    rentals_per_hour: int = 0
    failures: int = 0

    def horizon(self, now: datetime, rules: Policy = policy.DEFAULT) -> datetime | None:
        """Leases created since then matter to these limits, besides open ones; None: none do."""
        times = []
        if self.per_day:
            times.append(_begin(now, DAY) - rules.lease)
        if self.per_hour:
            times.append(_begin(now, HOUR) - rules.lease)
        if self.rentals_per_minute or self.rentals_per_hour:
            times.append(now - HOUR)
        if self.failures:
            times.append(now - FAILURES_REMEMBERED)
        return min(times, default=None)


NO_LIMITS = Limits()


def over_limit(
    limits: Limits,
    leases: Sequence[Lease],
    new: Lease,
    *,
    spent_ever: int,
    credit: int | None,
    now: datetime,
    orphans: Sequence[Orphan] = (),
) -> Reason | None:
    """Why `new` may not be rented beside `leases` (those since the horizon, and all open ones)
    and `orphans` (likewise), or None when it may."""
    with_new = [*leases, new]
    for name, used, limit in usage(limits, with_new, spent_ever, now, orphans):
        if used > limit:
            most = f"{used} of at most {limit} machines would be rented"
            if name != "machines":
                most = f"{dollars(used)} of at most {dollars(limit)} would be spent or set aside"
            return Reason(code=f"budget.{name}", message=f"{WORDS[name]}: {most}")
    rate = burn(with_new)
    if credit is not None and credit < _for(rate, limits.runway):
        words = f"{dollars(credit)} of credit pay {dollars(rate)}/h for less than {limits.runway}"
        return Reason(code="runway.low", message=words)
    return None


#: What a budget is for, by the end of its code.
WORDS = {
    "machines": "machines at the same time",
    "rate": "money per hour for all machines",
    "hour": "budget per hour",
    "day": "budget per day",
    "total": "budget in all",
}


def usage(
    limits: Limits,
    leases: Sequence[Lease],
    spent_ever: int,
    now: datetime,
    orphans: Sequence[Orphan] = (),
) -> Iterator[tuple[str, int, int]]:
    """Of each limit that is set: its name, what is used or set aside of it, the limit."""
    held = [lease for lease in leases if lease.open]
    if limits.machines:
        yield "machines", len(held), limits.machines
    if limits.rate:
        yield "rate", burn(held), limits.rate
    for name, limit, length in (("hour", limits.per_hour, HOUR), ("day", limits.per_day, DAY)):
        begin = _begin(now, length)
        if limit:
            spans = ((begin, begin + length), (begin + length, begin + 2 * length))
            worst_of = (
                sum(within(item, *span, now) for item in leases)
                + sum(orphaned_within(item, *span, now) for item in orphans)
                for span in spans
            )
            yield name, max(worst_of), limit
    if limits.total:
        yield "total", spent_ever + sum(lease.reserved for lease in held), limits.total


def burn(leases: Sequence[Lease]) -> int:
    """Micro-USD per hour of all machines that are not being released."""
    return sum(lease.price for lease in leases if lease.open and not _going(lease))


def _going(lease: Lease) -> bool:
    return lease.status is LeaseStatus.RELEASING


def _begin(now: datetime, length: timedelta) -> datetime:
    """The clock hour's, or the UTC day's."""
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if length >= DAY else now.replace(minute=0, second=0, microsecond=0)


def dollars(micro: int) -> str:
    """Micro-USD for people."""
    return f"${micro / 1_000_000:.4f}" if abs(micro) < 1_000_000 else f"${micro / 1_000_000:.2f}"
