"""Commands for those who train: train, get, cancel, retry; `views` has those that look."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.progress import Progress, track

from gpu_agent import needs
from gpu_agent.recipe import FAMILIES, QUALITIES, Recipe
from orchestrator.cli.client import Client, job_path
from orchestrator.cli.completion import families, job_ids, qualities
from orchestrator.cli.console import (
    CliError,
    Exit,
    err,
    out,
    print_json,
    print_rows,
    size_words,
)
from orchestrator.cli.follow import ENDED, detaching, follow
from orchestrator.cli.quote import estimate
from state.rehearsal import FIXTURES

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
JobId = Annotated[
    str, typer.Argument(help="The job's id, as `stoker ps` shows it.", autocompletion=job_ids)
]
#: Of a folder of photographs: those of the subject's class, for prior preservation.
CLASS_FOLDER = "regularization"
#: Of a recipe, what a plan always says.
_TOLD = ("quality", "steps", "resolution", "adapter", "rank", "targets", "learning_rate")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"}


def register(app: typer.Typer) -> None:
    for command in (train, get, cancel, retry):
        app.command()(command)


def train(
    photos: Annotated[Path, typer.Argument(help="A folder of photographs, or one zip.")],
    base: Annotated[
        str,
        typer.Option(help="civitai:<version>, hf:<owner>/<repo>/<file>, s3:bases/<key> or a URL."),
    ],
    trigger: Annotated[str, typer.Option(help="The word that will stand for the subject.")] = "",
    family: Annotated[
        str,
        typer.Option(help=f"Of the base: {', '.join(FAMILIES)}.", autocompletion=families),
    ] = "sd1",
    quality: Annotated[
        str,
        typer.Option(
            help=f"Sets what the recipe does not say: {', '.join(QUALITIES)}.",
            autocompletion=qualities,
        ),
    ] = "standard",
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    recipe: Annotated[
        str, typer.Option(help="More of the recipe, as JSON: '{\"rank\": 32}'.")
    ] = "{}",
    gpu: Annotated[list[str] | None, typer.Option(help='Only this GPU, e.g. "RTX 4090".')] = None,
    min_vram: Annotated[float, typer.Option(help="GB of GPU memory at least.")] = 8.0,
    max_cost: Annotated[float, typer.Option(help="Dollars, all attempts together.")] = 5.0,
    interruptible: Annotated[
        bool, typer.Option("--interruptible", help="Cheaper machines, which others may outbid.")
    ] = False,
    hedge: Annotated[
        bool, typer.Option(help="A second machine where the first is slow to boot.")
    ] = True,
    webhook: Annotated[str, typer.Option(help="Where to tell of each step.")] = "",
    fixture: Annotated[str, typer.Option(help=f"With a test key: {', '.join(FIXTURES)}.")] = "",
    time_scale: Annotated[
        float | None, typer.Option(help="With a test key: so many seconds pass in one; usually 60.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA on photographs.

    Example: stoker train ./photos --base civitai:128713 --trigger ohwx --max-cost 2

    JSON: the job, as `GET /v1/jobs/{id}` answers, once it has ended; with --detach as it was
    made, with its `webhook_secret`. With --dry-run {photographs, job, estimate}: a list of
    paths, what would be sent to `POST /v1/jobs`, and what `POST /v1/jobs/estimate` answers to it,
    null where no server can be asked.
    """
    said = {"quality": quality, "steps": steps, "trigger": trigger or None}
    wanted = _recipe(recipe, said, family)
    files = photo_files(photos)
    body: dict[str, Any] = {
        "base": base,
        "base_family": family,
        "recipe": wanted,
        "gpu": {"min_vram_gb": min_vram, "gpu_names": gpu or []},
        "max_cost": round(max_cost * 1_000_000),
        "interruptible": interruptible,
        "hedge": hedge,
    }
    if webhook:
        body["webhook"] = {"url": webhook}
    if test := _rehearsal(fixture, time_scale):
        body["test"] = test
    rehearsed = "test" in body or _has_test_key()
    _show_plan(files, body, rehearsed)
    asks = not yes and not rehearsed
    # without a terminal to confirm at, nobody would see it
    if dry_run or (asks and sys.stdin.isatty()):
        images = sum(map(_is_photograph, files))
        found = estimate(body, images=images, size=sum(path.stat().st_size for path in files))
    if dry_run:
        if as_json:
            photographs = [str(path) for path in files]
            print_json({"photographs": photographs, "job": body, "estimate": found})
        return
    if asks:
        _confirm(max_cost)
    client = Client.here()
    try:
        dataset = upload_dataset(client, photos, files)
    except KeyboardInterrupt:
        err.print("\nnothing was started, and nothing is spent")
        raise
    job = client.post("/v1/jobs", {**body, "dataset_id": dataset})
    err.print(f"job {job['id']}", markup=False)
    if job.get("webhook_secret") and not as_json:
        err.print(f"webhook secret (shown once): {job['webhook_secret']}", markup=False)
    if detach:
        if as_json:
            print_json(job)
        else:
            out.print(job["id"], markup=False)
        return
    finish(client, job["id"], as_json=as_json)


