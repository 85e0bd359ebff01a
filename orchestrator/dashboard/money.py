"""Money & hosts: what was spent and on what, what is rented and why, whom we rent from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlencode

from flask import Blueprint, flash, redirect, render_template, request, url_for
from pydantic import ValidationError
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response

from orchestrator.api import account, hosts, instances, offers, spend, sweeps
from orchestrator.api.account import Account
from orchestrator.api.hosts import BlockIn, RememberedHost
from orchestrator.api.instances import Instances
from orchestrator.api.offers import MarketOffer, OffersQuery
from orchestrator.api.problems import Refusal, refusal_of
from orchestrator.api.spend import SpendQuery, SpendRow
from orchestrator.deps import Deps
from state import alarms
from state.alarms import Alarm
from state.errors import StokerError
from state.events import HostRecord
from state.spending import GroupBy
from state.store import Transaction

#: What the money went into, from the bottom of a bar to its top.
PARTS = ("training", "boot", "failed", "orphan", "other")
SPANS = (7, 30, 90)
#: Machines on the page.
HOSTS = 200
#: What runs on between two looks of the account and of what is rented.
_ACCOUNT_RUNS: Any = {"age_s", "limits"}
_RUNS: Any = {
    "cost": True,
    "data": {"__all__": {"age_s", "cost", "display"}},
    "sweep": {"age_s"},
}
#: What the market is asked for its opinion of machines, whatever their worth.
ANY_OFFER = OffersQuery(
    min_vram_gb=1,
    disk_gb=10,
    max_price=100_000_000,
    min_reliability=0,
    min_download_mbps=0,
    verified_only=False,
    min_cuda=0,
    limit=200,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of a bar, in per cent of the chart's height, from its top."""

    part: str
    y: float
    height: float
    amount: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A day of the chart. `x` and `width` are in thousandths of its width."""

    row: SpendRow
    x: float
    width: float
    blocks: tuple[Block, ...]


def bars(rows: Sequence[SpendRow]) -> tuple[tuple[Bar, ...], int]:
    """A bar for each day, and the micro-USD that the chart's height stands for."""
    most = max((row.total for row in rows), default=0)
    top = _round_up(most)
    drawn, step = [], 1000 / max(1, len(rows))
    for index, row in enumerate(rows):
        blocks, y = [], 100.0
        for part in PARTS:
            amount = getattr(row, part)
            height = 100 * amount / top if top else 0.0
            y -= height
            if amount:
                blocks.append(
                    Block(part=part, y=round(y, 3), height=round(height, 3), amount=amount)
                )
        drawn.append(
            Bar(
                row=row,
                x=round(index * step + step * 0.12, 2),
                width=round(step * 0.76, 2),
                blocks=tuple(blocks),
            )
        )
    return tuple(drawn), top


