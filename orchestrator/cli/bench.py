"""`stoker bench`: what this machine can do, beside the limits measured in the same run.

Benches judge nothing: they print each figure with its bar, and end with 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from infra import embedded
from infra.settings import Settings
from orchestrator.cli.console import CliError, err, out, print_json
from state.events import Secret

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
#: (what, figure, beside it: its limit or bar)
Row = tuple[str, str, str]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Measure this machine, beside its own limits. Takes a few minutes each.",
        no_args_is_help=True,
    )
    for command in (webhooks, latency, reconcile, pages, trainer):
        group.command()(command)
    app.add_typer(group, name="bench")


def webhooks(
    seconds: Annotated[float, typer.Option(min=0.5, max=20, help="For each measurement.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Durable reports per second, beside PostgreSQL's single commits and a bare Flask.

    Example: stoker bench webhooks --json

    JSON: the figures, with the machine's own limits; docs/benchmarks.md explains them.
    """
    from orchestrator.bench import webhooks as bench

    with _database() as url:
        _show(bench.run(url, seconds=seconds, say=_say), _webhook_rows, as_json=as_json)


def latency(
    queued: Annotated[int, typer.Option(min=1, max=50, help="Jobs that no machine fits.")] = 50,
    jobs: Annotated[int, typer.Option(min=1, max=100, help="Jobs to order.")] = 50,
    as_json: AsJson = False,
) -> None:
    """How soon a job's machine is asked for, and a customer hears of a fact, while jobs queue.

    Example: stoker bench latency --json

    JSON: the figures, with the machine's own limits; docs/benchmarks.md explains them.
    """
    from orchestrator.bench import latency as bench

    scale = bench.Scale(queued=queued, submits=jobs, burst=jobs)
    measured = bench.run(Settings.from_env().data_dir, scale=scale, say=_say)
    _show(measured, _latency_rows, as_json=as_json)


def reconcile(
    passes: Annotated[int, typer.Option(min=1, max=200, help="Over each database.")] = 40,
    as_json: AsJson = False,
) -> None:
    """What a reconcile pass costs with 1,000 and 10,000 active jobs, and beside 100,000 old ones.

    Example: stoker bench reconcile --json

    JSON: the figures, with the machine's own limits; docs/benchmarks.md explains them.
    """
    from orchestrator.bench import reconcile as bench

    with _database() as url:
        _show(bench.run(url, passes=passes, say=_say), _reconcile_rows, as_json=as_json)


