"""Curves: nothing a host says breaks them, and thinning loses no spike, no end and no attempt."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from state.events import Event
from state.series import KNOWN, MOST_CURVES, Point, read, thin

AT = datetime(2026, 11, 22, tzinfo=UTC)


def reported(*reports: dict[str, Any], attempt: int = 1) -> list[Event]:
    return [
        Event(job="job_1", seq=seq, attempt=attempt, type="training.progress", at=AT, data=data)
        for seq, data in enumerate(reports, start=1)
    ]


def curve(values: list[float], attempt: int = 1) -> list[Point]:
    return [Point(attempt=attempt, step=step, value=value) for step, value in enumerate(values, 1)]


def test_rows_and_measurements_become_curves():
    rows = [[1, 0.5, 1e-4, 2.0], [2, 0.4, 2e-4], {"step": 2, "steps_per_s": 4.5}]
    found = read(reported({"points": rows}, {"points": [{"step": 2, "validation_loss": 0.3}]}))
    assert [(point.step, point.value) for point in found["loss"]] == [(1, 0.5), (2, 0.4)]
    assert [point.value for point in found["lr"]] == [1e-4, 2e-4]
    assert [point.step for point in found["gradient_norm"]] == [1]
    assert found["steps_per_s"] == [Point(attempt=1, step=2, value=4.5)]
    assert found["validation_loss"] == [Point(attempt=1, step=2, value=0.3)]


def test_an_agent_without_points_is_drawn_by_its_latest_values():
    found = read(reported({"step": 5, "total": 9, "loss": 0.5}, {"step": 7, "loss": 0.4}))
    assert [(point.step, point.value) for point in found["loss"]] == [(5, 0.5), (7, 0.4)]
    assert set(found) <= set(KNOWN)


def test_a_step_that_is_done_again_counts_once_and_attempts_stay_apart():
    first = reported({"points": [[1, 0.9], [2, 0.8], [3, 0.7]]}, {"points": [[3, 0.6]]})
    second = reported({"points": [[2, 0.5]]}, attempt=2)
    found = read([*first, *second])["loss"]
    assert [(p.attempt, p.step, p.value) for p in found] == [
        (1, 1, 0.9), (1, 2, 0.8), (1, 3, 0.6), (2, 2, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "points",
    [
        "no list",
        [None, "text", 3, [], ["1", 0.5], [True, 0.5], [-1, 0.5], [2**60, 0.5], [1.5, 0.5]],
        [[1, "0.5"], [1, None], [1, True], [1, 2.0**60], [1, [1]]],
        [{"loss": 0.5}, {"step": "1", "loss": 0.5}, {"step": 1, "Loss!": 0.5}, {"step": 1}],
        [{"step": 1, "validation_levels": [[0.125, 0.6, 0.01]]}],
    ],
)
def test_nonsense_of_a_host_is_no_point(points):
    assert read(reported({"points": points})) == {}


def test_a_host_cannot_invent_curves_without_end():
    points = [{"step": 1, f"curve_{number}": 1.0} for number in range(1000)]
    assert len(read(reported({"points": points}))) == MOST_CURVES


def test_few_points_stay_as_they_are():
    points = curve([0.3, 0.2, 0.1])
    assert thin(points, 3) == points
    assert thin([], 3) == []


@pytest.mark.parametrize("most", [2, 3, 10, 99, 500])
def test_thinning_keeps_both_ends_and_every_spike_that_has_room(most):
    values = [1.0 - step / 2000 for step in range(2000)]
    values[777], values[1234] = 9.0, -9.0
    points = curve(values)
    kept = thin(points, most)
    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    if most >= 4:
        assert {9.0, -9.0} <= {point.value for point in kept}


def test_every_attempt_keeps_its_ends():
    attempts = [curve([0.5] * length, attempt=n) for n, length in enumerate((1000, 1, 30, 2), 1)]
    kept = thin([point for attempt in attempts for point in attempt], 50)
    assert len(kept) <= 50 + 2 * len(attempts)
    for points in attempts:
        assert {points[0], points[-1]} <= set(kept)
