"""How long jobs usually stay in each status: of those that ended lately, kept as a beat.

Pages hold a job's age in its status against it, `/metrics` shows it. A stay counts when it was
left for another status; what a job spent waiting through several attempts is several stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from state.events import Event
from state.job import TERMINAL, Status
from state.store import Transaction

#: So many of the jobs that ended lately are asked.
LATEST = 300
#: Under this name it is kept among the beats.
BEAT = "usual"


@dataclass(frozen=True, kw_only=True)
class Usual:
    """Stays in one status, in seconds: their median, the 95th percentile, and how many."""

    p50: float
    p95: float
    count: int


def stays(created_at: datetime, transitions: Iterable[Event]) -> Iterator[tuple[Status, float]]:
    """Each status that a job left, and how many seconds it had been in it."""
    entered_at = created_at
    for left in transitions:
        yield Status(left.data["from"]), (left.at - entered_at).total_seconds()
        entered_at = left.at


def measure(tx: Transaction) -> dict[Status, Usual]:
    """From the `LATEST` jobs that ended, save for rehearsals, whose time passes faster; a status
    that none of them left is missing."""
    latest = tx.list_jobs(statuses=TERMINAL, limit=LATEST)
    ended = [job for job in latest if job.request.rehearsal is None]
    histories = tx.transitions_of([job.id for job in ended])
    found: dict[Status, list[float]] = {}
    for job in ended:
        for status, seconds in stays(job.created_at, histories.get(job.id, ())):
            found.setdefault(status, []).append(seconds)
    return {status: _usual(sorted(seconds)) for status, seconds in found.items()}


def _usual(stayed: list[float]) -> Usual:
    last = min(len(stayed) - 1, int(0.95 * len(stayed)))  # nearest rank
    return Usual(p50=statistics.median(stayed), p95=stayed[last], count=len(stayed))


def keep(tx: Transaction, found: Mapping[Status, Usual], now: datetime) -> None:
    """Store what was measured."""
    tx.beat(BEAT, now, {status.value: asdict(usual) for status, usual in found.items()})


def known(beats: Mapping[str, tuple[datetime, Mapping[str, Any]]]) -> dict[Status, Usual]:
    """What was measured last; empty before the first time."""
    _, kept = beats.get(BEAT, (None, {}))
    return {Status(name): Usual(**values) for name, values in kept.items()}
