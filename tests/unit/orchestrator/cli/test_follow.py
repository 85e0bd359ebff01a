"""Watching a job: nothing is shown twice, nothing is left out."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from rich.console import Console

from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError
from orchestrator.cli.follow import durations, follow, picture

STEPS = ["pending", "pendingGpu", "pendingImages", "pendingModel", "training", "completed"]


def passed(count):
    return [
        {"source": a, "target": b, "at": f"2026-11-22T12:00:0{index + 1}Z", "reason": None}
        for index, (a, b) in enumerate(pairwise(STEPS))
        if index < count
    ]


def watch(jobs, *, terminal=False):
    """What was shown of `jobs`, one per look, and how often it slept."""
    text, slept, script = io.StringIO(), [], iter(jobs)
    console = Console(file=text, force_terminal=terminal, width=200, soft_wrap=True)
    last = follow(lambda: next(script), console, sleep=slept.append)
    return last, text.getvalue(), len(slept)


def test_each_transition_is_a_line_once(make_job):
    jobs = [
        make_job(status=STEPS[count], transitions=passed(count), progress={})
        for count in (0, 1, 1, 3, 5)
    ]
    last, text, slept = watch(jobs)
    assert last["status"] == "completed"
    assert slept == 4
    shown = [line.split("  ")[1] for line in text.splitlines()]
    assert shown == [f"{a} -> {b}" for a, b in pairwise(STEPS)]


def test_training_is_a_line_per_tenth(make_job):
    jobs = [
        make_job(progress={"training": {"step": step, "total": 40, "loss": 0.5}})
        for step in range(41)
    ]
    jobs.append(make_job(status="completed"))
    _, text, _ = watch(jobs)
    assert text.count("step ") == 11


def test_the_reason_of_a_stall_is_told(make_job):
    step = {
        "source": "training",
        "target": "stalled",
        "at": "2026-11-22T12:00:01Z",
        "reason": {"code": "agent.silent", "message": "nothing for [15] minutes"},
    }
    _, text, _ = watch([make_job(status="failed", transitions=[step])])
    assert "(nothing for [15] minutes)" in text


def test_a_terminal_gets_a_picture_that_ends_with_the_job(make_job):
    done = make_job(status="completed", transitions=passed(5))
    _, text, _ = watch([make_job(), done], terminal=True)
    assert "✔ completed" in text


def test_a_narrow_terminal_parts_no_state_from_its_mark(make_job):
    console = Console(file=io.StringIO(), width=50)
    console.print(picture(make_job()))
    lines = console.file.getvalue().splitlines()
    assert not [line for line in lines if line.rstrip()[-1:] in {"○", "●", "✔"}]


@pytest.mark.parametrize("status", [*STEPS, "stalled", "failed", "cancelled"])
@pytest.mark.parametrize(
    "progress",
    [
        {},
        {"training": {"step": None, "total": None, "loss": None}},
        {"images": {"bytes": 5, "bytes_total": 10}, "model": {"bytes": None}},
        {"training": {"step": 7, "total": 10, "loss": 0.1, "loss_best": 0.09, "steps_per_s": 2.0}},
    ],
    ids=["nothing", "nulls", "downloads", "training"],
)
def test_every_status_can_be_pictured(make_job, status, progress):
    reason = {"code": "x", "message": "y"} if status == "stalled" else None
    job = make_job(status=status, progress=progress, reason=reason, host=None)
    text = io.StringIO()
    Console(file=text, width=200).print(picture(job))
    assert status in text.getvalue()
    watch([job, make_job(status="failed")])


def test_time_is_counted_over_all_attempts(make_job):
    again = [
        {"source": "pendingGpu", "target": "stalled", "at": "2026-11-22T12:00:12Z"},
        {"source": "stalled", "target": "pendingGpu", "at": "2026-11-22T12:00:15Z"},
        {"source": "pendingGpu", "target": "cancelled", "at": "2026-11-22T12:00:16Z"},
    ]
    job = make_job(status="cancelled", transitions=[*passed(1), *again])
    assert durations(job) == {"pending": 1.0, "pendingGpu": 12.0, "stalled": 3.0}


def test_a_server_that_restarts_is_waited_for(api, make_job):
    """It answered before, so it will again: an error is told only when it does not."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    client = Client(api.url, "key", sleep=sleep, monotonic=lambda: now[0])
    api.answers["GET /v1/jobs/job_01"] = [
        (200, make_job()),
        (503, {"detail": "starting"}),
        (502, b"<html>bad gateway</html>"),
        (200, make_job(status="completed")),
        (503, {"detail": "gone for good"}),
    ]
    assert client.job("job_01")["status"] == "training"
    assert client.job("job_01")["status"] == "completed"
    assert 0 < now[0] < 5
    with pytest.raises(CliError, match="gone for good"):
        client.job("job_01")
    assert 30 <= now[0] < 40


def test_what_is_sent_again_is_done_once(api, make_job):
    """A repeated POST carries the same Idempotency-Key."""
    seen = []
    client = Client(api.url, "key", sleep=lambda _: None)
    client._session.hooks["response"] = lambda answer, **_: seen.append(
        answer.request.headers.get("Idempotency-Key")
    )
    api.answers["GET /v1/jobs"] = (200, {"data": []})
    api.answers["POST /v1/jobs"] = [(503, {}), (503, {}), (202, make_job())]
    client.get("/v1/jobs")
    client.post("/v1/jobs", {})
    assert len(seen) == 4
    assert seen[1] == seen[2] == seen[3] is not None
