"""Commands that look at jobs: ps, show, logs. Each can watch; Ctrl-C ends the watching alone."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator.cli.client import Client
from orchestrator.cli.console import (
    err,
    fitted,
    out,
    print_json,
    print_line,
    print_rows,
    size_words,
)
from orchestrator.cli.follow import ENDED, detaching, durations, follow_lines, picture
from orchestrator.cli.jobs import JobId
from state.job import Status

#: Seconds between two looks of `ps -w`, `show -w` and `logs -f`.
WATCH_S = 2.0
LOGS_S = 1.0
TITLE = ("JOB", "STATUS", "TRY", "STEP", "LOSS", "GPU", "COST", "WHY")
#: Lists (but of words) and objects in a log that are longer are only counted; --json has them.
LONG = 60
#: What a narrow terminal goes without.
SPARE = ("LOSS", "TRY", "GPU")
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Until Ctrl-C, as things change.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document; with -w a line per change.")
]


def register(app: typer.Typer) -> None:
    for command in (ps, show, logs):
        app.command()(command)


# --- many ---------------------------------------------------------------------------------------


def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Ended jobs too.")] = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Example: stoker ps -a

    JSON: a list of jobs, each as `GET /v1/jobs/{id}` answers; with -w one of them per line.
    """
    client = Client.here()
    query = {} if every else {"status": [item.value for item in Status if item.value not in ENDED]}

    def look() -> list[dict[str, Any]]:
        return list(client.jobs(**query))

    if not watch:
        jobs = look()
        print_json(jobs) if as_json else _print_jobs(jobs)
        return
    with contextlib.suppress(KeyboardInterrupt):
        if out.is_terminal and not as_json:
            _watch_live(lambda: _table(look()))
        else:
            _watch_changes(client, look, print_line if as_json else _print_job)