def _round_up(amount: int) -> int:
    """To the next of 1, 2, 5, 10 … micro-USD, so that an axis has round numbers."""
    if amount <= 0:
        return 0
    power = int("1" + "0" * (len(str(amount)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= amount)


class View(NamedTuple):
    """What of the money is on a screen."""

    days: int
    group_by: GroupBy

    @classmethod
    def of(cls, args: MultiDict[str, str]) -> View:
        """The view that a query string asks for. Raises: Refusal 422 for one that is nonsense."""
        try:
            view = cls(int(args.get("days", 30)), GroupBy(args.get("by", "day")))
        except ValueError:
            raise Refusal(422, "invalid", "there is no such view of the money") from None
        if view.days not in SPANS:
            raise Refusal(422, "invalid", f"days must be one of {', '.join(map(str, SPANS))}")
        return view

    def query(self) -> str:
        return urlencode({"days": self.days, "by": self.group_by.value})


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the page shows, but for what was spent. Two are equal when nothing happened between
    them."""

    view: View
    alarms: list[Alarm]
    account: Account = field(compare=False)
    instances: Instances = field(compare=False)
    hosts: list[RememberedHost] = field(compare=False)
    hosts_total: int
    #: what of account and instances is more than the passing of time
    standing: tuple[Any, ...]
    #: the same of the hosts, whose names fade by the second
    remembered: tuple[Any, ...]
    #: until when the money is counted: what is rented costs more each minute
    counted: datetime
    now: datetime = field(compare=False)

    @property
    def rented(self) -> set[tuple[str, str]]:
        """What was spent changes with these, too."""
        return {(item.lease, item.status) for item in self.instances.data}


def look(tx: Transaction, view: View, deps: Deps) -> Look:
    """Read all of that."""
    settings, now = deps.settings, deps.clock()
    owned, rented = account.standing(tx, settings, now), instances.standing(tx, now)
    known = hosts.remembered(tx, now)
    machines = [hosts.shown(host, now) for host in known[:HOSTS]]
    burns = rented.data or rented.sweep.strangers
    return Look(
        view=view,
        alarms=alarms.standing(tx, settings.limits, now, kill_switch=settings.kill_switch),
        account=owned,
        instances=rented,
        hosts=machines,
        hosts_total=len(known),
        standing=(owned.model_dump(exclude=_ACCOUNT_RUNS), rented.model_dump(exclude=_RUNS)),
        remembered=(known[:HOSTS], [machine.shunned for machine in machines]),
        counted=now.replace(second=0, microsecond=0) if burns else _midnight(now),
        now=now,
    )


def fragments(tx: Transaction, before: Look | None, after: Look) -> str:
    """What changed between two looks, as parts to be swapped out of band; all of it, for who
    had none."""
    html: list[str] = []

    def part(name: str, **values: Any) -> None:
        html.append(render_template(f"money_{name}.html", oob=True, **_shown(after), **values))

    same = before is not None and before.counted == after.counted
    if before is None or not same or _now(before) != _now(after):
        for name in ("renting", "now", "guards"):
            part(name)
    if before is None or not same or before.rented != after.rented:
        part("spend", **_spent(tx, after.view, after.now))
    if before is None or before.remembered != after.remembered:
        part("hosts")
    return "".join(html)


def _now(seen: Look) -> tuple[Any, ...]:
    return seen.alarms, seen.standing


def _shown(seen: Look) -> dict[str, Any]:
    """What the parts are rendered with."""
    return {
        "alarms": seen.alarms,
        "account": seen.account,
        "instances": seen.instances,
        "hosts": seen.hosts,
        "hosts_total": seen.hosts_total,
        "now": seen.now,
    }


def _spent(tx: Transaction, view: View, now: datetime) -> dict[str, Any]:
    """What was spent, as `money_spend.html` shows it."""
    since = _midnight(now - timedelta(days=view.days - 1))
    by_day = grouped = spend.spent(tx, SpendQuery(since=since), now)
    if view.group_by is not GroupBy.DAY:
        query = SpendQuery(since=since, group_by=view.group_by, limit=50)
        grouped = spend.spent(tx, query, now)
    chart, top = bars(by_day.data)
    return {
        "spend": by_day,
        "grouped": grouped,
        "group_by": view.group_by.value,
        "groups": [item.value for item in GroupBy],
        "days": view.days,
        "spans": SPANS,
        "parts_of_money": PARTS,
        "chart": chart,
        "top": top,
    }


def _midnight(now: datetime) -> datetime:
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the page's views into `pages`."""

    def show(*, looked: sweeps.Sweep | None = None) -> str:
        view = View.of(request.args)
        with deps.store.transaction() as tx:
            seen = look(tx, view, deps)
            spent = _spent(tx, view, seen.now)
        live = url_for("pages.live_money", days=view.days, by=view.group_by.value)
        return render_template("money.html", **_shown(seen), **spent, looked=looked, live=live)

    @pages.get("/money")
    def money() -> str:
        return show()

    @pages.get("/money/market", endpoint="money_market")
    def market_of_hosts() -> str:
        """What the market says of the machines that it has on offer now."""
        with deps.store.transaction() as tx:
            known = hosts.remembered(tx, deps.clock())
        market, fault = _market(deps, known)
        return render_template("money_market.html", hosts=known[:HOSTS], market=market, fault=fault)

    @pages.post("/money/sweep", endpoint="dry_sweep")
    def dry_sweep() -> Response | str:
        """What a sweep would do now; `actions` has the button that orders one."""
        try:
            return show(looked=sweeps.sweep(deps, dry_run=True))
        except (Refusal, StokerError) as error:
            flash(refusal_of(error).detail, "error")
            return redirect(url_for("pages.money"), 303)

    @pages.post("/money/hosts/block", endpoint="block_host")
    def block() -> Response:
        machine_id = request.form.get("machine_id", "").strip()
        try:
            body = BlockIn(reason=request.form.get("reason", "").strip())
            hosts.block(deps, machine_id, body)
        except ValidationError:
            flash("Say why, in at most 200 characters: nothing was blocked.", "error")
        except StokerError as error:
            flash(refusal_of(error).detail, "error")
        else:
            flash(f"No job rents machine {machine_id} any more.", "ok")
        return redirect(url_for("pages.money", _anchor="hosts"), 303)

    @pages.post("/money/hosts/unblock", endpoint="unblock_host")
    def unblock() -> Response:
        machine_id = request.form.get("machine_id", "")
        hosts.unblock(deps, machine_id)
        flash(f"Jobs may rent machine {machine_id} again; its bad name is forgotten.", "ok")
        return redirect(url_for("pages.money", _anchor="hosts"), 303)


def _market(deps: Deps, known: Sequence[HostRecord]) -> tuple[dict[str, MarketOffer], str]:
    """By machine what the market offers of it now; and why that is unknown, if so."""
    names = sorted({host.gpu_name for host in known if host.gpu_name})[:20]
    if not names:
        return {}, ""
    try:
        found = offers.offers(deps, ANY_OFFER.model_copy(update={"gpu": names}))
    except (Refusal, StokerError) as error:
        return {}, refusal_of(error).detail
    return {offer.machine_id: offer for offer in found.data}, ""
