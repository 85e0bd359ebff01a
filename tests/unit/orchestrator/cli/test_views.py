"""What is watched: a table that fits, a line per change, and Ctrl-C that only ends the watching."""

from __future__ import annotations

import json

import pytest

from orchestrator.cli import views
from orchestrator.cli.console import fitted

ROWS = [
    ["JOB", "STATUS", "LOSS", "WHY"],
    ["job_01kr8y2xq3v7n5t9w4m6p8s0dz", "stalled", "0.1234", "the machine did not boot in time"],
    ["job_01kr8y2xq3v7n5t9w4m6p8s0e0", "training", "-", ""],
]


def test_nothing_is_cut_where_nobody_counts():
    assert [line.split()[-1] for line in fitted(ROWS, None)] == ["WHY", "time", "-"]


def test_a_narrow_terminal_goes_without_what_it_can_spare_and_cuts_nothing():
    lines = fitted(ROWS, 46, spare=("LOSS",))
    assert lines[0].split() == ["JOB", "STATUS", "WHY"]
    assert lines[1].split() == [ROWS[1][0], "stalled"]
    assert " ".join(lines[2].split()) == ROWS[1][3]
    assert lines[3].split() == [ROWS[2][0], "training"]
    assert max(map(len, lines)) <= 46


def test_what_cannot_be_broken_stays_whole():
    lines = fitted([["weights", "3.0 MB  sha256 " + "ab" * 32]], 60)
    assert "ab" * 32 in lines[-1]


@pytest.fixture
def no_waiting(monkeypatch):
    """After so many looks somebody presses Ctrl-C."""

    def until(looks):
        left = iter(range(looks - 1))

        def wait(seconds):
            if next(left, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(views.time, "sleep", wait)

    return until


def listed(*jobs):
    return (200, {"data": list(jobs), "has_more": False, "next_cursor": None})


def test_a_watched_list_is_a_line_for_each_change_and_none_for_ticking_cost(
    stoker, api, make_job, no_waiting
):
    dearer = make_job(cost={"display": "$0.05", "cap": 5_000_000, "so_far": 50_000})
    api.answers["GET /v1/jobs"] = [listed(make_job()), listed(dearer), listed()]
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(status="completed"))
    no_waiting(3)
    ran = stoker("ps", "-w", "--json")
    assert ran.code == 0
    assert [json.loads(line)["status"] for line in ran.out.splitlines()] == [
        "training",
        "completed",
    ]


def test_a_watched_list_in_a_pipe_is_lines_without_a_screen(stoker, api, make_job, no_waiting):
    api.answers["GET /v1/jobs"] = [listed(make_job()), listed(make_job(status="stalled"))]
    no_waiting(2)
    ran = stoker("ps", "-w")
    assert [line.split()[1] for line in ran.out.splitlines()] == ["training", "stalled"]
    assert "\x1b" not in ran.out + ran.err


def test_a_watched_job_is_a_line_per_change_until_its_end(stoker, api, make_job, no_waiting):
    api.answers["GET /v1/jobs/job_01"] = [
        (200, make_job()), (200, make_job()), (200, make_job(status="completed")),
    ]  # fmt: skip
    no_waiting(9)
    ran = stoker("show", "-w", "job_01", "--json")
    assert ran.code == 0
    assert [json.loads(line)["status"] for line in ran.out.splitlines()] == [
        "training",
        "completed",
    ]


@pytest.mark.parametrize("words", [("show", "-w"), ("logs", "-f")])
def test_ctrl_c_detaches_and_says_how_to_cancel(stoker, api, make_job, no_waiting, words):
    api.answers["GET /v1/jobs/job_01"] = (200, make_job())
    page = {"data": [], "has_more": False, "next_after": 0}
    api.answers["GET /v1/jobs/job_01/events"] = (200, page)
    no_waiting(2)
    ran = stoker(*words, "job_01", "--json")
    assert ran.code == 0
    assert "the job goes on" in ran.err
    assert "stoker cancel  job_01   ends it" in ran.err


def test_a_job_in_a_pipe_is_words_without_a_bar(stoker, api, make_job):
    reason = {"code": "host.lost", "message": "nothing was heard"}
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(status="stalled", reason=reason))
    told = stoker("show", "job_01").out
    assert [line.split()[:2] for line in told.splitlines()][:3] == [
        ["status", "stalled"],
        ["why", "host.lost:"],
        ["step", "40/100"],
    ]
    assert not set(told) & set("━●✔○╸")


def test_words_that_do_not_fit_are_wrapped_beside_their_name():
    lines = fitted([["  recipe", "quality standard, steps 1000, rank 16"], ["  base", "x"]], 40)
    assert lines == [
        "  recipe  quality standard, steps 1000,",
        "          rank 16",
        "  base    x",
    ]


def test_an_ornament_goes_where_it_does_not_fit():
    rows = [["DAY", "TOTAL", ""], ["2026-11-22", "$1.00", "████████"]]
    assert fitted(rows, 30)[1].endswith("████████")
    assert fitted(rows, 20)[1].endswith("$1.00")


def test_a_log_counts_what_is_long_and_tells_time_to_the_second(stoker, api):
    data = {"step": 3, "levels": [[0.125, 1.1778, 0.0379]] * 4}
    event = {"at": "2026-11-23T08:14:33.946662Z", "type": "training.progress", "data": data}
    page = {"data": [event], "has_more": False, "next_after": 1}
    api.answers["GET /v1/jobs/job_01/events"] = (200, page)
    told = stoker("logs", "job_01").out
    assert told == "2026-11-23T08:14:33Z  training.progress  step=3 levels=[4 …]\n"
    assert json.loads(stoker("logs", "job_01", "--json").out) == [event]
