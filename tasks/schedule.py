"""What beat sends, and how often (seconds). A tick that finds no worker in time is dropped.

Beat has no memory: what comes more seldom than beat may be started anew is due by the database
(`tasks.rounds`), and the reconcile pass asks for it.
"""

from __future__ import annotations

from typing import Any

EXPIRES_S = 60


def _every(task: str, seconds: float) -> dict[str, Any]:
    return {"task": task, "schedule": seconds, "options": {"expires": max(seconds, 5)}}


BEAT: dict[str, dict[str, Any]] = {
    "reconcile": _every("reconcile", 1.0),
}
