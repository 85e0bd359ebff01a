"""What machines cost, and what may still be spent. Micro-USD throughout.

Values in, decisions out: nothing here reads a clock, a database or a market.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from state import policy
from state.job import Job, Reason
from state.lease import Lease
from state.policy import Policy


def cost(lease: Lease, now: datetime) -> int:
    """Micro-USD that a lease has cost until `now`, by its offered price.

    Counted from the answer to the create call until the instance was seen gone; what the market
    does not bill (loading is free on Vast.ai) makes the true figure smaller, never larger.
    """
    if lease.rented_at is None:
        return 0
    end = lease.released_at or now
    return round(lease.price * max(0.0, (end - lease.rented_at).total_seconds()) / 3600)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Micro-USD; a limit of 0 is none. `reserved` is what open leases may still cost."""

    per_hour: int = 0
    per_day: int = 0
    spent_hour: int = 0
    spent_day: int = 0
    reserved: int = 0


def over_budget(job: Job, spent: int, price: int, hours: float, budget: Budget) -> Reason | None:
    """Why `price` per hour for `hours` may not be rented for `job`, or None when it may."""
    coming = round(price * hours)
    if spent >= job.request.max_cost:
        return Reason(
            code="budget.job",
            message=f"the job has cost {dollars(spent)} of at most {dollars(job.request.max_cost)}",
            retryable=False,
        )
    for name, limit, used in (
        ("hour", budget.per_hour, budget.spent_hour),
        ("day", budget.per_day, budget.spent_day),
    ):
        if limit and used + budget.reserved + coming > limit:
            return Reason(
                code=f"budget.{name}",
                message=f"{dollars(used)} spent and {dollars(budget.reserved)} reserved of "
                f"{dollars(limit)} per {name}",
            )
    return None


def lease_hours(job: Job, spent: int, price: int, rules: Policy = policy.DEFAULT) -> float:
    """How long a machine at `price` may be held: the policy's span, or what the cap still pays."""
    allowed = rules.lease.total_seconds() / 3600
    return min(allowed, max(0, job.request.max_cost - spent) / price) if price else allowed


def dollars(micro: int) -> str:
    """Micro-USD for people."""
    return f"${micro / 1_000_000:.4f}" if abs(micro) < 1_000_000 else f"${micro / 1_000_000:.2f}"