def pages(
    pairs: Annotated[int, typer.Option(min=1, max=20, help="Runs without and with streams.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.5, max=20, help="For each run.")] = 4.0,
    as_json: AsJson = False,
) -> None:
    """How long Fleet takes, and what 50 open streams of it cost the receiver of reports.

    Example: stoker bench pages --json

    JSON: the figures, with the machine's own limits; docs/benchmarks.md explains them.
    """
    from orchestrator.bench import pages as bench

    with _database() as url:
        measured = bench.run(url, pairs=pairs, seconds=seconds, say=_say)
        _show(measured, _page_rows, as_json=as_json)


def trainer(
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="PATH",
            help="Beside it: diffusers' train_text_to_image_lora.py, a file of yours.",
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="The Python that has what the script imports; default: this one."),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="A folder of photographs; default: scikit-image's.")
    ] = None,
    family: Annotated[str, typer.Option(help="Of the base model.")] = "sd1",
    size: Annotated[str, typer.Option(help="tiny, or full: the published geometry.")] = "tiny",
    steps: Annotated[int, typer.Option(min=3, help="Of each training.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings of each trainer.")] = 3,
    resolution: Annotated[int, typer.Option(min=64, max=2048, help="Pixels.")] = 256,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Of the LoRA.")] = 16,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16; default: bf16 on a GPU, else fp32.")
    ] = "",
    threads: Annotated[int, typer.Option(min=0, help="0: as many as processors.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Steps per second, time to the first step and memory of the trainer, beside another one.

    Example: stoker bench trainer --against train_text_to_image_lora.py --json

    JSON: the figures, with the machine's own limits; docs/benchmarks.md explains them.
    """
    from orchestrator.bench import trainer as bench
    from orchestrator.cli.demo import skimage_photos

    where = bench.machine()
    work = bench.Work(
        family=family,
        size=size,
        steps=steps,
        repeats=repeats,
        resolution=resolution,
        batch_size=batch,
        rank=rank,
        threads=threads or where["cpus"],
        precision=precision or ("bf16" if where["gpu"] else "fp32"),
    )
    with_it = (python or Path(sys.executable)).absolute()
    other = bench.Other(against.absolute(), with_it) if against else None
    root = Settings.from_env().data_dir
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root) as folder:
        place = Path(folder)
        try:
            measured = bench.run(
                photos or skimage_photos(place / "photos"), place, work, other, _say
            )
        except bench.BenchFailed as failed:
            raise CliError("a trainer did not do its work", str(failed)) from None
    _show(measured, _trainer_rows, as_json=as_json)


# --- where ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _database() -> Iterator[str]:
    """DATABASE_URL where it is set, else a PostgreSQL for this run alone.

    Benches make databases of their own on it and drop them.
    """
    settings = Settings.from_env()
    if settings.database_url.reveal():
        yield settings.database_url.reveal()
        return
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    nowhere = Secret("redis://none.invalid")  # named, so that only PostgreSQL is started
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=settings.data_dir) as folder,
        embedded.start(
            dataclasses.replace(
                settings,
                data_dir=Path(folder),
                redis_url=nowhere,
                s3_endpoint="http://none.invalid",
            )
        ) as servers,
    ):
        yield servers.settings.database_url.reveal()


def _say(line: str) -> None:
    err.print(f"  {line}", markup=False)


# --- what it says -----------------------------------------------------------------------------


def _show(
    measured: Mapping[str, Any],
    rows_of: Callable[[Mapping[str, Any]], list[Row]],
    *,
    as_json: bool,
) -> None:
    if as_json:
        print_json(measured)
        return
    ran_on = ", ".join(f"{name} {value}" for name, value in measured["ran_on"].items())
    out.print(f"ran on: {ran_on}", markup=False)
    table = Table("WHAT", "FIGURE", "BESIDE", box=None, pad_edge=False)
    for row in rows_of(measured):
        table.add_row(*row)
    out.print(table)


def _webhook_rows(measured: Mapping[str, Any]) -> list[Row]:
    got, limits = measured["receiver"], measured["limits"]
    before, after = limits["postgres_before_after"]
    return [
        (
            "PostgreSQL, single commits",
            f"{limits['postgres_commits_per_s']}/s",
            f"before {before}, after {after}",
        ),
        ("bare Flask", f"{limits['bare_flask_per_s']}/s", ""),
        ("durable reports", f"{got['per_s']}/s", ""),
        ("to PostgreSQL's limit", f"{measured['ratio']}", "bar: at least 0.5"),
        ("p50, p99, max", f"{got['p50_ms']}, {got['p99_ms']}, {got['max_ms']} ms", "bar: p99 100"),
        ("answers by status", str(got["statuses"]), ""),
    ]


def _page_rows(measured: Mapping[str, Any]) -> list[Row]:
    fleet, got, told = measured["fleet"], measured["receiver"], measured["streams"]
    bar = measured["bar"]
    rows: list[Row] = [
        (
            f"Fleet ({fleet['kb']} kB): median, p95",
            f"{fleet['median_ms']}, {fleet['p95_ms']} ms",
            f"bar: {bar['fleet_ms']:.0f} ms",
        )
    ]
    for name, words in (("without", "nobody looks"), ("with", "streams open")):
        case = got[name]
        figure = f"{case['per_s']}/s, {case['p50_ms']}, {case['p99_ms']} ms"
        rows.append((f"durable reports, p50, p99: {words}", figure, str(case["statuses"])))
    return [
        *rows,
        (
            "p99 with streams to without",
            f"{got['p99_ratio']}",
            f"{min(got['p99_ratios'])} to {max(got['p99_ratios'])}  "
            f"bar: at most {bar['p99_ratio']}",
        ),
        (
            "messages to each stream meanwhile",
            f"{told['messages_per_s_of_one']}/s",
            f"the fewest of one: {told['fewest_messages_of_one']};"
            f" {told['kb_per_s_of_all']} kB/s to all",
        ),
    ]


def _latency_rows(measured: Mapping[str, Any]) -> list[Row]:
    rows, limits, ratios = [], measured["limits"], measured["ratios"]
    bar = f"bar: p95 {measured['bar_ms']:.0f} ms"
    for name, words, beside in (
        ("submit_to_create", "order to create call", bar),
        ("fact_to_webhook", "fact to webhook", bar),
        ("burst_to_create", "the same, all at once", "no bar"),
    ):
        got = measured["latency"][name]
        if got["count"]:
            missing = f", {got['missing']} never" if got["missing"] else ""
            figure = f"{got['p50_ms']}, {got['p95_ms']}, {got['max_ms']} ms{missing}"
            rows.append((f"{words}: p50, p95, max of {got['count']}", figure, beside))
    rows += [
        ("one request, alone", f"{limits['http_ms']} ms", ""),
        ("one commit, alone", f"{limits['commit_ms']} ms", ""),
        ("one search at the market, alone", f"{limits['market_ms']} ms", ""),
        (
            "p50 to its parts alone",
            f"create {ratios['create_p50_to_parts_alone']},"
            f" webhook {ratios['webhook_p50_to_parts_alone']}",
            "",
        ),
    ]
    for name, value in measured["memory_mb"].items():
        shown = " + ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((f"memory: {name}", f"{shown} MB", "bar: 60 MB" if name == "agent" else ""))
    return rows


def _reconcile_rows(measured: Mapping[str, Any]) -> list[Row]:
    rows, limits, ratios = [], measured["limits"], measured["ratios"]
    for case in measured["cases"].values():
        rows.append(
            (
                f"{case['active']} active, {case['due']} due, {case['finished']} finished",
                f"{case['median_ms']} ms",
                f"{case['min_ms']} to {case['max_ms']}",
            )
        )
    bar = measured["bar"]["many_to_few"]
    return [
        *rows,
        (
            "many active to few: median, fastest",
            f"{ratios['many_to_few']}, {ratios['many_to_few_fastest']}",
            f"bar: at most {bar}",
        ),
        (
            "many finished to none: median, fastest",
            f"{ratios['finished_to_none']}, {ratios['finished_to_none_fastest']}",
            f"bar: at most {bar}",
        ),
        (
            f"{limits['transactions']} commits alone",
            f"{limits['commits_alone_ms']} ms",
            f"the pass takes {ratios['few_to_commits_alone']} of it",
        ),
    ]


def _trainer_rows(measured: Mapping[str, Any]) -> list[Row]:
    bars, ratio = measured["bar"], measured["ratio"]
    rows: list[Row] = []
    units = {
        "steps_per_s": ("steps/s", ""),
        "cpu_s_per_step": ("processor s per step", ""),
        "first_step_s": ("s to the first step", f"bar: {bars['first_step_s']:.0f} (tiny)"),
        "wall_s": ("s in all", ""),
        "rss_mb": ("MB of memory at most", ""),
        "gpu_mb": ("MB of the GPU at most", ""),
    }
    for name, figures in measured["trainers"].items():
        for key, spread in figures.items():
            unit, bar = units[key]
            beside = f"{spread['min']} to {spread['max']}"
            rows.append((f"{name}: {unit}", f"{spread['median']}", f"{beside}  {bar}".strip()))
    if ratio:
        beside = f"{ratio['min']} to {ratio['max']}  bar: at least {bars['ratio']}"
        rows.append(("steps/s to the other's", f"{ratio['median']}", beside))
    return rows
