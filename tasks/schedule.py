"""What beat sends, and how often (seconds). A tick that finds no worker in time is dropped."""

from __future__ import annotations

from typing import Any

EXPIRES_S = 60


def _every(task: str, seconds: float) -> dict[str, Any]:
    return {"task": task, "schedule": seconds, "options": {"expires": max(seconds, 5)}}


BEAT: dict[str, dict[str, Any]] = {
    "reconcile": _every("reconcile", 1.0),
    "sweep": _every("sweep", 30.0),
    "cleanup": _every("cleanup", 3600.0),
}
