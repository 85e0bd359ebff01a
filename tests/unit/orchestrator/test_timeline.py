"""Timelines and the drawn machine, from a job's transitions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.dashboard import states, timeline
from state.events import Event
from state.job import Job, JobRequest, Status
from state.machine import TABLE
from state.usual import Usual

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def a_job(**given: object) -> Job:
    wanted = {"id": "job_1", "owner": "acme", "created_at": NOW, "entered_at": NOW} | given
    return Job(request=JobRequest(dataset_id="ds_1", base="civitai:1"), **wanted)


def step(seq: int, source: Status, target: Status, cause: str, after: float, attempt: int) -> Event:
    data = {"from": str(source), "to": str(target), "cause": cause}
    return Event(job="job_1", seq=seq, attempt=attempt, type="transition", at=at(after), data=data)


HISTORY = [
    step(1, Status.PENDING, Status.PENDING_GPU, "dataset.ready", 10, 1),
    step(2, Status.PENDING_GPU, Status.STALLED, "stall", 40, 1),
    step(3, Status.STALLED, Status.PENDING_GPU, "retry", 45, 2),
]
RETRIED = a_job(status=Status.PENDING_GPU, attempt=2, entered_at=at(45))


def test_a_retry_counts_to_the_attempt_that_it_ended() -> None:
    pieces = timeline.stretches(RETRIED, HISTORY)
    told = [(piece.status.value, piece.attempt, piece.span(at(60)).seconds) for piece in pieces]
    assert told == [
        ("pending", 1, 10),
        ("pendingGpu", 1, 30),
        ("stalled", 1, 5),
        ("pendingGpu", 2, 15),
    ]


def test_a_bar_is_as_wide_as_its_time_was_long_and_none_is_lost() -> None:
    bars = timeline.bars(timeline.stretches(RETRIED, HISTORY), at(36_000))
    assert sum(bar.width for bar in bars) == pytest.approx(1000, abs=0.5)
    assert all(bar.width >= 7 for bar in bars)
    assert max(bars, key=lambda bar: bar.width) is bars[-1]
    assert timeline.bars([], NOW) == []


def test_late_is_much_later_than_most_and_only_where_most_are_known() -> None:
    usual = Usual(p50=60.0, p95=600.0, count=50)
    assert not timeline.late(timedelta(seconds=800), usual)
    assert timeline.late(timedelta(seconds=901), usual)
    assert not timeline.late(timedelta(days=1), None)
    assert not timeline.late(timedelta(days=1), Usual(p50=1.0, p95=1.0, count=2))


def test_the_drawing_has_every_state_and_every_move_of_the_machine() -> None:
    drawing = states.draw(RETRIED, timeline.stretches(RETRIED, HISTORY), HISTORY, at(60))
    assert {box.status for box in drawing.boxes} == set(Status)
    assert {arrow.row for arrow in drawing.arrows} == set(TABLE)
    taken = {(arrow.row.source, arrow.row.target) for arrow in drawing.arrows if arrow.taken}
    assert taken == {(Status(e.data["from"]), Status(e.data["to"])) for e in HISTORY}
    corners = {(box.x, box.y) for box in drawing.boxes}
    assert len(corners) == len(Status)
    assert all(0 <= x <= states.WIDTH - states.BOX for x, _ in corners)


def test_an_ended_job_stands_in_its_last_state_without_a_length() -> None:
    history = [*HISTORY[:1], step(2, Status.PENDING_GPU, Status.CANCELLED, "cancel", 40, 1)]
    job = a_job(status=Status.CANCELLED, entered_at=at(40), finished_at=at(40))
    pieces = timeline.stretches(job, history)
    assert [piece.status for piece in pieces] == [Status.PENDING, Status.PENDING_GPU]
    boxes = {box.status: box for box in states.draw(job, pieces, history, at(99)).boxes}
    assert boxes[Status.CANCELLED].current
    assert boxes[Status.CANCELLED].visits == 1
    assert boxes[Status.CANCELLED].span is None
