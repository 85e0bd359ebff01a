"""Commands for those who train: train, ps, show, logs, get, cancel, retry."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from gpu_agent import wire
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit, err, out, print_json
from orchestrator.cli.follow import ENDED, durations, follow, picture

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
JobId = Annotated[str, typer.Argument(help="The job's id, as `stoker ps` shows it.")]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def register(app: typer.Typer) -> None:
    for command in (train, ps, show, logs, get, cancel, retry):
        app.command()(command)


def train(
    photos: Annotated[Path, typer.Argument(help="A folder of photographs, or one zip.")],
    base: Annotated[
        str, typer.Option(help="civitai:<version>, hf:<owner>/<repo>[/<file>], s3:<key> or a URL.")
    ],
    trigger: Annotated[str, typer.Option(help="The word that will stand for the subject.")] = "",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    recipe: Annotated[
        str, typer.Option(help="More of the recipe, as JSON: '{\"rank\": 32}'.")
    ] = "{}",
    gpu: Annotated[list[str] | None, typer.Option(help='Only this GPU, e.g. "RTX 4090".')] = None,
    min_vram: Annotated[float, typer.Option(help="GB of GPU memory at least.")] = 8.0,
    max_cost: Annotated[float, typer.Option(help="Dollars, all attempts together.")] = 5.0,
    webhook: Annotated[str, typer.Option(help="Where to tell of each step.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
    detach: Annotated[bool, typer.Option(help="Do not follow the job.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA on photographs.

    Example: stoker train ./photos --base civitai:128713 --trigger ohwx --max-cost 2
    """
    wanted = _recipe(recipe, trigger, steps)
    files = photo_files(photos)
    body: dict[str, Any] = {
        "base": base,
        "recipe": wanted,
        "gpu": {"min_vram_gb": min_vram, "gpu_names": gpu or []},
        "max_cost": round(max_cost * 1_000_000),
    }
    if webhook:
        body["webhook"] = {"url": webhook}
    _show_plan(files, body)
    if dry_run:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise CliError(
                "this would spend money", "nobody is here to confirm", "add -y", Exit.USAGE
            )
        typer.confirm(f"Spend at most ${max_cost:.2f}?", abort=True, err=True)
    client = Client.here()
    dataset = upload_dataset(client, photos, files)
    job = client.post("/v1/jobs", {**body, "dataset_id": dataset})
    err.print(f"job {job['id']}", markup=False)
    if job.get("webhook_secret"):
        err.print(f"webhook secret (shown once): {job['webhook_secret']}", markup=False)
    if detach:
        if as_json:
            print_json(job)
        return
    finish(client, job["id"], as_json=as_json)


def _recipe(text: str, trigger: str, steps: int) -> dict[str, Any]:
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("it is not an object")
        recipe = {"steps": steps, **({"trigger": trigger} if trigger else {}), **given}
        wire.Recipe.from_dict(recipe)
    except ValueError as error:
        then = "see the recipe's keys in the README"
        raise CliError("the recipe cannot be used", str(error), then, Exit.USAGE) from None
    return recipe


def photo_files(photos: Path) -> list[Path]:
    """The files of a dataset: a zip alone, or a folder's images and captions."""
    if photos.is_file() and photos.suffix.lower() == ".zip":
        return [photos]
    if not photos.is_dir():
        raise CliError(
            f"{photos} is neither a folder nor a zip",
            "",
            "name a folder of photographs",
            Exit.USAGE,
        )
    images = sorted(path for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if not images:
        why = f"none of its files ends in {', '.join(sorted(SUFFIXES))}"
        raise CliError(f"{photos} holds no photograph", why, "name another folder", Exit.USAGE)
    return images + [
        path.with_suffix(".txt") for path in images if path.with_suffix(".txt").is_file()
    ]


def _show_plan(files: list[Path], body: Mapping[str, Any]) -> None:
    table = Table(title="Plan", show_header=False, title_justify="left")
    size = sum(path.stat().st_size for path in files)
    table.add_row("photographs", f"{len(files)} files, {size / 1e6:.1f} MB")
    table.add_row("base", body["base"])
    table.add_row("recipe", ", ".join(f"{key} {value}" for key, value in body["recipe"].items()))
    table.add_row("GPU", ", ".join(body["gpu"]["gpu_names"]) or "cheapest for the whole job")
    table.add_row("at most", f"${body['max_cost'] / 1e6:.2f}")
    err.print(table)


def upload_dataset(client: Client, photos: Path, files: list[Path]) -> str:
    """Announce, upload and seal; the dataset's id."""

    def described(path: Path) -> dict[str, Any]:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest}

    if photos.is_file():
        dataset = client.post("/v1/datasets", {"zip": described(photos)})
    else:
        listed = [{"name": path.name, **described(path)} for path in files]
        dataset = client.post("/v1/datasets", {"files": listed})
    pairs = list(zip(dataset["uploads"], files, strict=True))
    for upload, path in track(
        pairs, description="uploading", console=err, disable=not err.is_terminal
    ):
        client.put_file(upload, path)
    client.post(f"/v1/datasets/{dataset['id']}/seal")
    return str(dataset["id"])


def finish(client: Client, job_id: str, *, as_json: bool) -> None:
    """Follow a job to its end; Ctrl-C lets it go on."""
    try:
        job = follow(lambda: client.get(f"/v1/jobs/{job_id}"), err)
    except KeyboardInterrupt:
        err.print(f"\ndetached; the job goes on. `stoker cancel {job_id}` ends it.", markup=False)
        raise SystemExit(int(Exit.OK)) from None
    if as_json:
        print_json(job)
    if job["status"] != "completed":
        reason = job.get("reason") or {}
        raise CliError(
            f"job {job_id} {job['status']}",
            f"{reason.get('code', '')}: {reason.get('message', '')}".strip(": "),
            f"stoker show {job_id}",
            Exit.JOB_ENDED_BADLY,
        )
    if not as_json:
        out.print(f"weights: stoker get {job_id}", markup=False)


