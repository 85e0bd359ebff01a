"""`/v1/spend`: what money went into, by day, host, GPU, job or owner."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal, Self

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.api import present
from orchestrator.api.problems import Refusal
from orchestrator.api.schemas import MicroUsd, Out
from orchestrator.deps import Deps
from state import money, spending
from state.spending import GroupBy, Split
from state.store import Transaction

#: What is looked at unless the query says since when; and at most.
USUAL, LONGEST = timedelta(days=30), timedelta(days=400)
#: Leases that are in memory at the same time.
PAGE = 1000


def _moment(value: object) -> object:
    """A date is its first moment, in UTC; so is a time without a zone."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("must be a date, or a time as in RFC 3339") from None
    if not isinstance(moment, datetime):
        return moment
    if not 1970 < moment.year < 9000:  # far from where a span before or after would overflow
        raise ValueError("must be a year from 1971 to 8999")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


Moment = Annotated[datetime, BeforeValidator(_moment)]


class SpendQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    group_by: GroupBy = GroupBy.DAY
    since: Moment | None = Field(
        default=None,
        description="machines that began from then on; 30 days before `until` if left out",
    )
    until: Moment | None = Field(default=None, description="and before then; now, if left out")
    limit: Annotated[int, Field(ge=1, le=1000)] = 400


class SpendRow(Out):
    """A group's money, in micro-USD."""

    key: str = Field(description="the day (UTC), the machine's number, the GPU, the job, the owner")
    machines: int = Field(description="instances that were rented; orphans are none")
    completed: int = Field(description="jobs completed on them")
    training: MicroUsd
    boot: MicroUsd = Field(description="from the create call until the agent's hello")
    failed: MicroUsd = Field(description="machines whose attempt failed or never became ready")
    other: MicroUsd = Field(
        description="the slower of two machines, jobs cancelled while it booted"
    )
    orphan: MicroUsd = Field(
        description="instances of ours that no open lease was for, until they were gone"
    )
    total: MicroUsd
    per_completed: MicroUsd | None = Field(description="total by completed jobs; null without any")
    display: str = Field(description="total, for people")

    @classmethod
    def of(cls, key: str, split: Split) -> Self:
        return cls(
            key=key,
            machines=split.machines,
            completed=split.completed,
            training=split.training,
            boot=split.boot,
            failed=split.failed,
            other=split.other,
            orphan=split.orphan,
            total=split.total,
            per_completed=split.per_completed,
            display=money.dollars(split.total),
        )


class Spend(Out):
    group_by: GroupBy
    since: datetime
    until: datetime
    currency: Literal["USD"] = "USD"
    data: list[SpendRow] = Field(
        description="days in their order, all of them; else the dearest first"
    )
    left_out: int = Field(description="groups beyond `limit`; `total` counts them")
    total: SpendRow


def spent(tx: Transaction, query: SpendQuery, now: datetime) -> Spend:
    """What was spent on machines rented, and on orphans that began, within the query's time.

    Raises:
        Refusal: 422, when that time is none, or longer than `LONGEST`.
    """
    until = query.until or now
    since = query.since or until - USUAL
    if not since < until:
        raise _unfit("?since", "must be before `until`")
    if until - since > LONGEST:
        raise _unfit("?since", f"must be at most {LONGEST.days} days before `until`")
    groups = _groups(tx, since, until, query.group_by, now)
    total = sum(groups.values(), spending.NOTHING)
    rows = _sorted(groups, query.group_by, since, min(until, now))
    return Spend(
        group_by=query.group_by,
        since=since,
        until=until,
        data=[SpendRow.of(key, split) for key, split in rows[: query.limit]],
        left_out=max(0, len(rows) - query.limit),
        total=SpendRow.of("", total),
    )


def _unfit(pointer: str, why: str) -> Refusal:
    return Refusal(
        422, "invalid", "the request is not understood; see errors", errors=[(pointer, why)]
    )


def _groups(
    tx: Transaction, since: datetime, until: datetime, group_by: GroupBy, now: datetime
) -> dict[str, Split]:
    groups: dict[str, Split] = {}
    after = None
    while page := tx.leases_between(since, until, after=after, limit=PAGE):
        jobs = tx.jobs({lease.job for lease in page})
        spending.add(groups, page, jobs, group_by, now)
        after = (page[-1].created_at, page[-1].id)
    orphans = tx.orphans_between(since, until)
    jobs = tx.jobs({orphan.job for orphan in orphans})
    spending.add_orphans(groups, orphans, jobs, group_by, now)
    return groups


def _sorted(
    groups: dict[str, Split], group_by: GroupBy, since: datetime, until: datetime
) -> list[tuple[str, Split]]:
    if group_by is not GroupBy.DAY:
        return sorted(groups.items(), key=lambda item: (-item[1].total, item[0]))
    days = {day.isoformat(): spending.NOTHING for day in _days(since, until)} | groups
    return sorted(days.items())


def _days(since: datetime, until: datetime) -> list[date]:
    """Each that has a moment of the time from `since` until before `until`."""
    first, last = since.date(), (until - timedelta(microseconds=1)).date()
    return [first + timedelta(days=count) for count in range((last - first).days + 1)]


def register(api: APIBlueprint, deps: Deps) -> None:
    """Put the route into `api`."""

    @api.get("/spend", operation_id="get_spend", responses={"200": Spend})
    def get_spend(query: SpendQuery) -> Response:
        """What money went into: training, boots, failures, orphans, the rest"""
        with deps.store.transaction() as tx:
            return present.answer(spent(tx, query, deps.clock()))
