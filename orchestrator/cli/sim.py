"""`stoker sim`: whole lives of jobs under a virtual clock, with everything going wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.console import CliError, Exit, err, out, print_json

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    app.command()(sim)


def sim(
    jobs: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many lives.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 1,
    faults: Annotated[str, typer.Option(help="calm, market or hell.")] = "market",
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 2,
    bad_hosts: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of machines that fail every job.")
    ] = 0.0,
    compare_hedging: Annotated[
        bool, typer.Option(help="The same seed with and without a second machine for slow boots.")
    ] = False,
    shrink_s: Annotated[
        float, typer.Option(min=0, help="Seconds to look for a smaller failing run.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Live through many jobs in virtual time, and check what must never be otherwise.

    Ends with 1 when an invariant was broken, and says how to see it again.

    Example: stoker sim --jobs 10000 --seed 7 --faults hell

    JSON: the run's figures, `violations` among them; docs/simulation.md explains each.
    """
    from orchestrator.sim.profiles import PROFILES
    from orchestrator.sim.run import cohorts, run

    if faults not in PROFILES:
        raise CliError(
            f"there is no profile {faults!r}", "", f"one of {', '.join(PROFILES)}", Exit.USAGE
        )

    def once(hedge: bool) -> Any:
        todo = cohorts(jobs, seed, faults=faults, bad_hosts=bad_hosts, hedge=hedge)
        return run(todo, seed=seed, faults=faults, workers=workers, say=_say)

    summary = once(True)
    figures = summary.figures()
    if compare_hedging and not summary.violations:
        figures["hedging"] = _compared(figures, once(False).figures())
    if summary.failing is not None:
        figures["shrunk"] = _shrunk(summary, shrink_s)
    if as_json:
        print_json(figures)
    else:
        _show(figures)
    if summary.violations:
        raise typer.Exit(Exit.FAILED)


def _say(line: str) -> None:
    err.print(f"  {line}", markup=False)


def _compared(with_it: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, Any]:
    """What a second machine for slow boots brings, and what it costs."""
    jobs = {
        name: max(1, figures["statuses"].get("completed", 0))
        for name, figures in (("on", with_it), ("off", without))
    }
    p95 = {
        name: figures["time_to_training_s"]["p95"] or 0.0
        for name, figures in (("on", with_it), ("off", without))
    }
    cost = {
        "on": with_it["cost"]["ledger_usd"] / jobs["on"],
        "off": without["cost"]["ledger_usd"] / jobs["off"],
    }
    return {
        "p95_on_s": p95["on"],
        "p95_off_s": p95["off"],
        "p95_ratio": round(p95["on"] / p95["off"], 3) if p95["off"] else None,
        "cost_per_completed_on_usd": round(cost["on"], 5),
        "cost_per_completed_off_usd": round(cost["off"], 5),
        "cost_ratio": round(cost["on"] / cost["off"], 3) if cost["off"] else None,
        "violations_off": without["violations"],
    }


def _shrunk(summary: Any, seconds: float) -> dict[str, Any]:
    from orchestrator.sim.shrink import shrink
    from orchestrator.sim.world import Outcome

    found = Outcome(violation=dict(summary.violations[0]), trace=summary.trace)
    smallest, outcome = shrink(summary.failing, found, seconds=seconds)
    return {
        "seed": smallest.seed,
        "jobs": smallest.jobs,
        "kinds": list(smallest.kinds or ()),
        "violation": outcome.violation,
        "trace": outcome.trace[-80:],
    }


def _show(figures: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in figures.items():
        if name in ("violations", "shrunk", "faults_injected"):
            continue
        table.add_row(name, _words(value))
    out.print(table)
    for item in figures["violations"][:10]:
        words = f"{item['invariant']} does not hold for {item['job']}: {item['what']}"
        out.print(f"{words} (world of seed {item['seed']}, {item['jobs']} jobs)", markup=False)
    if "shrunk" in figures:
        small = figures["shrunk"]
        out.print(f"smallest: {small['jobs']} jobs, seed {small['seed']}, faults {small['kinds']}")
        for line in small["trace"]:
            out.print(f"  {line}", markup=False)
    if not figures["violations"]:
        out.print("no violation")


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
