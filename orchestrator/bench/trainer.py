"""How fast the LoRA trainer is, beside another trainer at the same work in the same minutes.

Each training is a process of its own, started cold, and watched from outside: the time at which it
says that a step is done, and what the kernel says of its processor time and memory. So both are
measured alike, and neither has to know. Trainings take turns, so that whatever else the machine
does touches both.

The other trainer is diffusers' `examples/text_to_image/train_text_to_image_lora.py`, or any version
of it with the same options and a tqdm bar named `Steps`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

#: Steps per second to the other trainer's, and seconds from a cold start of a tiny model until the
#: first step is done.
BARS = {"ratio": 1.45, "first_step_s": 8.0}
CAPTION = "a photo of sks"
OURS, OTHER = "stoker", "other"
#: What each prints when a step is done; the group is the number of the step.
STEP_OF = {
    OURS: re.compile(rb'"event": "progress", "step": (\d+)'),
    OTHER: re.compile(rb"Steps: [^\r\n]*\| *(\d+)/\d+ \["),
}
#: No line about a step is longer (bytes).
_LONGEST_LINE = 4096
_GPU_LOOK_S = 0.5


class BenchFailed(Exception):
    """A trainer did not do its work; the text is the end of what it said."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, by both alike.

    Attributes:
        size: `tiny`, or `full`: the published geometry with random weights.
        resolution: side of the square images in pixels.
        precision: `fp32` or `bf16`.
    """

    family: str = "sd1"
    size: str = "tiny"
    steps: int = 60
    repeats: int = 3
    resolution: int = 256
    batch_size: int = 1
    rank: int = 16
    threads: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Other:
    """Another trainer: its script, and the Python that has what the script imports."""

    script: Path
    python: Path


@dataclass(frozen=True)
class Run:
    """One training, seen from outside.

    Attributes:
        steps_per_s, cpu_s_per_step: over all steps but the first.
        first_step_s: from the start of the process until its first step was done.
        rss_mb: the most memory that the process had; `gpu_mb` the same of the GPU.
    """

    steps_per_s: float
    cpu_s_per_step: float | None
    first_step_s: float
    wall_s: float
    rss_mb: float
    gpu_mb: float | None


def run(
    photos: Path,
    folder: Path,
    work: Work,
    other: Other | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        photos: a folder of photographs.
        folder: an empty one for models, images and results.

    Raises:
        BenchFailed: see there.
    """
    ran_on = machine()
    say(f"making a {work.size} {work.family} model with random weights")
    base = folder / "base"
    maker = (sys.executable, "-m", "gpu_agent.lora.bench", str(base))
    made = subprocess.run(
        [*maker, "--family", work.family, "--size", work.size], capture_output=True, check=False
    )
    if made.returncode:
        raise BenchFailed(made.stderr.decode(errors="replace").strip()[-600:])
    images = square(photos, folder / "images")
    seen: dict[str, list[Run]] = {name: [] for name in ([OURS, OTHER] if other else [OURS])}
    trained = {}
    for turn in range(work.repeats):
        for name, runs in seen.items():
            out = folder / f"{name}-{turn}"
            out.mkdir()
            if name == OTHER and other is not None:
                argv, weights = _other(other, base, images, out, work)
            else:
                argv, weights = _ours(base, images, out, work)
            runs.append(watch(argv, STEP_OF[name], _environment(folder, work)))
            trained[name] = parameters(weights)
            say(f"{name}: {runs[-1].steps_per_s:.3f} steps/s, turn {turn + 1} of {work.repeats}")
            shutil.rmtree(out)
    return {
        "ran_on": ran_on,
        "work": {**vars(work), "images": len(list(images.glob("*.jpg")))},
        "trained_parameters": trained,
        "trainers": {name: summed_up(runs) for name, runs in seen.items()},
        "ratio": ratio(seen) if other else None,
        "bar": BARS,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on, the load that others put on the machine included."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return {
        "cpus": len(usable) or os.cpu_count() or 1,
        "machine": platform.machine(),
        "gpu": gpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "peft")},
        "load_before": round(os.getloadavg()[0], 2),
    }


def gpu() -> str | None:
    """The name of the first GPU, if any."""
    said = _nvidia_smi("name")
    return said.splitlines()[0] if said else None


def square(photos: Path, target: Path) -> Path:
    """Photographs cut to squares, with captions as `imagefolder` of datasets reads them.

    One shape, for the other trainer knows no buckets.
    """
    target.mkdir()
    captions = []
    for photo in sorted(photos.iterdir()):
        if photo.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}:
            with Image.open(photo) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
            side = min(upright.size)
            ImageOps.fit(upright, (side, side)).save(target / f"{photo.stem}.jpg", quality=95)
            captions.append(json.dumps({"file_name": f"{photo.stem}.jpg", "text": CAPTION}))
    (target / "metadata.jsonl").write_text("\n".join(captions) + "\n")
    return target


# --- the trainers -----------------------------------------------------------------------------


