"""How long a job was in each of its states, drawn, and held against what is usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from state.events import Event
from state.job import TERMINAL, Job, Status
from state.machine import Move
from state.usual import Usual

#: Fewer earlier jobs than this say nothing of what is usual.
ENOUGH = 3
#: Nobody need look at a job that is late by less (seconds).
GRACE_S = 300.0
#: A stretch so short is still drawn so wide (of 1000).
LEAST = 8.0


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A time in one state. `ended` is None for the present one."""

    status: Status
    attempt: int
    began: datetime
    ended: datetime | None

    def span(self, now: datetime) -> timedelta:
        return max((self.ended or now) - self.began, timedelta())


def stretches(job: Job, transitions: Sequence[Event]) -> tuple[Stretch, ...]:
    """Every state that `job` was in, oldest first. A terminal state has no length, and is none.

    Where history was deleted already, what is left of it is told.
    """
    found: list[Stretch] = []
    began = job.created_at
    for event in transitions:
        retried = event.data["cause"] == Move.RETRY  # its event counts to the next attempt
        found.append(
            Stretch(
                status=Status(event.data["from"]),
                attempt=event.attempt - retried,
                began=began,
                ended=event.at,
            )
        )
        began = event.at
    if job.status not in TERMINAL:
        began = job.entered_at
        found.append(Stretch(status=job.status, attempt=job.attempt, began=began, ended=None))
    return tuple(found)


def late(span: timedelta, expected: Usual | None) -> bool:
    """Whether `span` is so much longer than usual that somebody should look."""
    if expected is None or expected.count < ENOUGH:
        return False
    return span.total_seconds() > max(1.5 * expected.p95, expected.p50 + GRACE_S)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One piece of a drawn timeline, in thousandths of its width."""

    status: Status
    x: float
    width: float
    span: timedelta


def bars(pieces: Sequence[Stretch], now: datetime) -> list[Bar]:
    """`pieces` side by side, as wide as they were long, but none too narrow to be seen."""
    spans = [piece.span(now) for piece in pieces]
    whole = sum(spans, timedelta()) or timedelta(seconds=1)
    widths = [max(1000 * (span / whole), LEAST) for span in spans]
    scale = 1000 / sum(widths) if widths else 1.0
    drawn, x = [], 0.0
    for piece, span, width in zip(pieces, spans, widths, strict=True):
        drawn.append(
            Bar(status=piece.status, x=round(x, 1), width=round(width * scale, 1), span=span)
        )
        x += width * scale
    return drawn
