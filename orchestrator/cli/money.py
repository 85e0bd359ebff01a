"""Commands for what machines cost: cost, offers, instances."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit, err, out, print_json, print_rows
from orchestrator.cli.hosts import age
from orchestrator.cli.jobs import AsJson
from state.money import dollars
from state.spending import GroupBy

#: Cells of the longest bar.
BAR = 24
_SPAN = re.compile(r"(\d{1,5})([hd])")
_SPEND = frozenset({"data", "total", "left_out", "since", "until"})
#: Of a line, from the left.
_PARTS = ("training", "boot", "failed", "orphan", "other", "total")
_OFFERS = frozenset({"data", "fit", "sentence"})
_INSTANCES = frozenset({"data", "sweep", "burn_per_hour", "cost"})


def register(app: typer.Typer) -> None:
    for command in (cost, offers, instances):
        app.command()(command)


def cost(
    by: Annotated[GroupBy, typer.Option(help="A line for each of these.")] = GroupBy.DAY,
    since: Annotated[
        str, typer.Option(help="Machines rented since then: 2026-11-01, or 7d, or 12h.")
    ] = "30d",
    until: Annotated[str, typer.Option(help="And before then; default: now.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Lines at most.")] = 400,
    as_json: AsJson = False,
) -> None:
    """Show what money went into: training, boots, failures, orphans; and what a completed job cost.

    Example: stoker cost --by host --since 7d

    JSON: as `GET /v1/spend` answers.
    """
    now = datetime.now(UTC)
    query = {"group_by": by.value, "since": _moment(since, now, "--since"), "limit": limit}
    if until:
        query["until"] = _moment(until, now, "--until")
    spent = _asked("/v1/spend", _SPEND, query)
    if as_json:
        print_json(spent)
        return
    rows = [row for row in spent["data"] if row["machines"] or row["total"]]
    if not rows:
        err.print(f"no machine was rented since {spent['since'][:10]}", markup=False)
        return
    most = max(row["total"] for row in rows)
    title = (by.value, "machines", "done", *_PARTS, "per job")
    print_rows(
        out,
        [
            (*map(str.upper, title), ""),
            *(_spend_row(row["key"] or "unknown", row, most) for row in rows),
            _spend_row("total", spent["total"], 0),
        ],
    )
    if spent["left_out"]:
        err.print(f"{spent['left_out']} more; `--limit` shows them", markup=False)


def offers(
    gpu: Annotated[list[str], typer.Option(help="A GPU's name; may be repeated.")] = [],  # noqa: B006 -- typer's way
    min_vram: Annotated[
        float | None, typer.Option(min=1, max=1000, help="GB; default: what the family takes.")
    ] = None,
    max_price: Annotated[
        float, typer.Option(min=0.000001, max=100, help="Dollars per hour, all in.")
    ] = 2.0,
    family: Annotated[str, typer.Option(help="Reckon with a LoRA of this family.")] = "sd1",
    interruptible: Annotated[
        bool, typer.Option("--interruptible", help="Also what can be bid for.")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also machines the market has not verified.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Lines at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show what is for rent now, in the order in which a job would take it. Rents nothing.

    Example: stoker offers --gpu "RTX 4090" --family sdxl

    JSON: as `GET /v1/offers` answers.
    """
    query: dict[str, Any] = {
        "gpu": gpu,
        "max_price": round(max_price * 1_000_000),
        "family": family,
        "interruptible": interruptible,
        "verified_only": not unverified,
        "limit": limit,
    }
    if min_vram:
        query["min_vram_gb"] = min_vram
    found = _asked("/v1/offers", _OFFERS, query)
    if as_json:
        print_json(found)
        return
    if found["data"]:
        title = ("OFFER", "MACHINE", "GPU", "GB", "PLACE", "$/H", "SURE", "JOB", "TAKES", "")
        print_rows(out, [title, *map(_offer_row, found["data"])])
    err.print(found["sentence"], markup=False, soft_wrap=True)