def _rehearsal(fixture: str, time_scale: float | None) -> dict[str, Any]:
    """What is rehearsed, as the options say it; empty for a real training."""
    if fixture and fixture not in FIXTURES:
        known = f"known are {', '.join(FIXTURES)}"
        raise CliError(f"no fixture is called {fixture!r}", known, "name one of them", Exit.USAGE)
    said = {"fixture": fixture or None, "time_scale": time_scale}
    return {key: value for key, value in said.items() if value is not None}


def _has_test_key() -> bool:
    try:
        return Client.here().rehearses
    except CliError:  # there is no server, which matters only to what is no dry run
        return False


def _confirm(max_cost: float) -> None:
    if not sys.stdin.isatty():
        raise CliError(
            f"this may spend up to ${max_cost:.2f}",
            "there is no terminal to confirm at",
            "add -y to spend it, or --dry-run to see the plan alone",
            Exit.USAGE,
        )
    if not typer.confirm(f"Spend at most ${max_cost:.2f}?", err=True):
        raise CliError("nothing was started", "not confirmed", "", Exit.FAILED)


def _recipe(text: str, said: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The whole recipe: what the options and the JSON say, and what follows from them."""
    check_family(family)
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("it is not an object")
        options = {key: value for key, value in said.items() if value is not None}
        return Recipe.from_dict({**options, **given}, family).to_dict()
    except ValueError as error:
        then = "docs/trainer.md lists the recipe's keys"
        raise CliError("the recipe cannot be used", str(error), then, Exit.USAGE) from None


def check_family(name: str) -> None:
    if name not in FAMILIES:
        why = f"known are {', '.join(FAMILIES)}"
        raise CliError(f"no base family is called {name!r}", why, "name one of them", Exit.USAGE)


def photo_files(photos: Path) -> list[Path]:
    """The files of a dataset: a zip alone, or a folder's images and captions."""
    if photos.is_file() and photos.suffix.lower() == ".zip":
        return [photos]
    if not photos.is_dir():
        why = "it is no zip and no folder" if photos.exists() else "there is nothing of that name"
        raise CliError(
            f"{photos} cannot be used as photographs", why, "name a folder or a zip", Exit.USAGE
        )
    files = sorted([*photos.iterdir(), *(photos / CLASS_FOLDER).glob("*")])
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not any(_is_photograph(path) for path in images):
        why = f"none of its files ends in {', '.join(sorted(SUFFIXES))}"
        raise CliError(f"{photos} holds no photograph", why, "name another folder", Exit.USAGE)
    texts = {path.with_suffix(".txt") for path in images} | {photos / "metadata.jsonl"}
    return images + [path for path in files if path in texts]


def _is_photograph(path: Path) -> bool:
    """Of the subject, that is: no mask, and none of its class."""
    is_mask = path.name.lower().endswith(".mask.png")
    return path.suffix.lower() in SUFFIXES and not is_mask and path.parent.name != CLASS_FOLDER


def _show_plan(files: Sequence[Path], body: Mapping[str, Any], rehearsed: bool) -> None:
    size = sum(path.stat().st_size for path in files)
    images = [path for path in files if _is_photograph(path)]
    what = f"{len(images)} in {images[0].parent}" if images else f"in {files[0]}"
    beside = {
        "with a caption": sum(path.suffix.lower() == ".txt" for path in files),
        "with a mask": sum(path.name.lower().endswith(".mask.png") for path in files),
        "of the class": sum(path.parent.name == CLASS_FOLDER for path in files),
    }
    what += "".join(f", {count} {which}" for which, count in beside.items() if count)
    err.print("Plan", style="bold")
    print_rows(
        err,
        [
            ("  photographs", f"{what}, {size_words(size)}"),
            ("  base", f"{body['base']} ({body['base_family']})"),
            ("  recipe", _recipe_words(body["recipe"], body["base_family"])),
            ("  GPU", _gpu_words(body)),
            ("  at most", f"${body['max_cost'] / 1e6:.2f}, all attempts together"),
            *([("  webhook", body["webhook"]["url"])] if "webhook" in body else []),
            *([("  rehearsed", "nothing is rented or spent")] if rehearsed else []),
        ],
    )


def _recipe_words(recipe: Mapping[str, Any], family: str) -> str:
    """What decides time and result, and whatever is not as it usually is; --json has all."""
    usual = Recipe.from_dict({}, family).to_dict()
    shown = [key for key in recipe if key in _TOLD or recipe[key] != usual[key]]
    return ", ".join(f"{key} {recipe[key]}" for key in shown)


def _gpu_words(body: Mapping[str, Any]) -> str:
    gpu, family = body["gpu"], body["base_family"]
    named = " or ".join(gpu["gpu_names"]) or "what makes the whole job cheapest"
    least = needs.least(Recipe.from_dict(body["recipe"], family), family)
    return f"{named}, with at least {max(gpu['min_vram_gb'], least):g} GB"


def upload_dataset(client: Client, photos: Path, files: list[Path]) -> str:
    """Announce, upload and seal; the dataset's id."""

    def described(path: Path) -> dict[str, Any]:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest}

    if photos.is_file():
        dataset = client.post("/v1/datasets", {"zip": described(photos)})
    else:
        listed = [
            {"name": path.relative_to(photos).as_posix(), **described(path)} for path in files
        ]
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
    job: Mapping[str, Any] = {}
    with detaching(job_id):
        job = follow(lambda: client.job(job_id), err)
    if not job:
        return
    if as_json:
        print_json(job)
    if job["status"] != "completed":
        error = bad_end(job)
        if as_json:  # the document says it all, and there is to be one alone
            raise typer.Exit(int(error.code))
        raise error
    if not as_json:
        err.print(f"completed; `stoker get {job_id}` downloads the weights", markup=False)


