"""`stoker demo`: the whole of Stoker on this machine, for real, without spending money.

Real PostgreSQL, Redis and S3; the real web, worker and beat; the real `vastai` SDK against the
Vast sandbox, whose rented machines are local processes; the real agent and a real training.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gpu_agent import wire
from gpu_agent.recipe import DIFFUSION, FAMILIES
from infra.settings import Settings
from orchestrator.api.keys import hash_of
from orchestrator.cli.client import Client, demo_dir
from orchestrator.cli.console import CliError, Exit, err, out, print_json, print_rows
from orchestrator.cli.follow import durations, follow
from orchestrator.cli.jobs import check_family, fetch_results, photo_files, upload_dataset
from orchestrator.cli.processes import check_free
from orchestrator.cli.receiver import Receiver
from orchestrator.cli.stage import Stage
from state import money

if TYPE_CHECKING:
    from infra.wiring import Services

#: For a model of a few million parameters and a handful of photographs, on two cores.
TINY_RECIPE: Mapping[str, Any] = {
    "steps": 100,
    "resolution": 64,
    "batch_size": 8,
    "rank": 16,
    "alpha": 16,
    "targets": "full",
    "learning_rate": 0.01,
    "warmup_steps": 5,
    "validation_every": 25,
    "trigger": "sks",
    "caption_template": "a photo of {trigger}",
}
#: What others than SD 1.x want of it: a denoiser of few blocks breaks at a rate so high.
TINY_CHANGES: Mapping[str, Mapping[str, Any]] = {}
SKIMAGE_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
NEEDED_BYTES = 2_000_000_000
END_S = 60.0
STATES = ("pending", "pendingGpu", "pendingImages", "pendingModel", "training", "completed")


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    photos: Annotated[
        Path | None, typer.Argument(help="A folder of photographs; default: scikit-image's.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="civitai:<version>, hf:<repo> or a URL; default: a tiny model.")
    ] = "",
    family: Annotated[str, typer.Option(help=f"Of the base: {', '.join(FAMILIES)}.")] = "sd1",
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    port: Annotated[int, typer.Option(help="Of the API.")] = 8400,
    output: Annotated[Path, typer.Option("--output", "-o", help="For the weights.")] = Path(
        "stoker-demo"
    ),
    once: Annotated[bool, typer.Option("--once", help="End when the job has ended.")] = False,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the pages' address, and open nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Train on photographs with everything on this machine; nothing is spent.

    Example: stoker demo ~/Pictures/dog --once

    JSON: {job, status, reason, transitions, loss, photographs_refused, weights, loads, webhooks,
    cost, instances_left, processes_left, files_left, seconds, faults}; `faults` is empty when all
    was as it should be.
    """
    check_family(family)
    show = Console(stderr=True, quiet=True) if as_json else err
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = _workplace(stack, port)
        files_dir = photos or skimage_photos(root / "photos")
        photo_files(files_dir)
        stage = Stage(root=root, port=port, show=show, own_base=bool(base), family=family)
        with _ending(stage):
            client, services = stage.start(stack)
            ready = time.monotonic() - began
            opening = sys.stdin.isatty() and err.is_terminal and not (once or no_browser or as_json)
            visit = functools.partial(_visit, stage, services, opening=opening)
            report = _job(stage, client, services, files_dir, base, steps, output.absolute(), visit)
            report["seconds"] = {"set_up": round(ready, 1), **report["seconds"]}
            if not once:
                _tell(report)
                _stay(stage)
    report["processes_left"] = stage.left()
    report["files_left"] = [str(path) for path in (root,) if path.exists()]
    faults = judge(report)
    if as_json:
        print_json({**report, "faults": faults})
        raise typer.Exit(int(Exit.FAILED if faults else Exit.OK))
    if once:
        _tell(report)
    if faults:
        raise CliError("the demo did not end as it should", "; ".join(faults), "", Exit.FAILED)


# --- the place ----------------------------------------------------------------------------------


