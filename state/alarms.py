"""What an operator must know of now: pure, from what the database holds.

Each alarm has a code, which `docs/operations.md` has an entry for, and a mend.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from state import brakes, money, policy
from state.brakes import Book
from state.endpoints import Backlog
from state.events import HostRecord, OutgoingStatus
from state.lease import Lease, LeaseStatus
from state.money import Limits
from state.policy import Policy
from state.store import Transaction

#: A destroy that is not done after so long is red.
RELEASE = timedelta(seconds=60)
#: Processes unheard for so long are down, and a sweep that old is none.
UNHEARD, UNSWEPT = timedelta(seconds=30), timedelta(minutes=3)
#: Credit that could not be read for so long is worth a word.
CREDIT_UNREAD = timedelta(minutes=10)
#: Money spent or set aside beyond this share of a limit is worth a word.
NEAR = 0.8
#: A lie of a host is news for so long.
LIED = timedelta(hours=24)
#: A webhook that waits for so long is worth a word; one that was given up, for so long.
UNDELIVERED, GIVEN_UP = timedelta(hours=2), timedelta(days=3)


class Severity(enum.StrEnum):
    #: Somebody must act now: money or jobs are at stake.
    CRITICAL = "critical"
    #: Worth a look today.
    WARNING = "warning"


#: By code: what to do. The runbook says more.
MENDS: dict[str, str] = {
    "list.unreadable": "check the market's status and VAST_API_KEY; nothing is rented meanwhile",
    "list.doubtful": "look at the market's console: the list shows none of our machines",
    "release.slow": "`stoker sweep`; then destroy the instance in the market's console",
    "orphan.seen": "nothing, if the next sweep destroys it; else the market's console",
    "budget.hour": "raise STOKER_MAX_PER_HOUR, or wait for the next hour",
    "budget.day": "raise STOKER_MAX_PER_DAY, or wait for the next day (UTC)",
    "budget.total": "raise STOKER_MAX_TOTAL",
    "budget.machines": "raise STOKER_MAX_MACHINES, or wait for jobs to end",
    "budget.rate": "raise STOKER_MAX_RATE, or wait for jobs to end",
    "runway.low": "add credit to the market's account, or cancel jobs",
    "credit.gone": "add credit to the market's account: it has stopped all machines",
    "credit.unread": "check the market's status and VAST_API_KEY",
    "breaker.open": "`stoker jobs` says why machines fail; it closes by itself",
    "kill_switch.on": "`stoker resume-renting`, and unset STOKER_KILL_SWITCH",
    "sweep.stale": "start `stoker beat` and `stoker worker`; instances may run unseen",
    "worker.stale": "start `stoker worker`",
    "beat.stale": "start `stoker beat`",
    "host.liar": "nothing: it is not rented again; report it to the market",
    "webhook.exhausted": "`stoker deliveries ls --status exhausted`, then `stoker events resend`",
    "webhook.backlog": "`stoker deliveries ls --status waiting` says what their endpoints answer",
}


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that stands now. `since` is when it began, as far as anybody noted."""

    code: str
    severity: Severity
    message: str
    since: datetime

    @property
    def mend(self) -> str:
        return MENDS[self.code]


def standing(
    tx: Transaction,
    limits: Limits,
    now: datetime,
    *,
    kill_switch: bool = False,
    opened: Sequence[Lease] | None = None,
    rules: Policy = policy.DEFAULT,
) -> list[Alarm]:
    """All alarms that stand at `now`, the critical ones first. `opened` are the open leases, of
    whoever has read them already."""
    book = brakes.read(tx, limits, now, rules)
    opened = tx.open_leases() if opened is None else opened
    owed = tx.webhook_backlog(now - GIVEN_UP)
    return raised(book, opened, tx.hosts(), limits, now, kill_switch=kill_switch, owed=owed)


def raised(
    book: Book,
    opened: Sequence[Lease],
    hosts: Iterable[HostRecord],
    limits: Limits,
    now: datetime,
    *,
    kill_switch: bool = False,
    owed: Iterable[Backlog] = (),
) -> list[Alarm]:
    """The alarms in what was read."""
    found = [
        *_market(book, now),
        *_renting(book, limits, now, kill_switch),
        *_releasing(opened, now),
        *_money(book, opened, limits, now),
        *_processes(book, now),
        *_liars(hosts, now),
        *_webhooks(owed, now),
    ]
    return sorted(found, key=lambda alarm: (alarm.severity is not Severity.CRITICAL, alarm.code))


def _critical(code: str, message: str, since: datetime) -> Alarm:
    return Alarm(code=code, severity=Severity.CRITICAL, message=message, since=since)


def _warning(code: str, message: str, since: datetime) -> Alarm:
    return Alarm(code=code, severity=Severity.WARNING, message=message, since=since)