def bad_end(job: Mapping[str, Any]) -> CliError:
    """What to tell of a job that ended, and not as it should."""
    reason = job.get("reason") or {}
    over_budget = str(reason.get("code", "")).startswith("budget.")
    return CliError(
        f"job {job['id']} {job['status']}",
        f"{reason.get('code', '')}: {reason.get('message', '')}".strip(": "),
        f"`stoker logs {job['id']}`",
        Exit.OVER_BUDGET if over_budget else Exit.JOB_ENDED_BADLY,
    )


def get(
    job_id: JobId,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where to put them.")] = Path("."),
    name: Annotated[str, typer.Option(help="Only this file.")] = "",
    as_json: AsJson = False,
) -> None:
    """Download a job's result files and check their SHA-256.

    Example: stoker get job_01JD… -o ./loras

    JSON: [{name, path, sha256}], `path` being where it lies now.
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
    job = client.job(job_id)
    wanted = [item for item in job["result_files"] if not name or item["name"] == name]
    if not wanted:
        known = ", ".join(item["name"] for item in job["result_files"])
        why = f"it has {known}" if known else f"it is {job['status']}"
        what = f"job {job_id} has no " + (f"file {name}" if name else "result files")
        then = f"`stoker show {job_id}`" if known or job["status"] in ENDED else "wait for its end"
        raise CliError(what, why, then, Exit.NOT_FOUND)
    size = sum(item["bytes"] for item in wanted)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("downloading", total=size)

        def came(count: int) -> None:
            progress.advance(task, count)

        return [
            _fetch(client, job_id, item, _inside(folder, item["name"]), came) for item in wanted
        ]


def _fetch(
    client: Client,
    job_id: str,
    item: Mapping[str, Any],
    target: Path,
    came: Callable[[int], None],
) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    client.download(f"{job_path(job_id)}/artifacts/{quote(item['name'])}", target, came=came)
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != item["sha256"]:
        target.unlink()
        why = f"its SHA-256 is {digest}, not {item['sha256']}"
        raise CliError(f"{item['name']} arrived damaged", why, "try again")
    return {"name": item["name"], "path": str(target.resolve()), "sha256": digest}


def _inside(folder: Path, name: str) -> Path:
    """Where `name` goes; the server's word is not enough to write outside of `folder`."""
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise CliError("the server names a file outside of the folder", name, "do not trust it")
    return target


def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job; its GPU is given back.

    Example: stoker cancel job_01JD…

    JSON: the job, as `GET /v1/jobs/{id}` answers.
    """
    _act(job_id, "cancel", as_json)


def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Try a stalled job again now, on another machine.

    Example: stoker retry job_01JD…

    JSON: the job, as `GET /v1/jobs/{id}` answers.
    """
    _act(job_id, "retry", as_json)


def _act(job_id: str, verb: str, as_json: bool) -> None:
    job = Client.here().post(f"{job_path(job_id)}/{verb}")
    if as_json:
        print_json(job)
    else:
        out.print(f"{job['id']} is {job['status']}", markup=False)