def _ours(base: Path, images: Path, out: Path, work: Work) -> tuple[list[str], Path]:
    """The command, and where it leaves what it trained."""
    recipe = {
        "steps": work.steps,
        "resolution": work.resolution,
        "batch_size": work.batch_size,
        "rank": work.rank,
        "targets": "attention",
        "precision": work.precision,
        "scheduler": "constant",
        "caption_template": CAPTION,
        # as the other one: nothing between the steps
        "validation_every": work.steps,
        "checkpoint_s": 0,
    }
    job = {
        "base_file": str(base),
        "base_family": work.family,
        "images_dir": str(images),
        "output_dir": str(out / "out"),
        "work_dir": str(out / "work"),
        "recipe": recipe,
    }
    (out / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "gpu_agent.lora", "--job", str(out / "job.json")]
    return argv, out / "out" / "lora.safetensors"


def _other(other: Other, base: Path, images: Path, out: Path, work: Work) -> tuple[list[str], Path]:
    """The command, and where it leaves what it trained."""
    options = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": out,
        "resolution": work.resolution,
        "train_batch_size": work.batch_size,
        "max_train_steps": work.steps,
        "rank": work.rank,
        "mixed_precision": "bf16" if work.precision == "bf16" else "no",
        "learning_rate": "1e-4",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": work.steps + 1,
        "caption_column": "text",
        "seed": 0,
    }
    said = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    argv = [str(other.python), str(other.script), *said, "--center_crop"]
    return argv, out / "pytorch_lora_weights.safetensors"


def _environment(folder: Path, work: Work) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(work.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }


def parameters(weights: Path) -> int:
    """How many numbers a safetensors file holds."""
    with weights.open("rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(prod(entry["shape"]) for name, entry in entries.items() if name != "__metadata__")


# --- watching ---------------------------------------------------------------------------------


def watch(argv: Sequence[str], step: re.Pattern[bytes], env: Mapping[str, str]) -> Run:
    """Run a training to its end and note when its steps were done.

    Raises:
        BenchFailed: it ended badly, or did not say so much as two steps.
    """
    marks: list[tuple[int, float, float | None]] = []
    said = b""
    began = time.monotonic()
    with (
        _most_of_gpu() as gpu_mb,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            bufsize=0,
        ) as process,
    ):
        # as it comes: a progress bar ends its lines when it begins the next one
        while chunk := process.stdout.read(1 << 16):  # type: ignore[union-attr]  # it is a pipe
            said = said[-_LONGEST_LINE:] + chunk
            done = max((int(number) for number in step.findall(said)), default=0)
            if done > (marks[-1][0] if marks else 0):
                marks.append((done, time.monotonic() - began, cpu_s(process.pid)))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    if process.returncode or len(marks) < 2:
        raise BenchFailed(
            f"{Path(argv[1]).name} ended with {process.returncode} after"
            f" {marks[-1][0] if marks else 0} steps: {said.decode(errors='replace').strip()[-600:]}"
        )
    (first, first_at, first_cpu), (last, last_at, last_cpu) = marks[0], marks[-1]
    steps = last - first
    cpu = None if first_cpu is None or last_cpu is None else (last_cpu - first_cpu) / steps
    return Run(
        steps_per_s=steps / (last_at - first_at),
        cpu_s_per_step=cpu,
        first_step_s=first_at,
        wall_s=wall,
        rss_mb=used.ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20),
        gpu_mb=max(gpu_mb) if gpu_mb else None,
    )


def cpu_s(pid: int) -> float | None:
    """Processor time of a process so far, in seconds; None where it is not told."""
    try:
        # pid (name) state ppid …; the name may hold anything
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _most_of_gpu() -> Iterator[list[float]]:
    """Readings of the first GPU's used memory in MB, taken meanwhile; none without a GPU."""
    readings: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(_GPU_LOOK_S):
            readings.append(float(_nvidia_smi("memory.used").split()[0]))

    if not _nvidia_smi("memory.used"):
        yield readings
        return
    watcher = threading.Thread(target=look, name="gpu", daemon=True)
    watcher.start()
    try:
        yield readings
    finally:
        over.set()
        watcher.join()


def _nvidia_smi(field: str) -> str:
    """What nvidia-smi says of a field of each GPU; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    argv = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()


# --- summing up -------------------------------------------------------------------------------


def summed_up(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, least and most of each figure over the repetitions."""
    return {
        name: {
            "median": round(statistics.median(figures), 3),
            "min": round(min(figures), 3),
            "max": round(max(figures), 3),
        }
        for name in Run.__dataclass_fields__
        if (figures := [got for run in runs if (got := getattr(run, name)) is not None])
    }


def ratio(seen: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Our steps per second to the other's: median of the turns, and the least and most of them.

    `cpu` is the same of the processor time per step, which other load on the machine touches less.
    """
    speeds = [
        ours.steps_per_s / theirs.steps_per_s
        for ours, theirs in zip(seen[OURS], seen[OTHER], strict=True)
    ]
    found = {
        "median": statistics.median(speeds),
        "min": min(speeds),
        "max": max(speeds),
    }
    costs = [
        theirs.cpu_s_per_step / ours.cpu_s_per_step
        for ours, theirs in zip(seen[OURS], seen[OTHER], strict=True)
        if ours.cpu_s_per_step and theirs.cpu_s_per_step
    ]
    if costs:
        found["cpu"] = statistics.median(costs)
    return {name: round(value, 3) for name, value in found.items()}
