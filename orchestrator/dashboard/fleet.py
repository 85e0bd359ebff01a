"""Fleet: what runs now, what needs somebody, and what it costs."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Self
from urllib.parse import urlencode

from flask import Blueprint, render_template, request
from werkzeug.datastructures import MultiDict

from orchestrator.api.ids import plausible
from orchestrator.api.problems import Refusal
from orchestrator.dashboard import timeline
from orchestrator.dashboard.timeline import Stretch
from orchestrator.deps import Deps
from state import alarms, brakes, money, policy, progress, usual
from state.alarms import Alarm
from state.events import Event
from state.job import TERMINAL, Job, Reason, Status
from state.lease import Lease, LeaseStatus
from state.store import Transaction
from state.usual import Usual

#: Rows on a page.
ROWS = 50
#: Jobs that may be looked through for what needs somebody.
LOOKED_AT = 500
#: Such jobs that are shown above the table.
URGENT = 8
#: A failed job is a problem for so long; after that it is history.
FAILED_LATELY = timedelta(days=1)
#: Money spent beyond this share of a job's cap is worth a look.
NEAR_CAP = 0.9
OPEN = tuple(status for status in Status if status not in TERMINAL)
WAITING = (Status.PENDING, Status.PENDING_GPU)
RUNNING = (Status.PENDING_IMAGES, Status.PENDING_MODEL, Status.TRAINING)


@dataclass(frozen=True, kw_only=True)
class View:
    """What of the fleet is on a screen: filters, and where its page begins."""

    statuses: tuple[Status, ...] = ()
    owner: str = ""
    problems: bool = False
    text: str = ""
    before: str = ""

    @classmethod
    def of(cls, args: MultiDict[str, str]) -> Self:
        """The view that a query string asks for. Raises: Refusal 422 for one that is nonsense."""
        named = [name for name in args.getlist("status") if name]
        if not all(name in list(Status) for name in named):
            raise Refusal(422, "invalid", "there is no such status")
        before = args.get("before", "")
        if before and not plausible(before):
            raise Refusal(422, "invalid", "the page's address is not one of ours")
        return cls(
            statuses=tuple(status for status in Status if status in named),
            owner=args.get("owner", "").strip()[:200],
            problems=args.get("problems", "") not in ("", "0"),
            text=args.get("q", "").strip()[:200],
            before=before,
        )

    @property
    def filtered(self) -> bool:
        return bool(self.statuses or self.owner or self.problems or self.text)

    def query(self, **changes: Any) -> str:
        """The query string of this view, or of one that differs by `changes`."""
        view = replace(self, **changes)
        pairs = [
            *(("status", str(status)) for status in view.statuses),
            *([("owner", view.owner)] if view.owner else []),
            *([("problems", "1")] if view.problems else []),
            *([("q", view.text)] if view.text else []),
            *([("before", view.before)] if view.before else []),
        ]
        return urlencode(pairs)


class Gravity(enum.IntEnum):
    """How soon somebody should look."""

    #: Money burns for nothing.
    BURNS = 0
    #: It may go wrong.
    DOUBTFUL = 1
    #: It mends itself, or ends.
    MENDS = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    gravity: Gravity
    words: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Micro-USD. `so_far` was counted at `at`, and grows by `rate` per hour."""

    so_far: int = field(compare=False)
    at: datetime = field(compare=False)
    closed: int
    rate: int
    cap: int

    @property
    def share(self) -> float:
        return self.so_far / self.cap if self.cap else 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job, as the fleet shows it."""

    id: str
    status: Status
    owner: str
    #: of a test key: its machines are pretended, and cost nothing
    rehearsal: bool
    base: str
    metadata: tuple[tuple[str, str], ...]
    attempt: int
    max_attempts: int
    stretches: tuple[Stretch, ...]
    entered_at: datetime
    finished_at: datetime | None
    #: seconds
    usual: int | None
    late: bool
    doing: str
    share: float | None
    speed: float | None
    ends_at: datetime | None
    gpu: str
    geo: str
    machine: str
    cost: Cost
    reason: Reason | None
    retry_at: datetime | None
    #: why somebody should look, the gravest first
    problems: tuple[Problem, ...]
    now: datetime = field(compare=False)

    @property
    def bars(self) -> list[timeline.Bar]:
        return timeline.bars(self.stretches, self.now)


@dataclass(frozen=True, kw_only=True)
class Totals:
    running: int
    waiting: int
    stalled: int
    machines: int
    #: micro-USD per hour of all machines
    burn: int
    #: since midnight (UTC): closed leases, and open ones so far
    today: Cost
    credit: int | None
    #: hours that the credit lasts at this burn
    runway: float | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that the page shows. Two are equal when nothing happened between them."""

    view: View
    alarms: tuple[Alarm, ...]
    stopped: bool
    urgent: tuple[Row, ...]
    more_urgent: int
    rows: tuple[Row, ...]
    older: str
    totals: Totals
    any: bool
    now: datetime = field(compare=False)


