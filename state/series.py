"""Curves out of an agent's reports (loss and the like over steps), and fewer points for them.

An agent sends each step as a row `[step, loss, lr, gradient_norm]`, and what it measures now and
then as an object with a `step` (docs/wire.md). Hosts are strangers: what is no number is no point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from state.events import Event

#: What the numbers of a row are, after its step.
COLUMNS = ("loss", "lr", "gradient_norm")
#: The curves that trainers of ours send; others may send more.
KNOWN = (*COLUMNS, "steps_per_s", "memory_mib", "validation_loss", "validation_stderr")
#: More curves of one job than any trainer draws.
MOST_CURVES = 32
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_LARGEST = 2.0**53


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A value at a step of an attempt. An attempt that goes on from a checkpoint repeats steps."""

    attempt: int
    step: int
    value: float


#: A curve's values by attempt and step.
Values = dict[tuple[int, int], float]


def read(reports: Iterable[Event]) -> dict[str, list[Point]]:
    """The curves in reports of `training.progress`, by name."""
    return {name: curve(values) for name, values in collect(reports).items()}


def collect(reports: Iterable[Event]) -> dict[str, Values]:
    """The same, as bare values: for who wants but few of them as points.

    Of several values for one step the last one counts: a trainer that was started again repeats
    steps within its attempt.
    """
    found: dict[str, Values] = {}
    for report in reports:
        attempt = report.attempt
        for point in _points(report.data):
            named: Iterable[tuple[str, Any]]
            if isinstance(point, list) and point:
                step, named = point[0], zip(COLUMNS, point[1:], strict=False)
            elif isinstance(point, dict):
                step, named = point.get("step"), point.items()
            else:
                continue
            if type(step) is not int or not 0 <= step < _LARGEST:
                continue
            for name, value in named:
                # what nobody can draw is left out; a long training has a million numbers
                if (type(value) is float or type(value) is int) and -_LARGEST < value < _LARGEST:
                    values = found.get(name)
                    if values is None:
                        if not _is_curve(name) or len(found) >= MOST_CURVES:
                            continue
                        values = found[name] = {}
                    values[attempt, step] = value
    return found


def _is_curve(name: str) -> bool:
    return name != "step" and _NAME.fullmatch(name) is not None


def _points(data: Mapping[str, Any]) -> Sequence[Any]:
    points = data.get("points")
    if isinstance(points, list):
        return points
    # an agent that keeps no points says the latest values
    return [{key: data[key] for key in ("step", *KNOWN) if key in data}]


def curve(values: Values) -> list[Point]:
    """By attempt, then by step."""
    return [
        Point(attempt=attempt, step=step, value=float(value))
        for (attempt, step), value in sorted(values.items())
    ]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """No more than `most` of `points`, and two for each attempt.

    Every attempt keeps its first and its last point; of what lies between, each stretch keeps its
    lowest and its highest. So no spike is lost, and no line is drawn from one attempt to another.
    """
    if len(points) <= most:
        return list(points)
    attempts: dict[int, list[Point]] = {}
    for point in points:
        attempts.setdefault(point.attempt, []).append(point)
    kept: list[Point] = []
    for of_attempt in attempts.values():
        kept += _thinned(of_attempt, most * len(of_attempt) // len(points))
    return kept


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    first, *between, last = points if len(points) > 1 else (points[0], points[0])
    if len(points) <= max(most, 2):
        return list(points)
    kept = [first]
    stretches = max(0, most - 2) // 2
    for number in range(stretches):
        start, end = (len(between) * at // stretches for at in (number, number + 1))
        some = between[start:end]
        if some:
            ends = {id(pick): pick for pick in (min(some, key=_value), max(some, key=_value))}
            kept += sorted(ends.values(), key=lambda point: point.step)
    return [*kept, last]


def _value(point: Point) -> float:
    return point.value
