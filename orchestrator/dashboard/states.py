"""The state machine as a drawing: where its boxes and arrows are, and which a job has used.

Drawn from `machine.TABLE`; a state or a move that is added there appears here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.dashboard.timeline import Stretch
from state.events import Event
from state.job import Job, Status
from state.machine import ADVANCE, TABLE, Move, Row

WIDTH, HEIGHT = 1000, 190
BOX, TALL = 140, 46
TOP, BOTTOM = 12, 128


@dataclass(frozen=True, kw_only=True)
class Box:
    """One state. `span` is how long the job was in it, all times together."""

    status: Status
    x: float
    y: float
    visits: int
    span: timedelta | None
    current: bool


@dataclass(frozen=True, kw_only=True)
class Arrow:
    path: str
    row: Row
    taken: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def _chain() -> list[Status]:
    """The way of a job to which nothing happens."""
    steps = {row.source: row.target for row in TABLE if row.trigger == ADVANCE}
    chain = [Status.PENDING]
    while chain[-1] in steps:
        chain.append(steps[chain[-1]])
    return chain


def _places() -> dict[Status, tuple[float, float]]:
    """The left upper corner of each box: the good way above, what else can happen below."""
    chain = _chain()
    below = [status for status in Status if status not in chain]
    # From where retries come lies in the middle, with the ends on both sides.
    middle = {row.source for row in TABLE if row.trigger == Move.RETRY}
    ends = [status for status in below if status not in middle]
    half = len(ends) // 2
    lower = [*ends[half:], *(status for status in below if status in middle), *ends[:half]]
    pitch = (WIDTH - BOX - 2) / (len(chain) - 1)
    places = {status: (1 + at * pitch, float(TOP)) for at, status in enumerate(chain)}
    gap = (WIDTH - len(lower) * BOX) / (len(lower) + 1)
    for at, status in enumerate(lower):
        places[status] = (gap + at * (BOX + gap), float(BOTTOM))
    return places


PLACES = _places()


def _path(row: Row) -> str:
    (x1, y1), (x2, y2) = PLACES[row.source], PLACES[row.target]
    if y1 == y2:  # side by side: a straight line
        left = x1 < x2
        start, end = (x1 + BOX, x2 - 5) if left else (x1, x2 + BOX + 5)
        return f"M {start:.0f} {y1 + TALL / 2:.0f} H {end:.0f}"
    down = y1 < y2
    # The way back runs beside the way there.
    aside = 0.0 if down else -30.0
    a, b = x1 + BOX / 2 + aside, x2 + BOX / 2 + aside
    start, end = (y1 + TALL, y2 - 5) if down else (y1, y2 + TALL + 5)
    bend = (start + end) / 2
    return f"M {a:.0f} {start:.0f} C {a:.0f} {bend:.0f} {b:.0f} {bend:.0f} {b:.0f} {end:.0f}"


def draw(
    job: Job, pieces: Sequence[Stretch], transitions: Sequence[Event], now: datetime
) -> Drawing:
    """The machine with what `job` has been through lit up."""
    moves = [(event.data["from"], event.data["to"]) for event in transitions]
    boxes = []
    for status, (x, y) in PLACES.items():
        mine = [piece for piece in pieces if piece.status is status]
        ended = job.terminal and status is job.status
        spans = [piece.span(now) for piece in mine]
        boxes.append(
            Box(
                status=status,
                x=round(x, 1),
                y=y,
                visits=len(mine) + ended,
                span=sum(spans, timedelta()) if spans else None,
                current=status is job.status,
            )
        )
    arrows = [
        Arrow(path=_path(row), row=row, taken=moves.count((str(row.source), str(row.target))))
        for row in TABLE
    ]
    # What was taken lies on top.
    return Drawing(boxes=tuple(boxes), arrows=tuple(sorted(arrows, key=lambda one: one.taken)))