def instances(as_json: AsJson = False) -> None:
    """List every machine that costs money, why it is kept or goes, and what no job is for.

    Example: stoker instances

    JSON: as `GET /v1/instances` answers.
    """
    found = _asked("/v1/instances", _INSTANCES, {})
    if as_json:
        print_json(found)
        return
    swept = found["sweep"]
    rows = [_instance_row(item) for item in found["data"]]
    rows += [_stranger_row(item) for item in swept["strangers"]]
    if rows:
        title = ("INSTANCE", "MACHINE", "GPU", "JOB", "AGE", "$/H", "COST", "VERDICT", "WHY")
        print_rows(out, [title, *rows])
    else:
        err.print("no machine is rented", markup=False)
    err.print(_sweep_words(swept), markup=False, soft_wrap=True)


# --- asking -----------------------------------------------------------------------------------


def _asked(path: str, keys: frozenset[str], query: Mapping[str, Any]) -> dict[str, Any]:
    client = Client.here()
    found = client.get(path, **query)
    if not keys <= found.keys():
        lacks = ", ".join(sorted(keys - found.keys()))
        raise CliError(
            f"{client.url} does not speak Stoker's API",
            f"its answer lacks {lacks}",
            "check STOKER_URL; an older Stoker may run there",
        )
    return found


def _moment(text: str, now: datetime, option: str) -> str:
    """A date or time as it was typed, or a span before now (7d, 12h)."""
    if span := _SPAN.fullmatch(text):
        count = int(span[1])
        days = count if span[2] == "d" else count / 24
        return (now - timedelta(days=min(days, 100_000))).isoformat()
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise CliError(
            f"{option} {text} is no time",
            "a date (2026-11-01), a time, or a span before now (7d, 12h)",
            "`stoker cost --help`",
            Exit.USAGE,
        ) from None
    return text


# --- lines ------------------------------------------------------------------------------------


def _spend_row(key: str, row: Mapping[str, Any], most: int) -> tuple[str, ...]:
    parts = (row[part] for part in _PARTS)
    each = row["per_completed"]
    return (
        key,
        str(row["machines"]),
        str(row["completed"]),
        *map(dollars, parts),
        "-" if each is None else dollars(each),
        "█" * max(1, round(BAR * row["total"] / most)) if most and row["total"] else "",
    )


def _offer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    fits = row["verdict"] == "fit"
    takes = sum(row[part] for part in ("boot_s", "download_s", "training_s")) if fits else 0
    return (
        row["id"],
        row["machine_id"],
        row["gpu"],
        f"{row['vram_gb']:.0f}",
        row["geo"] or "-",
        f"{row['price_per_hour'] / 1_000_000:.3f}" + (" bid" if row["by_bid"] else ""),
        f"{row['chance']:.0%}" if fits else "-",
        row["display"] or "-",
        f"{takes / 60:.0f} min" if fits else "-",
        "" if fits else f"refused: {row['why']}",
    )


def _instance_row(item: Mapping[str, Any]) -> tuple[str, ...]:
    why = f"{item['why']} ({item['note']})" if item["note"] else item["why"]
    return (
        item["instance_id"] or "-",
        item["machine_id"] or "-",
        item["gpu"] or "-",
        item["job"],
        age(item["age_s"]),
        f"{item['price_per_hour'] / 1_000_000:.3f}",
        item["display"],
        item["verdict"],
        " ".join(why.split()),
    )


def _stranger_row(item: Mapping[str, Any]) -> tuple[str, ...]:
    price = f"{item['price'] / 1_000_000:.3f}"
    said = (age(item["age_s"]), price, "-", item["verdict"], " ".join(item["why"].split()))
    return item["instance"], item["machine"] or "-", "-", "-", *said


def _sweep_words(swept: Mapping[str, Any]) -> str:
    if swept["at"] is None:
        return "no sweep has compared the account with our leases yet; is `stoker worker` running?"
    words = (
        f"the last sweep, {age(swept['age_s'])} ago, saw {swept['seen']} instances, "
        f"{swept['ours']} of them ours"
    )
    if swept["error"]:
        words += f"; since then the list could not be read: {swept['error']}"
    if swept["doubtful"]:
        words += "; it showed none of our machines and is not believed yet"
    return words + ("; instances may be running unseen" if swept["stale"] else "")
