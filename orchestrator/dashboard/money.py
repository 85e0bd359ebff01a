"""Money & hosts: what was spent and on what, what is rented and why, whom we rent from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flask import Blueprint, flash, redirect, render_template, request, url_for
from pydantic import ValidationError
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response

from orchestrator.api import account, hosts, instances, offers, spend, sweeps
from orchestrator.api.hosts import BlockIn, RememberedHost
from orchestrator.api.offers import MarketOffer, OffersQuery
from orchestrator.api.problems import Refusal, refusal_of
from orchestrator.api.spend import SpendQuery, SpendRow
from orchestrator.deps import Deps
from state import alarms
from state.errors import StokerError
from state.spending import GroupBy

#: What the money went into, from the bottom of a bar to its top.
PARTS = ("training", "boot", "failed", "orphan", "other")
SPANS = (7, 30, 90)
#: Machines on the page.
HOSTS = 200
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


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the page's views into `pages`."""

    def present_state() -> dict[str, Any]:
        """What is so now, for the part of the page that is asked for again and again."""
        settings, now = deps.settings, deps.clock()
        with deps.store.transaction() as tx:
            stand = alarms.standing(tx, settings.limits, now, kill_switch=settings.kill_switch)
        return {
            "account": account.standing(deps),
            "instances": instances.standing(deps),
            "alarms": stand,
            "now": now,
        }

    def show(*, looked: sweeps.Sweep | None = None) -> str:
        days, group_by = _view(request.args)
        since = deps.clock() - timedelta(days=days - 1)
        since = since.replace(hour=0, minute=0, second=0, microsecond=0)
        by_day = spend.spent(deps, SpendQuery(since=since))
        grouped = (
            by_day
            if group_by is GroupBy.DAY
            else spend.spent(deps, SpendQuery(since=since, group_by=group_by, limit=50))
        )
        chart, top = bars(by_day.data)
        known = hosts.remembered(deps)
        return render_template(
            "money.html",
            **present_state(),
            spend=by_day,
            grouped=grouped,
            group_by=group_by.value,
            groups=[item.value for item in GroupBy],
            days=days,
            spans=SPANS,
            parts_of_money=PARTS,
            chart=chart,
            top=top,
            hosts=known[:HOSTS],
            hosts_total=len(known),
            market={},
            asked=False,
            looked=looked,
        )

    @pages.get("/money")
    def money() -> str:
        return show()

    @pages.get("/money/now", endpoint="money_now")
    def at_present() -> str:
        return render_template("money_now.html", **present_state())

    @pages.get("/money/hosts", endpoint="money_hosts")
    def beside_the_market() -> str:
        """The table of machines, with what the market says of those that it has on offer now."""
        known = hosts.remembered(deps)
        market, fault = _market(deps, known)
        return render_template(
            "money_hosts.html",
            hosts=known[:HOSTS],
            hosts_total=len(known),
            market=market,
            asked=True,
            fault=fault,
        )

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


def _view(args: MultiDict[str, str]) -> tuple[int, GroupBy]:
    """Days and grouping that the query string asks for. Raises: Refusal 422."""
    try:
        days, group_by = int(args.get("days", 30)), GroupBy(args.get("by", "day"))
    except ValueError:
        raise Refusal(422, "invalid", "there is no such view of the money") from None
    if days not in SPANS:
        raise Refusal(422, "invalid", f"days must be one of {', '.join(map(str, SPANS))}")
    return days, group_by


def _market(deps: Deps, known: Sequence[RememberedHost]) -> tuple[dict[str, MarketOffer], str]:
    """By machine what the market offers of it now; and why that is unknown, if so."""
    names = sorted({host.gpu for host in known if host.gpu})[:20]
    if not names:
        return {}, ""
    try:
        found = offers.offers(deps, ANY_OFFER.model_copy(update={"gpu": names}))
    except (Refusal, StokerError) as error:
        return {}, refusal_of(error).detail
    return {offer.machine_id: offer for offer in found.data}, ""
