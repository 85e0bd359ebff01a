"""What stops all renting of a deployment. Nothing here ever stops releasing.

The breaker keeps no state of its own: what happened is in the leases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from state import money, policy
from state.job import Reason, Status
from state.lease import Lease, LeaseStatus
from state.money import Limits
from state.orphan import Orphan
from state.policy import Policy
from state.renting import LOST_RACE
from state.store import Transaction

Beats = Mapping[str, tuple[datetime, Mapping[str, Any]]]
#: Beats: an operator's word, the last list read, the last that could not be, likewise the credit.
RENTING, SWEEP, UNREADABLE = "renting", "sweep", "sweep.unreadable"
CREDIT, NO_CREDIT_READ = "credit", "credit.unreadable"
#: Somebody's machine was stopped because the account has no credit.
CREDIT_GONE = "account.credit"
#: An account whose list could not be read for so long is not one to rent on.
BLIND = timedelta(seconds=60)
#: A credit read longer ago says nothing.
CREDIT_FRESH = timedelta(minutes=10)
#: The breaker's first pause, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = timedelta(minutes=1), timedelta(minutes=30)
#: A lease that goes for one of these is no failure of its machine.
_NO_FAILURES = (LOST_RACE, f"its job is {Status.CANCELLED}")


@dataclass(frozen=True, kw_only=True)
class Book:
    """What a decision on renting looks at: leases since the limits' horizon and all open ones,
    oldest first; the beats; what was spent ever (micro-USD); orphans
    likewise, if a limit counts them."""

    leases: Sequence[Lease]
    beats: Beats
    spent_ever: int = 0
    orphans: Sequence[Orphan] = ()


def read(tx: Transaction, limits: Limits, now: datetime, rules: Policy = policy.DEFAULT) -> Book:
    beats = tx.beats()
    if limits == money.NO_LIMITS:
        return Book(leases=(), beats=beats)
    horizon = limits.horizon(now, rules)
    recent = tx.leases_since(horizon) if horizon else []
    found = {lease.id: lease for lease in (*tx.open_leases(), *recent)}
    leases = sorted(found.values(), key=lambda lease: (lease.created_at, lease.id))
    ever = tx.spend_since(datetime.min.replace(tzinfo=now.tzinfo)) if limits.total else 0
    orphans = {}
    if horizon and (limits.per_hour or limits.per_day):
        past = tx.orphans_between(horizon, now)
        orphans = {orphan.id: orphan for orphan in (*tx.open_orphans(), *past)}
    return Book(leases=leases, beats=beats, spent_ever=ever, orphans=tuple(orphans.values()))


#: Codes of what stops all renting, whatever it is.
HOLD_ALL = frozenset(
    {"kill_switch.on", "list.doubtful", "list.unreadable", CREDIT_GONE, "breaker.open"}
)


def stopped(
    book: Book, limits: Limits, now: datetime, *, kill_switch: bool = False
) -> Reason | None:
    """Why nothing may be rented now, whatever it is; None when something may."""
    return (
        switched_off(book.beats, kill_switch)
        or _blind(book.beats, now)
        or _no_credit(book.beats, now)
        or breaker(book.leases, limits, now)
    )


def refused(book: Book, limits: Limits, new: Lease, now: datetime) -> Reason | None:
    """Why `new` may not be rented beside what there is."""
    return money.over_limit(
        limits,
        book.leases,
        new,
        spent_ever=book.spent_ever,
        credit=credit(book.beats, now),
        now=now,
        orphans=book.orphans,
    )


def switched_off(beats: Beats, kill_switch: bool) -> Reason | None:
    """Why an operator's word stops renting, if it does."""
    said = beats.get(RENTING)
    if said is not None and said[1].get("stopped"):
        why = said[1].get("why") or "no reason given"
        return Reason(code="kill_switch.on", message=f"renting was stopped by an operator: {why}")
    if kill_switch:
        words = "renting is switched off by the operator (STOKER_KILL_SWITCH)"
        return Reason(code="kill_switch.on", message=words)
    return None


def unreadable_since(beats: Beats, bad: str = UNREADABLE, good: str = SWEEP) -> datetime | None:
    """Since when the account's list cannot be read (or what else has two such beats); None when
    the last look at it was well."""
    failed, well = beats.get(bad), beats.get(good)
    if failed is None or (well is not None and well[0] >= failed[0]):
        return None
    return datetime.fromisoformat(failed[1].get("since", failed[0].isoformat()))


def _blind(beats: Beats, now: datetime) -> Reason | None:
    if doubts := beats.get(SWEEP, (now, {}))[1].get("doubts"):
        words = f"the account's list shows none of our machines ({doubts} sights)"
        return Reason(code="list.doubtful", message=words)
    since = unreadable_since(beats)
    if since is None or now - since < BLIND:
        return None
    words = f"the account's list of instances cannot be read since {since:%H:%M:%S} UTC"
    return Reason(code="list.unreadable", message=words)


def credit(beats: Beats, now: datetime) -> int | None:
    """Micro-USD on the account, where somebody read it lately."""
    said = beats.get(CREDIT)
    if said is None or now - said[0] > CREDIT_FRESH:
        return None
    return int(said[1]["credit"])


def _no_credit(beats: Beats, now: datetime) -> Reason | None:
    there = credit(beats, now)
    if there is None or there > 0:
        return None
    return Reason(code=CREDIT_GONE, message=f"the account has no credit ({money.dollars(there)})")


# --- the breaker ------------------------------------------------------------------------------


def breaker(leases: Sequence[Lease], limits: Limits, now: datetime) -> Reason | None:
    """Why a storm of rentals is to be feared: too many of late, or one after the other that
    never became ready. After a pause, which doubles with each further failure, one is let
    through."""
    made = [lease for lease in leases if _was_made(lease)]
    for name, most, length in (
        ("minute", limits.rentals_per_minute, timedelta(minutes=1)),
        ("hour", limits.rentals_per_hour, money.HOUR),
    ):
        count = sum(now - lease.created_at < length for lease in made)
        if most and count >= most:
            return _open(f"{count} instances were created within a {name}")
    failures = _failures(made) if limits.failures else []
    beyond = len(failures) - limits.failures
    if not failures or beyond < 0:
        return None
    last = max(_failed_at(lease) for lease in failures)
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(beyond, 10))
    if now < last + pause:
        words = f"{len(failures)} machines in a row never became ready; paused for {pause}"
        return _open(words)
    if any(lease.created_at >= last and _undecided(lease) for lease in made):
        return _open(f"{len(failures)} machines in a row never became ready; one is being tried")
    return None


def _open(words: str) -> Reason:
    return Reason(code="breaker.open", message=words)


def _was_made(lease: Lease) -> bool:
    """Whether an instance was, or may have been, created."""
    return lease.open or lease.rented_at is not None


def _undecided(lease: Lease) -> bool:
    waits = lease.status not in (LeaseStatus.RELEASING, LeaseStatus.RELEASED)
    return waits and lease.ready_at is None


def _failures(made: Sequence[Lease]) -> list[Lease]:
    """Those that failed since the last that became ready."""
    failures: list[Lease] = []
    for lease in made:
        if lease.ready_at is not None:
            failures = []
        elif not _undecided(lease) and lease.why not in _NO_FAILURES:
            failures.append(lease)
    return failures


def _failed_at(lease: Lease) -> datetime:
    return lease.releasing_at or lease.released_at or lease.created_at


def switch(tx: Transaction, *, stopped: bool, why: str, now: datetime) -> None:
    """Stop renting, or let it go on, in every process at once."""
    tx.beat(RENTING, now, {"stopped": stopped, "why": why[:500]})
