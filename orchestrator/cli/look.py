"""Commands that say why a job stands where it stands, and that wait for it: explain, wait."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit, err, out, print_json
from orchestrator.cli.follow import ENDED, detaching
from orchestrator.cli.jobs import AsJson, JobId, bad_end
from orchestrator.cli.quote import span
from state.job import Status

#: Seconds that the server holds a question, at most; and between two of them, at least.
HELD_S, PAUSE_S = 25, 1.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
#: What a person types for what an explanation says that they can do.
_COMMANDS = {
    "cancel": "stoker cancel {}",
    "retry": "stoker retry {}",
    "download": "stoker get {}",
    "logs": "stoker logs {}",
}


def register(app: typer.Typer) -> None:
    for command in (explain, wait):
        app.command()(command)


# --- explain ------------------------------------------------------------------------------------


def explain(job_id: JobId, as_json: AsJson = False) -> None:
    """Say what a job waits for, what was last heard of it, and what comes next.

    Example: stoker explain job_01JD…

    JSON: {job, at, status, waits_for, headline, sentences, next, signals, deadlines, search,
    brakes, machines, options}, as `GET /v1/jobs/{id}/explain` answers.
    """
    found = Client.here().explanation(job_id)
    if as_json:
        print_json(found)
        return
    for line in explained(found):
        out.print(line, markup=False, soft_wrap=True)


def explained(found: Mapping[str, Any]) -> Iterator[str]:
    """An explanation as lines."""
    headline, *others = found["sentences"] or [found["headline"]]
    yield f"{found['job']} is {found['status']}. {headline}"
    for words in others:
        # said below, with the commands to type
        if not words.startswith("You can:"):
            yield f"  {words}"
    heard = [_heard(signal) for signal in found["signals"]]
    if heard:
        yield f"  Heard: {', '.join(heard)}."
    for option in found["options"]:
        command = _COMMANDS.get(option["name"], "").format(found["job"])
        yield f"  You can {option['words']}" + (f": `{command}`" if command else ".")


def _heard(signal: Mapping[str, Any]) -> str:
    age = signal["age_s"]
    when = "never" if age is None else f"{span(age)} ago"
    return f"{signal['name']} {when}" + ("" if signal["well"] else " (!)")


# --- wait ---------------------------------------------------------------------------------------


def wait(
    job_id: JobId,
    goal: Annotated[
        Status, typer.Option("--for", help="The status to wait for; passing it is enough.")
    ] = Status.COMPLETED,
    timeout: Annotated[
        str, typer.Option(help="At most so long: 90, 45s, 10m, 2h; as long as it takes, if not.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Wait until a job reaches a status.

    Exit code 0 when it did, 6 when it ended otherwise (7 for want of money), 8 when time was up.
    Ctrl-C ends the waiting alone.

    Example: stoker wait job_01JD… --for training --timeout 30m

    JSON: the job as it then is, as `GET /v1/jobs/{id}` answers, whatever the exit code.
    """
    limit = seconds(timeout) if timeout else None
    job: Mapping[str, Any] = {}
    with detaching(job_id):
        job = waited(Client.here(), job_id, goal, limit)
    if not job:
        return
    if as_json:
        print_json(job)
    if reached(job, goal):
        if not as_json:
            err.print(f"{job_id} is {job['status']}", markup=False)
        return
    error = bad_end(job)
    if job["status"] not in ENDED:
        error = CliError(
            f"job {job_id} is {job['status']} and not {goal}, after {timeout}",
            "time is up; the job goes on",
            f"`stoker explain {job_id}` says what it waits for",
            Exit.TIMED_OUT,
        )
    if as_json:  # the document says it all, and there is to be one alone
        raise typer.Exit(int(error.code))
    raise error


def seconds(text: str) -> float:
    """Of `90`, `45s`, `10m`, `2h` or `1d`. Raises: CliError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip(), re.ASCII)
    if found is None:
        why = "it must be a number and s, m, h or d, like 10m"
        raise CliError(f"{text!r} is no time", why, "`stoker wait --help`", Exit.USAGE)
    return float(found[1]) * _UNITS[found[2] or "s"]


def reached(job: Mapping[str, Any], goal: Status) -> bool:
    """Whether the job is in a status, or its present attempt was."""
    return job["status"] == goal or any(
        step["target"] == goal and step.get("attempt", job["attempt"]) == job["attempt"]
        for step in job["transitions"]
    )


def waited(
    client: Client,
    job_id: str,
    goal: Status,
    limit: float | None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Mapping[str, Any]:
    """The job once it reached `goal`, ended, or the time is up; the server is asked to answer
    when something changes."""
    began = monotonic()
    job, tag = client.poll(job_id)
    while job is not None:
        left = HELD_S if limit is None else began + limit - monotonic()
        if reached(job, goal) or job["status"] in ENDED or left <= 0:
            return job
        asked = monotonic()
        news, tag = client.poll(job_id, wait_s=min(HELD_S, max(1, int(left))), etag=tag)
        job = news or job
        if news is None and (early := PAUSE_S - (monotonic() - asked)) > 0:
            # a server with many waiting callers answers at once
            sleep(early)
    return {}