def look(tx: Transaction, view: View, deps: Deps) -> Look:
    """Read everything that `view` shows."""
    now, settings = deps.clock(), deps.settings
    pending = tx.list_jobs(statuses=OPEN, limit=LOOKED_AT)
    opened = tx.open_leases()
    # A job that is over, and still has a machine, is the worst of all.
    missing = {lease.job for lease in opened} - {job.id for job in pending}
    pending += [job for job in tx.jobs(missing).values() if job.terminal]
    listed, older = _listed(tx, view, pending, now)
    ids = {job.id for job in (*pending, *listed)}
    leases, beats = tx.leases_of_jobs(ids), tx.beats()
    expected = usual.known(beats)
    troubled = [
        (job, found)
        for job in sorted(pending, key=lambda job: job.id, reverse=True)
        if (found := problems(job, leases[job.id], expected, now))
    ]
    if view.problems:
        listed = _troubled_of(view, listed, troubled, now)
        listed, older = listed[:ROWS], ""
    urgent = sorted(troubled, key=lambda pair: pair[1][0].gravity)
    shown = {job.id: job for job in (*listed, *(job for job, _ in urgent[:URGENT]))}
    transitions = tx.transitions_of(shown)
    rows = {
        job.id: row(job, leases[job.id], transitions[job.id], expected, now)
        for job in shown.values()
    }
    stand = alarms.standing(
        tx, settings.limits, now, kill_switch=settings.kill_switch, opened=opened
    )
    return Look(
        view=view,
        alarms=tuple(stand),
        stopped=brakes.switched_off(beats, settings.kill_switch) is not None,
        urgent=tuple(rows[job.id] for job, _ in urgent[:URGENT]),
        more_urgent=max(0, len(urgent) - URGENT),
        rows=tuple(rows[job.id] for job in listed),
        older=older,
        totals=_totals(tx, opened, beats, now),
        any=bool(listed) or view.filtered or bool(view.before),
        now=now,
    )


def _listed(
    tx: Transaction, view: View, pending: Sequence[Job], now: datetime
) -> tuple[list[Job], str]:
    """The jobs of the view's page, and the id before which the next page begins."""
    found = tx.list_jobs(
        owner=view.owner or None,
        statuses=view.statuses or ((*OPEN, Status.FAILED) if view.problems else ()),
        text=view.text or None,
        before=view.before or None,
        limit=LOOKED_AT if view.problems else ROWS + 1,
    )
    if view.problems:
        return found, ""
    return found[:ROWS], found[ROWS - 1].id if len(found) > ROWS else ""