def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Ended jobs too.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every 2 s.")] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Example: stoker ps -a
    """
    client = Client.here()
    while True:
        jobs = [job for job in client.pages("/v1/jobs") if every or job["status"] not in ENDED]
        if as_json and watch:
            sys.stdout.write(json.dumps(jobs) + "\n")
            sys.stdout.flush()
        elif as_json:
            print_json(jobs)
        elif jobs:
            out.print(_jobs_table(jobs))
        else:
            err.print("no jobs run; `stoker ps -a` shows ended ones, `stoker train` starts one")
        if not watch:
            return
        time.sleep(2)


def _jobs_table(jobs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("JOB", "STATUS", "TRY", "STEP", "LOSS", "GPU", "COST", "WHY"):
        table.add_column(title, no_wrap=title != "WHY")
    for job in jobs:
        training = job["progress"].get("training", {})
        step = f"{training['step']}/{training['total']}" if training.get("total") else ""
        loss = f"{training['loss']:.4f}" if isinstance(training.get("loss"), float) else ""
        why = (job.get("reason") or {}).get("message") or (
            job["progress"].get("gpu_search", "") if job["status"] == "pendingGpu" else ""
        )
        host = job.get("host") or {}
        table.add_row(
            job["id"], job["status"], str(job["attempt"]), step, loss,
            host.get("gpu", ""), job["cost"]["display"], why,
        )  # fmt: skip
    return table


def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job: states, progress, machine, cost, result.

    Example: stoker show job_01JD…
    """
    job = Client.here().get(f"/v1/jobs/{job_id}")
    if as_json:
        print_json(job)
        return
    out.print(picture(job))
    table = Table(show_header=False, box=None)
    table.add_row("id", job["id"])
    table.add_row("base", job["base"])
    table.add_row("attempt", f"{job['attempt']} of {job['max_attempts']}")
    table.add_row("cost", f"{job['cost']['display']} of at most ${job['cost']['cap'] / 1e6:.2f}")
    if job.get("retry_at"):
        table.add_row("next try", job["retry_at"])
    for state, seconds in durations(job).items():
        table.add_row(f"in {state}", f"{seconds:.1f} s")
    for item in job["result_files"]:
        table.add_row(item["name"], f"{item['bytes']} bytes, sha256 {item['sha256'][:12]}…")
    out.print(table)


def logs(
    job_id: JobId,
    following: Annotated[bool, typer.Option("--follow", "-f", help="As they come.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a job's events and the agent's log lines.

    Example: stoker logs -f job_01JD…
    """
    client = Client.here()
    after = 0
    while True:
        page = client.get(f"/v1/jobs/{job_id}/events", after=after, limit=500)
        for event in page["data"]:
            if as_json:
                sys.stdout.write(json.dumps(event) + "\n")
            else:
                _print_event(event)
        sys.stdout.flush()
        after = page["next_after"]
        if page["has_more"]:
            continue
        if not following or client.get(f"/v1/jobs/{job_id}")["status"] in ENDED:
            return
        time.sleep(1)


def _print_event(event: Mapping[str, Any]) -> None:
    if event["type"] == "heartbeat":
        return
    if event["type"] == "log.lines":
        for line in event["data"].get("lines", []):
            out.print(f"{event['at']}  {line}", markup=False)
        return
    data = {key: value for key, value in event["data"].items() if key != "points"}
    out.print(f"{event['at']}  {event['type']}  {json.dumps(data)}", markup=False)


def get(
    job_id: JobId,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where to put them.")] = Path("."),
    name: Annotated[str, typer.Option(help="Only this file.")] = "",
    as_json: AsJson = False,
) -> None:
    """Download a job's result files and check their SHA-256.

    Example: stoker get job_01JD… -o ./loras
    """
    files = fetch_results(Client.here(), job_id, folder, name=name)
    if as_json:
        print_json(files)
        return
    for item in files:
        out.print(item["path"], markup=False)


def fetch_results(
    client: Client, job_id: str, folder: Path, *, name: str = ""
) -> list[dict[str, Any]]:
    """Download result files; each checked against the server's SHA-256."""
    job = client.get(f"/v1/jobs/{job_id}")
    wanted = [item for item in job["result_files"] if not name or item["name"] == name]
    if not wanted:
        known = ", ".join(item["name"] for item in job["result_files"])
        why = f"it has {known}" if known else f"it is {job['status']}"
        raise CliError(f"job {job_id} has no such result file", why, "", Exit.NOT_FOUND)
    got = []
    for item in wanted:
        target = folder / item["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download(f"/v1/jobs/{job_id}/artifacts/{item['name']}", target)
        with target.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != item["sha256"]:
            target.unlink()
            raise CliError(f"{item['name']} arrived damaged", "", "try again")
        got.append({"name": item["name"], "path": str(target.resolve()), "sha256": digest})
    return got


def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job; its GPU is given back.

    Example: stoker cancel job_01JD…
    """
    _act(job_id, "cancel", as_json)


def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Try a stalled job again now, on another machine.

    Example: stoker retry job_01JD…
    """
    _act(job_id, "retry", as_json)


def _act(job_id: str, verb: str, as_json: bool) -> None:
    job = Client.here().post(f"/v1/jobs/{job_id}/{verb}")
    if as_json:
        print_json(job)
    else:
        out.print(f"{job['id']} is {job['status']}", markup=False)
