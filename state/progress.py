"""How far an attempt has come by its agent's own words: does it move, and will it ever end?

Hosts are strangers: whatever they say that is no number, or no more than they said before, is
no progress.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from gpu_agent.wire import Fact
from state.job import Job, Status

#: Facts whose data is kept as the job's latest progress, by the key it is kept under.
KEYS: Mapping[Fact, str] = {
    Fact.GPU_READY: "gpu",
    Fact.IMAGES_PROGRESS: "images",
    Fact.IMAGES_READY: "images",
    Fact.MODEL_PROGRESS: "model",
    Fact.MODEL_READY: "model",
    Fact.TRAINING_STARTED: "training",
    Fact.TRAINING_PROGRESS: "training",
    Fact.TRAINING_CHECKPOINT: "checkpoint",
    Fact.TRAINING_COMPLETED: "result",
    Fact.WEIGHTS_UPLOADED: "upload",
}
#: These come whether or not anything goes forward.
IDLE = frozenset({Fact.HEARTBEAT, Fact.LOG_LINES, Fact.ERROR})
#: Of these the count must have grown.
COUNTED: Mapping[Fact, tuple[str, ...]] = {
    Fact.IMAGES_PROGRESS: ("bytes", "files"),
    Fact.MODEL_PROGRESS: ("bytes",),
    Fact.TRAINING_PROGRESS: ("step",),
}
#: The first estimates of a training are no good: compiling, caching, warming up (seconds).
WARM_UP_S = 60.0
#: Estimates are smoothed over this time, and one report counts for no more than that (seconds):
#: a pause for validation or samples makes a few of them absurd.
SMOOTHING_S, REPORT_S = 120.0, 15.0
#: After a longer pause than this nobody knows what was done in it.
UNHEARD = timedelta(seconds=30)
_MOST = 2**53


def number(value: object) -> float | None:
    """`value` when it is a finite number of at least 0 that a database can keep, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST and math.isfinite(value) else None


def heard(job: Job, fact: Fact, data: Mapping[str, Any], now: datetime) -> Job:
    """`job` after a report: whether it moved, what is kept of it, and when it should end."""
    job = _kept(_moved(job, fact, data, now), fact, data)
    return _estimated(job, data, now) if fact is Fact.TRAINING_PROGRESS else job


def _moved(job: Job, fact: Fact, data: Mapping[str, Any], now: datetime) -> Job:
    if job.last_heard_at is not None and now - job.last_heard_at > UNHEARD:
        # What it did meanwhile it could not tell; the first words may be old ones.
        job = job.evolve(moved_at=now)
    if "moved" in data:
        count = data["moved"]
        if type(count) is int and job.moved < count < _MOST:
            return job.evolve(moved=count, moved_at=now)
        return job
    return job.evolve(moved_at=now) if _grew(job, fact, data) else job


def _grew(job: Job, fact: Fact, data: Mapping[str, Any]) -> bool:
    """Whether a report of an agent that does not count says that something was done."""
    if fact not in COUNTED:
        return fact not in IDLE
    before = job.progress.get(KEYS[fact], {})
    return any(
        (count := number(data.get(key))) is not None and count > (number(before.get(key)) or 0)
        for key in COUNTED[fact]
    )


def _kept(job: Job, fact: Fact, data: Mapping[str, Any]) -> Job:
    key = KEYS.get(fact)
    if key is None:
        return job
    # Series points live in the events; the job keeps only the latest values.
    latest = {name: value for name, value in data.items() if name not in ("points", "moved")}
    merged = {**job.progress.get(key, {}), **latest}
    return job.evolve(progress={**job.progress, key: merged})


def _estimated(job: Job, data: Mapping[str, Any], now: datetime) -> Job:
    """Keep when the training should end (seconds since the epoch), and the earliest such time
    that was ever believed."""
    left = number(data.get("eta_s"))
    warm = (now - job.entered_at).total_seconds() >= WARM_UP_S
    if left is None or job.status is not Status.TRAINING or not warm:
        return job
    at, pace = now.timestamp(), 1 / max(left, 1.0)
    before = job.progress.get("outlook")
    if before is not None:
        # Paces are averaged and not times: one slow moment must not outweigh a hundred good ones.
        span = min(max(at - before["at"], 0.0), REPORT_S)
        pace = before["pace"] + (1 - math.exp(-span / SMOOTHING_S)) * (pace - before["pace"])
    finish = at + 1 / pace
    best = min(before["best"], finish) if before else finish
    outlook = {"at": at, "pace": pace, "finish": finish, "best": best}
    return job.evolve(progress={**job.progress, "outlook": outlook})


# --- reading it -------------------------------------------------------------------------------


def uploading(job: Job) -> bool:
    """Whether the training itself is done."""
    return "result" in job.progress


def step_s(job: Job) -> float | None:
    """Seconds of one step, as far as they are known."""
    speed = number(job.progress.get("training", {}).get("steps_per_s"))
    return 1 / speed if speed else None


def steps_per_s(job: Job) -> float | None:
    return number(job.progress.get("training", {}).get("steps_per_s")) or None


def download_mbps(job: Job) -> float | None:
    """Mbit/s that the agent saw while it pulled; that of the larger download where it knows."""
    rates = (number(job.progress.get(key, {}).get("mbps")) for key in ("model", "images"))
    return next((rate for rate in rates if rate), None)


def place(job: Job) -> tuple[str, str]:
    """What should have gone forward, and where it stands: ("step", "step 412/1000")."""
    said = job.progress
    match job.status:
        case Status.PENDING_GPU:
            return "word of the GPU", "the agent's hello"
        case Status.PENDING_IMAGES if "files" in said.get("images", {}):
            return "unpacked image", _of(said["images"], "files", "image ")
        case Status.PENDING_IMAGES:
            return "byte of the dataset", _of(said.get("images", {}), "bytes", "byte ")
        case Status.PENDING_MODEL:
            return "byte of the base model", _of(said.get("model", {}), "bytes", "byte ")
        case _ if uploading(job):
            return "byte of the result sent", "the upload"
        case _ if number(said.get("training", {}).get("step")):
            return "step", _of(said["training"], "step", "step ")
        case _:
            return "sign of the trainer", "its start"


def _of(said: Mapping[str, Any], key: str, word: str) -> str:
    done, most = number(said.get(key)), number(said.get(f"{key}_total", said.get("total")))
    return f"{word}{done or 0:.0f}" + (f"/{most:.0f}" if most else "")