def _watch_live(draw: Callable[[], RenderableType]) -> None:
    with Live(draw(), console=out, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(draw(), refresh=True)


def _table(jobs: Iterable[Mapping[str, Any]]) -> RenderableType:
    rows = [list(_row(job)) for job in jobs]
    if not rows:
        return Text("no jobs run; Ctrl-C ends this, `stoker train` starts one")
    return Text("\n".join(fitted([list(TITLE), *rows], out.width, SPARE)), no_wrap=True)


def _watch_changes(
    client: Client,
    look: Callable[[], list[dict[str, Any]]],
    tell: Callable[[Mapping[str, Any]], None],
) -> None:
    """Tell of each job that is new, changed, or gone from the list because it ended."""
    seen: dict[str, Any] = {}
    while True:
        now = {job["id"]: job for job in look()}
        for job in reversed(now.values()):
            if seen.get(job["id"]) != news(job):
                tell(job)
        for gone in set(seen) - set(now):
            tell(client.job(gone))
        seen = {name: news(job) for name, job in now.items()}
        time.sleep(WATCH_S)


def news(job: Mapping[str, Any]) -> dict[str, Any]:
    """What of a job is worth a line when it changes: all but its cost, which ticks."""
    return {key: value for key, value in job.items() if key != "cost"}


def _print_jobs(jobs: Iterable[Mapping[str, Any]]) -> None:
    rows = [_row(job) for job in jobs]
    if rows:
        print_rows(out, [TITLE, *rows], spare=SPARE)
    else:
        err.print("no jobs run; `stoker ps -a` shows ended ones, `stoker train` starts one")


def _print_job(job: Mapping[str, Any]) -> None:
    out.print("  ".join(_row(job)).rstrip(), markup=False, soft_wrap=True)


def _row(job: Mapping[str, Any]) -> tuple[str, ...]:
    training = job["progress"].get("training", {})
    step = f"{training.get('step', 0)}/{training['total']}" if training.get("total") else "-"
    loss = f"{training['loss']:.4f}" if isinstance(training.get("loss"), float) else "-"
    why = (job.get("reason") or {}).get("message") or (
        job["progress"].get("gpu_search", "") if job["status"] == "pendingGpu" else ""
    )
    gpu = (job.get("host") or {}).get("gpu") or "-"
    cells = (job["id"], job["status"], job["attempt"], step, loss, gpu, job["cost"]["display"], why)
    return tuple(" ".join(str(cell).split()) for cell in cells)


# --- one ----------------------------------------------------------------------------------------


def show(job_id: JobId, watch: Watch = False, as_json: AsJson = False) -> None:
    """Show one job: states, progress, machine, cost, result.

    Example: stoker show -w job_01JD…

    JSON: the job, as `GET /v1/jobs/{id}` answers; with -w one per line, until it has ended.
    """
    client = Client.here()
    if watch:
        with detaching(job_id):
            _watch_job(client, job_id, as_json)
        return
    job = client.job(job_id)
    if as_json:
        print_json(job)
        return
    if out.is_terminal:
        out.print(picture(job))
        out.print()
        print_rows(out, facts(job))
    else:
        print_rows(out, [("status", job["status"]), *progress(job), *facts(job)])
    if job["result_files"]:
        out.print()
        print_rows(out, files(job))


def _watch_job(client: Client, job_id: str, as_json: bool) -> None:
    """Until it ends."""
    if as_json:
        seen: Any = None
        while True:
            job = client.job(job_id)
            if news(job) != seen:
                print_line(job)
            seen = news(job)
            if job["status"] in ENDED:
                return
            time.sleep(LOGS_S)
    if not out.is_terminal:
        follow_lines(lambda: client.job(job_id), out, time.sleep)
        return
    with Live(console=out, refresh_per_second=8) as live:
        while True:
            job = client.job(job_id)
            lines = fitted([list(row) for row in facts(job)], out.width)
            if job["result_files"]:
                lines += ["", *fitted([list(row) for row in files(job)], out.width)]
            text = "\n".join(lines)
            live.update(Group(picture(job), Text(), Text(text, no_wrap=True)))
            if job["status"] in ENDED:
                return
            time.sleep(LOGS_S)


def progress(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the picture shows, for those who get none."""
    training, rows = job["progress"].get("training", {}), []
    if job.get("reason"):
        rows.append(("why", f"{job['reason']['code']}: {job['reason']['message']}"))
    if training.get("total"):
        rows.append(("step", f"{training.get('step') or 0}/{training['total']}"))
    for name, key in (("loss", "loss"), ("validation", "validation_loss")):
        if isinstance(training.get(key), int | float):
            rows.append((name, f"{training[key]:.4f}"))
    if job.get("host"):
        rows.append(("GPU", f"{job['host']['gpu']} on machine {job['host']['machine_id']}"))
    return rows


def facts(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What does not move, or slowly."""
    rows = [
        ("job", job["id"]),
        ("base", str(job.get("base", ""))),
        ("attempt", f"{job['attempt']} of {job.get('max_attempts', '?')}"),
        ("cost", f"{job['cost']['display']} of at most ${job['cost'].get('cap', 0) / 1e6:.2f}"),
    ]
    if job.get("retry_at"):
        rows.append(("next try", job["retry_at"]))
    rows += [(f"in {state}", f"{span:.1f} s") for state, span in durations(job).items()]
    return rows


def files(job: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The results as a table; none before there are any."""
    rows = [
        (item["name"], size_words(item["bytes"]), item["sha256"]) for item in job["result_files"]
    ]
    return [("FILE", "SIZE", "SHA256"), *rows] if rows else []


# --- its log ------------------------------------------------------------------------------------


def logs(
    job_id: JobId,
    following: Annotated[bool, typer.Option("--follow", "-f", help="As they come.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document; with -f a line per event.")
    ] = False,
) -> None:
    """Print a job's events and the agent's log lines.

    Example: stoker logs -f job_01JD…

    JSON: a list of events, each as `GET /v1/jobs/{id}/events` answers: {seq, at, type, data, …};
    with -f one of them per line.
    """
    client = Client.here()
    if not following:
        found = list(_events(client, job_id, following=False))
        if as_json:
            print_json(found)
        else:
            for event in found:
                _print_event(event)
        return
    with detaching(job_id):
        for event in _events(client, job_id, following=True):
            print_line(event) if as_json else _print_event(event)


def _events(client: Client, job_id: str, *, following: bool) -> Iterator[Mapping[str, Any]]:
    """All events so far; with `following` also those to come, until the job ends."""
    after, ended = 0, not following
    while True:
        page = client.events(job_id, after)
        yield from page["data"]
        after = page["next_after"]
        if page["has_more"]:
            continue
        if ended:
            return
        # looked at before the next page: what came until the end is on it
        ended = client.job(job_id)["status"] in ENDED
        if not ended:
            time.sleep(LOGS_S)


def _print_event(event: Mapping[str, Any]) -> None:
    if event["type"] == "heartbeat":
        return
    if event["type"] == "log.lines":
        for line in event["data"].get("lines", []):
            out.print(f"{_second(event['at'])}  | {line}", markup=False, soft_wrap=True)
        return
    words = _event_words(event["type"], event["data"])
    text = f"{_second(event['at'])}  {event['type']}  {words}".rstrip()
    out.print(text, markup=False, soft_wrap=True)


def _second(at: str) -> str:
    """A time to the second: people read it. --json has all of it."""
    return re.sub(r"\.\d+", "", at)


def _event_words(kind: str, data: Mapping[str, Any]) -> str:
    """`key=value …`, without the points of curves; of files only the names."""
    if kind == "transition":
        why = (data.get("reason") or {}).get("message") or data.get("cause", "")
        return f"{data.get('from', '?')} -> {data.get('to', '?')}" + (f" ({why})" if why else "")
    return " ".join(
        f"{key}={_value_words(value)}"
        for key, value in data.items()
        if key != "points" and value is not None
    )


def _value_words(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return ",".join(str(item["name"]) for item in value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if " " in value or "\n" in value else value
    text = json.dumps(round(value, 5) if isinstance(value, float) else value, ensure_ascii=False)
    words = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, list | dict) and len(text) > LONG and not words:
        return f"[{len(value)} …]" if isinstance(value, list) else f"{{{len(value)} …}}"
    return text