def _workplace(stack: contextlib.ExitStack, port: int) -> Path:
    """An empty directory that goes at the end; one demo at a time."""
    root = demo_dir(Settings.from_env())
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise CliError(f"{root} cannot be used", str(error.strerror), "run it elsewhere") from None
    _alone(stack, root.with_suffix(".lock"))
    if free < NEEDED_BYTES:
        raise CliError(
            "the disk is nearly full",
            f"{free / 1e9:.1f} GB are free at {root}; the demo wants {NEEDED_BYTES / 1e9:.0f} GB",
            "free some space, or set STOKER_DATA to a directory on another disk",
        )
    check_free("127.0.0.1", port, f"stoker demo --port {port + 10}")
    _until(lambda: _is_removed(root))
    root.mkdir()
    stack.callback(shutil.rmtree, root, ignore_errors=True)
    return root


def _is_removed(root: Path) -> bool:
    """Remove what a killed demo left. Its servers may be ending still, and take files away."""
    try:
        shutil.rmtree(root)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
    return not root.exists()


def _alone(stack: contextlib.ExitStack, path: Path) -> None:
    import fcntl

    lock = stack.enter_context(path.open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise CliError(
            "a demo runs here already",
            f"process {lock.read().strip() or '?'} holds {path}",
            "end that one with Ctrl-C, or set STOKER_DATA to another directory",
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def skimage_photos(folder: Path) -> Path:
    """The photographs that ship inside the scikit-image wheel, as PNG files in `folder`."""
    from PIL import Image
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    for name in SKIMAGE_PHOTOS:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.png")
    return folder


@contextlib.contextmanager
def _ending(stage: Stage) -> Iterator[None]:
    """Say that the end takes a moment, whatever the reason for it."""
    try:
        yield
    except KeyboardInterrupt:
        stage.show.print("\nending everything that was started …", markup=False)
        raise


# --- the job ------------------------------------------------------------------------------------


def _job(
    stage: Stage,
    client: Client,
    services: Services,
    photos: Path,
    base: str,
    steps: int | None,
    output: Path,
    visit: Callable[[str], None],
) -> dict[str, Any]:
    """Do what a backend would do, and check what it got. `visit` hears of the job's page."""
    secret = wire.new_secret()
    recipe: dict[str, Any] = {} if base else {**TINY_RECIPE, **TINY_CHANGES.get(stage.family, {})}
    if steps:
        recipe["steps"] = steps
    with Receiver(secret) as receiver:
        dataset = upload_dataset(client, photos, photo_files(photos))
        job = client.post(
            "/v1/jobs",
            {
                "dataset_id": dataset,
                "base": base or stage.tiny_address,
                "base_family": stage.family,
                "recipe": recipe,
                "webhook": {"url": receiver.url, "secret": secret},
            },
        )
        stage.show.print(f"job {job['id']}", markup=False)
        visit(f"/jobs/{job['id']}")
        path = f"/v1/jobs/{job['id']}"
        ended = follow(lambda: client.get(path), stage.show)
        _until(lambda: receiver.has(f"job.{ended['status']}"))
        instances = _instances(services)
        refusals = client.get(f"/v1/datasets/{dataset}")["report"].get("refused", [])
        report = _report(client.get(path), receiver, instances, refusals)
    if ended["status"] == "completed":
        files = fetch_results(client, job["id"], output / job["id"])
        by_name = {item["name"]: item for item in files}
        report["weights"] = by_name.get("lora.safetensors")
        if not base:
            report["loads"] = _check_weights(stage, by_name)
    return report


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _instances(have: Services) -> list[str]:
    """Ids of instances with our prefix that the market still shows, after they had time to go."""
    prefix = f"{have.settings.deployment}/"

    def left() -> list[str]:
        listed = have.provider.instances()
        return [item.id for item in listed if item.label.startswith(prefix)]

    def released() -> bool:
        with have.store.transaction() as tx:
            return not tx.open_leases() and not left()

    _until(released)
    return left()


def _report(
    job: Mapping[str, Any],
    receiver: Receiver,
    instances: list[str],
    refusals: list[Mapping[str, Any]],
) -> dict[str, Any]:
    result = job["progress"].get("upload", {})
    return {
        "job": job["id"],
        "status": job["status"],
        "reason": job["reason"],
        "transitions": [
            {"from": step["source"], "to": step["target"], "at": step["at"]}
            for step in job["transitions"]
        ],
        "loss": {"first": result.get("loss_first"), "best": result.get("loss_best")},
        "photographs_refused": refusals,
        "weights": None,
        "webhooks": {
            "received": len(receiver.got),
            "types": [item["type"] for item in receiver.got],
            "in_order": receiver.in_order,
            "unverified": receiver.refused,
        },
        "cost": {"micro_usd": job["cost"]["so_far"], "display": job["cost"]["display"]},
        "instances_left": instances,
        "seconds": {state: round(span, 2) for state, span in durations(job).items()},
    }


def _check_weights(stage: Stage, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether diffusers loads the weights and their kohya twin, and the image changes."""
    argv = [sys.executable, "-m", "gpu_agent.lora.check", files["lora.safetensors"]["path"]]
    argv += ["--base", str(stage.tiny), "--family", stage.family, "--json"]
    # of the others diffusers reads kohya's naming not at all, or at their real widths alone
    if stage.family in DIFFUSION and (twin := files.get("lora_kohya.safetensors")):
        argv += ["--kohya", twin["path"]]
    stage.show.print("loading the weights with diffusers …", markup=False)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        return {"loads": False, "error": done.stderr.strip()[-500:]}


def judge(report: Mapping[str, Any]) -> list[str]:
    """What is not as it should be; empty when all is."""
    faults = []
    if report["status"] != "completed":
        reason = report["reason"] or {}
        faults.append(f"the job {report['status']}: {reason.get('message', '')}")
        return faults
    passed = ["pending", *(step["to"] for step in report["transitions"])]
    if tuple(passed) != STATES:
        faults.append(f"the states were {' -> '.join(passed)}")
    first, best = report["loss"]["first"], report["loss"]["best"]
    if not (first and best and best < first):
        faults.append(f"the loss did not fall: {first} -> {best}")
    if not report["weights"]:
        faults.append("there are no weights")
    loads = report.get("loads")
    if loads is not None and not loads.get("holds"):
        faults.append(f"the weights do not load or change nothing: {loads}")
    webhooks = report["webhooks"]
    if webhooks["unverified"] or not webhooks["in_order"] or not webhooks["received"]:
        faults.append(f"webhooks were wrong: {webhooks}")
    for name in ("instances_left", "processes_left", "files_left"):
        if report.get(name):
            faults.append(f"{name.replace('_', ' ')}: {report[name]}")
    return faults


def _tell(report: Mapping[str, Any]) -> None:
    """The end, for people."""
    if report["status"] != "completed":
        return
    first, best = report["loss"]["first"], report["loss"]["best"]
    weights = report["weights"]
    for refused in report["photographs_refused"]:
        out.print(f"refused: {refused['name']} {refused['why']}", markup=False)
    rows = [
        ("weights", weights["path"] if weights else "none"),
        ("loss", f"{first:.4f} before, {best:.4f} after ({1 - best / first:.0%} lower)"),
        ("cost", f"it would have cost {money.dollars(report['cost']['micro_usd'])}"),
        ("webhooks", f"{report['webhooks']['received']} received, verified, in order"),
        ("instances", f"{len(report['instances_left'])} left"),
    ]
    print_rows(out, rows)
    out.print("\nnext:", markup=False)
    out.print("  stoker demo PHOTOS_DIR          your own photographs", markup=False)
    out.print("  stoker up                       run it for your web app", markup=False)
    out.print("  stoker train --help             what a real training takes", markup=False)


def _visit(stage: Stage, have: Services, where: str, *, opening: bool) -> None:
    """Say where the job can be watched in a browser; open one where there is a screen."""
    from orchestrator.dashboard import tickets

    path = tickets.issue(have.settings.secret_keys, hash_of(stage.key), where)
    stage.show.print("watch it in a browser (the link logs in once, within two minutes):")
    stage.show.print(f"  {stage.url}{path}", markup=False, soft_wrap=True)
    if opening and has_screen(os.environ, sys.platform):
        # on a thread: some browsers keep whoever called them waiting
        run = threading.Thread(target=webbrowser.open, args=(stage.url + path,), daemon=True)
        run.start()


def has_screen(env: Mapping[str, str], platform: str) -> bool:
    """Whether a browser would be a window; one of text would take this terminal."""
    return platform in ("darwin", "win32") or bool(env.get("DISPLAY") or env.get("WAYLAND_DISPLAY"))


def _stay(stage: Stage) -> None:
    show = stage.show
    show.print(f"\nthe pages and the API are still up at {stage.url}", markup=False)
    show.print(f"  log in with {stage.key}", markup=False, soft_wrap=True)
    show.print("  in another terminal here: stoker ps -a, stoker offers, stoker cost", markup=False)
    show.print("  it ends with everything else, at Ctrl-C", markup=False)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