def _troubled_of(
    view: View,
    listed: Sequence[Job],
    troubled: Iterable[tuple[Job, tuple[Problem, ...]]],
    now: datetime,
) -> list[Job]:
    """Those of a view's jobs that are problems; also jobs that ended and still have a machine."""
    wrong = {job.id: job for job, _ in troubled}
    plain = replace(view, problems=False)
    extra = [] if plain.filtered else [job for job in wrong.values() if job.terminal]
    failed = [
        job
        for job in listed
        if job.status is Status.FAILED and now - (job.finished_at or now) < FAILED_LATELY
    ]
    mine = [job for job in listed if job.id in wrong]
    chosen = {job.id: job for job in (*mine, *failed, *extra)}
    return sorted(chosen.values(), key=lambda job: job.id, reverse=True)


# --- one job ----------------------------------------------------------------------------------


def problems(
    job: Job, leases: Sequence[Lease], expected: Mapping[Status, Usual], now: datetime
) -> tuple[Problem, ...]:
    """Why somebody should look at `job`; the gravest first."""
    found: list[Problem] = []

    def say(gravity: Gravity, words: str) -> None:
        found.append(Problem(gravity=gravity, words=words))

    kept = [lease for lease in leases if lease.open]
    if job.terminal and any(lease.status is not LeaseStatus.RELEASING for lease in kept):
        say(Gravity.BURNS, f"is {job.status}, and still has a machine")
    slow = [lease for lease in kept if lease.status is LeaseStatus.RELEASING]
    if any(now - (lease.releasing_at or lease.created_at) >= alarms.RELEASE for lease in slow):
        say(Gravity.BURNS, "its machine was to be destroyed, and may still bill")
    cost = cost_of(job, leases, now)
    if cost.share >= NEAR_CAP and not job.terminal:
        word = "has spent" if cost.share >= 1 else "has nearly spent"
        say(Gravity.BURNS, f"{word} its cap of {money.dollars(cost.cap)}")
    silent_at = policy.silent_from(job)
    if silent_at is not None and now >= silent_at and job.last_heard_at is not None:
        say(Gravity.DOUBTFUL, f"its agent was last heard at {job.last_heard_at:%H:%M:%S} UTC")
    if timeline.late(now - job.entered_at, expected.get(job.status)) and not job.terminal:
        say(Gravity.DOUBTFUL, f"{job.status} for much longer than usual")
    if job.status is Status.STALLED:
        say(Gravity.MENDS, "stalled")
    return tuple(found)


def cost_of(job: Job, leases: Sequence[Lease], now: datetime) -> Cost:
    rented = [lease for lease in leases if lease.rented_at]
    spent = {lease.id: money.spent(lease, now) for lease in rented}
    return Cost(
        so_far=sum(spent.values()),
        at=now,
        closed=sum(spent[lease.id] for lease in rented if not lease.open),
        rate=sum(lease.price for lease in rented if lease.open),
        cap=job.request.max_cost,
    )


def row(
    job: Job,
    leases: Sequence[Lease],
    transitions: Sequence[Event],
    expected: Mapping[Status, Usual],
    now: datetime,
) -> Row:
    """What the fleet shows of `job`."""
    training = job.progress.get("training", {})
    left = progress.number(training.get("eta_s")) if job.status is Status.TRAINING else None
    mine = [lease for lease in leases if lease.attempt == job.attempt and lease.machine_id]
    host = mine[-1] if mine else None
    doing, share = doing_of(job, host)
    known = None if job.terminal else expected.get(job.status)
    return Row(
        id=job.id,
        status=job.status,
        owner=job.owner,
        rehearsal=job.request.rehearsal is not None,
        base=job.request.base,
        metadata=tuple(sorted(job.request.metadata.items())),
        attempt=job.attempt,
        max_attempts=job.request.max_attempts,
        stretches=timeline.stretches(job, transitions),
        entered_at=job.entered_at,
        finished_at=job.finished_at,
        usual=round(known.p50) if known else None,
        late=timeline.late(now - job.entered_at, known),
        doing=doing,
        share=share,
        speed=progress.steps_per_s(job) if job.status is Status.TRAINING else None,
        ends_at=(job.last_heard_at or now) + timedelta(seconds=left) if left else None,
        gpu=host.gpu_name if host else "",
        geo=host.geo if host else "",
        machine=host.machine_id if host else "",
        cost=cost_of(job, leases, now),
        reason=job.reason,
        retry_at=job.retry_at,
        problems=problems(job, leases, expected, now),
        now=now,
    )