def _market(book: Book, now: datetime) -> Iterator[Alarm]:
    beats = book.beats
    since = brakes.unreadable_since(beats)
    if since is not None:
        error = beats[brakes.UNREADABLE][1].get("error", "")
        yield _critical("list.unreadable", f"the account's list cannot be read: {error}", since)
    at, swept = beats.get(brakes.SWEEP, (now, {}))
    if swept.get("doubts"):
        yield _critical("list.doubtful", "the account's list shows none of our machines", at)
    if suspects := swept.get("suspects"):
        words = f"instances of ours without a lease: {', '.join(suspects)}"
        yield _warning("orphan.seen", words, at)
    unread = brakes.unreadable_since(beats, brakes.NO_CREDIT_READ, brakes.CREDIT)
    if unread is not None and now - unread >= CREDIT_UNREAD:
        yield _warning("credit.unread", "the account's credit cannot be read", unread)


def _renting(book: Book, limits: Limits, now: datetime, kill_switch: bool) -> Iterator[Alarm]:
    reason = brakes.switched_off(book.beats, kill_switch)
    if reason is not None:
        since, _ = book.beats.get(brakes.RENTING, (now, {}))
        yield _warning("kill_switch.on", reason.message, since)
    reason = brakes.breaker(book.leases, limits, now)
    if reason is not None:
        yield _critical("breaker.open", reason.message, now)


def _releasing(opened: Sequence[Lease], now: datetime) -> Iterator[Alarm]:
    going = [lease for lease in opened if lease.status is LeaseStatus.RELEASING]
    began = [(lease.releasing_at or lease.created_at, lease) for lease in going]
    slow = sorted(
        ((at, lease) for at, lease in began if now - at >= RELEASE), key=lambda pair: pair[0]
    )
    if slow:
        names = ", ".join(lease.instance_id or lease.label for _, lease in slow[:5])
        words = f"{len(slow)} instances were to be destroyed and may still bill: {names}"
        yield _critical("release.slow", words, slow[0][0])


def _money(book: Book, opened: Sequence[Lease], limits: Limits, now: datetime) -> Iterator[Alarm]:
    credit = brakes.credit(book.beats, now)
    at, _ = book.beats.get(brakes.CREDIT, (now, {}))
    burn = money.burn(opened)
    if credit is not None and credit <= 0:
        yield _critical("credit.gone", f"{money.dollars(credit)} of credit are left", at)
    elif credit is not None and burn:
        hours = credit / burn
        if hours * money.HOUR < limits.runway:
            words = (
                f"{money.dollars(credit)} of credit last {hours:.1f} h at {money.dollars(burn)}/h"
            )
            yield _critical("runway.low", words, at)
    for name, used, limit in money.usage(limits, book.leases, book.spent_ever, now, book.orphans):
        if used >= NEAR * limit:
            words = f"{used / limit:.0%} of the limit is spent or set aside"
            over = used >= limit
            yield (_critical if over else _warning)(f"budget.{name}", words, now)


def _processes(book: Book, now: datetime) -> Iterator[Alarm]:
    for code, beat, limit, what in (
        ("worker.stale", "worker", UNHEARD, "no worker"),
        ("beat.stale", "reconcile", UNHEARD, "no reconcile pass"),
        ("sweep.stale", brakes.SWEEP, UNSWEPT, "no look at the account's list"),
    ):
        at = book.beats[beat][0] if beat in book.beats else None
        if at is None:
            yield _critical(code, f"there was {what} yet", now)
        elif now - at > limit:
            yield _critical(code, f"there was {what} for {(now - at).total_seconds():.0f} s", at)


def _liars(hosts: Iterable[HostRecord], now: datetime) -> Iterator[Alarm]:
    for host in hosts:
        failed = host.last_failed_at
        if host.lies and failed is not None and now - failed < LIED:
            words = f"machine {host.machine_id} was not what it was offered as: {host.last_reason}"
            yield _warning("host.liar", words, failed)


def _webhooks(owed: Iterable[Backlog], now: datetime) -> Iterator[Alarm]:
    lost: list[Backlog] = []
    late: list[Backlog] = []
    for item in owed:
        if item.status is OutgoingStatus.EXHAUSTED:
            lost.append(item)
        elif now - item.oldest >= UNDELIVERED:
            late.append(item)
    for code, items, what in (
        ("webhook.exhausted", lost, "were given up after the last try"),
        ("webhook.backlog", late, "wait, the oldest for hours"),
    ):
        if items:
            rows = sum(item.rows for item in items)
            where = ", ".join(item.endpoint or "jobs' own webhooks" for item in items[:5])
            more = f" and {len(items) - 5} more" if len(items) > 5 else ""
            since = min(item.oldest for item in items)
            yield _warning(code, f"{rows} webhooks {what}: to {where}{more}", since)
