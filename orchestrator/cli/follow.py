"""Watching a job: states pass, loss and cost tick."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.cli.console import err

ENDED = ("completed", "failed", "cancelled")
PATH = ("pending", "pendingGpu", "pendingImages", "pendingModel", "training", "completed")
POLL_S = 0.5
GLYPHS = {"completed": "✔", "failed": "✘", "cancelled": "✘", "stalled": "!"}


def follow(
    fetch: Callable[[], Mapping[str, Any]],
    console: Console,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Mapping[str, Any]:
    """Show a job until it ends; the last state of it.

    On a terminal one live picture; elsewhere a line for each state and each tenth of training.
    """
    if not console.is_terminal:
        return follow_lines(fetch, console, sleep)
    with Live(console=console, refresh_per_second=8, transient=False) as live:
        while True:
            job = fetch()
            live.update(picture(job))
            if job["status"] in ENDED:
                return job
            sleep(POLL_S)


def follow_lines(
    fetch: Callable[[], Mapping[str, Any]], console: Console, sleep: Callable[[float], None]
) -> Mapping[str, Any]:
    seen = 0
    tenth = -1
    while True:
        job = fetch()
        for step in job["transitions"][seen:]:
            why = f" ({step['reason']['message']})" if step.get("reason") else ""
            text = f"{step['at']}  {step['source']} -> {step['target']}{why}"
            console.print(text, markup=False, soft_wrap=True)
        seen = len(job["transitions"])
        training = job["progress"].get("training", {})
        step, total = training.get("step") or 0, training.get("total") or 0
        if total and 10 * step // total > tenth:
            tenth = 10 * step // total
            words = [f"  step {step}/{total}", _loss(training), job["cost"]["display"]]
            console.print("  ".join(word for word in words if word), markup=False)
        if job["status"] in ENDED:
            return job
        sleep(POLL_S)


def picture(job: Mapping[str, Any]) -> Group:
    """A job as a few lines: the path with the present state lit, progress, loss, cost."""
    lines: list[Any] = [_path(job), _bar(job), _facts(job)]
    if job.get("reason"):
        lines.append(Text(f"  {job['reason']['code']}: {job['reason']['message']}", style="yellow"))
    return Group(*lines)


def _path(job: Mapping[str, Any]) -> Columns:
    """The states in order, each whole, on as many lines as it takes."""
    spans = durations(job)
    states = []
    status = job["status"]
    reached = {step["target"] for step in job["transitions"]} | {"pending"}
    for name in PATH:
        lit = name == status
        mark = "●" if lit else ("✔" if name in reached else "○")
        if name == "completed" and lit:
            mark = "✔"
        style = "bold green" if lit else ("green" if name in reached else "dim")
        took = f" {spans[name]:.0f}s" if spans.get(name, 0) >= 0.5 and name != "completed" else ""
        states.append(Text(f"{mark} {name}{took}", style=style, no_wrap=True))
    if status not in PATH:
        states.append(Text(f"{GLYPHS.get(status, '●')} {status}", style="bold red", no_wrap=True))
    return Columns(states, padding=(0, 2))


def durations(job: Mapping[str, Any]) -> dict[str, float]:
    """Seconds spent in each state so far, over all attempts."""
    spans: dict[str, float] = {}
    began, state = _time(job["created_at"]), "pending"
    for step in job["transitions"]:
        at = _time(step["at"])
        spans[state] = spans.get(state, 0.0) + (at - began).total_seconds()
        began, state = at, step["target"]
    return spans


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _bar(job: Mapping[str, Any]) -> Any:
    status, progress = job["status"], job["progress"]
    training = progress.get("training", {})
    done, total, words = 0.0, 1.0, ""
    if status in ("training", "completed"):
        done, total = training.get("step") or 0, training.get("total") or 1
        ready = bool(training.get("total"))
        words = f"step {done}/{training['total']}" if ready else "the trainer is getting ready"
        if training.get("steps_per_s"):
            words += f", {training['steps_per_s']:.1f}/s"
    elif status == "pendingImages":
        words = _bytes("photographs", progress.get("images", {}))
    elif status == "pendingModel":
        words = _bytes("base model", progress.get("model", {}))
    elif status == "pendingGpu":
        words = str(progress.get("gpu_search", "looking for a GPU"))
    row = Table.grid(padding=(0, 1))
    row.add_row("  ", ProgressBar(total=total, completed=done, width=40), words)
    return row


def _bytes(what: str, data: Mapping[str, Any]) -> str:
    got, total = data.get("bytes") or 0, data.get("bytes_total") or 0
    return f"{what}: {got / 1e6:.1f} of {total / 1e6:.1f} MB" if total else what


def _facts(job: Mapping[str, Any]) -> Text:
    training = job["progress"].get("training", {})
    parts = [_loss(training)] if training else []
    if job.get("host"):
        parts.append(f"{job['host']['gpu']} on machine {job['host']['machine_id']}")
    parts.append(f"cost {job['cost']['display']}")
    return Text("   " + "   ".join(part for part in parts if part), style="dim")


def _loss(training: Mapping[str, Any]) -> str:
    figures = (("loss", training.get("loss")), ("validation", training.get("validation_loss")))
    shown = [f"{name} {value:.4f}" for name, value in figures if isinstance(value, int | float)]
    return ", ".join(shown)


@contextlib.contextmanager
def detaching(job_id: str) -> Iterator[None]:
    """Ctrl-C lets the job go on, and says how to look at it and how to end it."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\ndetached; the job goes on")
        for verb, what in (("show -w", "watches it"), ("cancel ", "ends it")):
            err.print(f"  stoker {verb} {job_id}   {what}", markup=False, soft_wrap=True)