def doing_of(job: Job, host: Lease | None) -> tuple[str, float | None]:
    """How far a job is within its state, in words, and as a share where that is known."""
    said = job.progress
    match job.status:
        case Status.PENDING:
            return "waits for its photographs", None
        case Status.PENDING_GPU if host is not None:
            return host.note or "the machine boots", None
        case Status.PENDING_GPU:
            return str(said.get("gpu_search") or "looks for a machine"), None
        case Status.PENDING_IMAGES:
            return _share(said.get("images", {}), "bytes", 1e6, "MB")
        case Status.PENDING_MODEL:
            return _share(said.get("model", {}), "bytes", 1e9, "GB")
        case Status.TRAINING if progress.uploading(job):
            return "uploads the result", None
        case Status.TRAINING:
            return _share(said.get("training", {}), "step", 1, "")
        case Status.STALLED if job.stalled_from is not None:
            return f"was {job.stalled_from}", None
        case _:
            return "", None


def _share(said: Mapping[str, Any], key: str, unit: float, word: str) -> tuple[str, float | None]:
    done, most = progress.number(said.get(key)), progress.number(said.get(f"{key}_total"))
    most = most or progress.number(said.get("total"))
    if done is None:
        return "begins", None
    digits = 0 if unit == 1 else 1
    text = f"{done / unit:.{digits}f}" + (f" / {most / unit:.{digits}f}" if most else "")
    return f"{text} {word}".strip(), min(done / most, 1.0) if most else None


# --- many jobs --------------------------------------------------------------------------------


def _totals(tx: Transaction, opened: Sequence[Lease], beats: brakes.Beats, now: datetime) -> Totals:
    counts, burn = tx.count_jobs(), money.burn(opened)
    credit = brakes.credit(beats, now)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    closed = tx.spend_since(midnight)
    since = (money.spent(lease, now) for lease in opened if lease.rented_at)
    return Totals(
        running=sum(counts.get(status, 0) for status in RUNNING),
        waiting=sum(counts.get(status, 0) for status in WAITING),
        stalled=counts.get(Status.STALLED, 0),
        machines=len(opened),
        burn=burn,
        today=Cost(so_far=closed + sum(since), at=now, closed=closed, rate=burn, cap=0),
        credit=credit,
        runway=round(credit / burn, 1) if credit is not None and burn else None,
    )


# --- the page ---------------------------------------------------------------------------------


def fragments(tx: Transaction, before: Look | None, after: Look) -> str:
    """What changed between two looks, as parts to be swapped out of band; all of it, for who
    had none."""
    html: list[str] = []
    if before is None or _above(before) != _above(after):
        html.append(render_template("fleet_attention.html", look=after, oob=True))
    if before is None or before.totals != after.totals:
        html.append(render_template("fleet_totals.html", look=after, oob=True))
    same = before is not None and [row.id for row in before.rows] == [row.id for row in after.rows]
    if before is None or not same or before.older != after.older:
        html.append(render_template("fleet_rows.html", look=after, oob=True))
        return "".join(html)
    for old, new in zip(before.rows, after.rows, strict=True):
        if old != new:
            html.append(render_template("fleet_row.html", row=new, look=after, oob=True))
    return "".join(html)


def _above(seen: Look) -> tuple[Any, ...]:
    return seen.alarms, seen.stopped, seen.urgent, seen.more_urgent


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the page's views into `pages`."""

    @pages.get("/")
    def fleet() -> str:
        view = View.of(request.args)
        with deps.store.transaction() as tx:
            seen = look(tx, view, deps)
        return render_template("fleet.html", look=seen, view=view, STATUSES=list(Status))
