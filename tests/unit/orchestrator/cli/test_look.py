"""What `stoker explain` and `stoker wait` say, how they leave, and what a plan says of price."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit
from orchestrator.cli.look import reached, seconds, waited
from state.job import Status

EXPLAINED = {
    "job": "job_01",
    "at": "2026-11-22T12:00:00Z",
    "status": "training",
    "waits_for": "training",
    "headline": "It trains: step 4/9.",
    "sentences": ["It trains: step 4/9.", "Next: the machine reports (agent).", "You can: cancel."],
    "next": {"words": "the machine reports", "by": "agent", "at": None, "in_s": None},
    "signals": [
        {"name": "agent", "words": "the agent was heard", "at": "t", "age_s": 3.4, "well": True},
        {"name": "worker", "words": "a worker was heard", "at": None, "age_s": None, "well": False},
    ],
    "deadlines": [],
    "search": {"words": "", "choice": "", "at": None, "refused": {}},
    "brakes": [],
    "machines": [],
    "options": [{"name": "cancel", "words": "cancel it", "method": "POST", "path": "/v1/x"}],
}


def test_an_explanation_is_read_aloud_with_the_commands_to_type(stoker, api):
    api.answers["GET /v1/jobs/job_01/explain"] = (200, EXPLAINED)
    ran = stoker("explain", "job_01")
    assert ran.code == Exit.OK
    assert ran.out.splitlines() == [
        "job_01 is training. It trains: step 4/9.",
        "  Next: the machine reports (agent).",
        "  Heard: agent 3 s ago, worker never (!).",
        "  You can cancel it: `stoker cancel job_01`",
    ]
    assert json.loads(stoker("explain", "job_01", "--json").out) == EXPLAINED


def test_an_explanation_of_another_make_is_an_error(stoker, api):
    api.answers["GET /v1/jobs/job_01/explain"] = (200, {"hello": "world"})
    ran = stoker("explain", "job_01")
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert "does not speak Stoker's API" in ran.err


class Server:
    """A job's history by ETag; a long poll that finds no news lets `held` seconds pass."""

    def __init__(self, jobs: list[dict[str, Any]], held: float = 25.0) -> None:
        self.jobs, self.held = jobs, held
        self.now, self.asked, self.slept = 0.0, [], []

    def poll(self, job_id: str, *, wait_s: int = 0, etag: str = "") -> Any:
        self.asked.append((wait_s, etag))
        number = int(etag or 0)
        if etag and number >= len(self.jobs):
            self.now += min(self.held, wait_s)
            return None, etag
        return self.jobs[number], str(number + 1)

    def wait(self, goal: Status, limit: float | None) -> Any:
        return waited(
            self,  # type: ignore[arg-type]
            "job_01",
            goal,
            limit,
            monotonic=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_waiting_asks_to_be_told_and_ends_when_the_status_is_reached(make_job):
    server = Server([make_job(status=status) for status in ("pending", "pendingGpu", "training")])
    assert server.wait(Status.TRAINING, None)["status"] == "training"
    assert server.asked == [(0, ""), (25, "1"), (25, "2")]
    assert server.slept == []


def test_waiting_ends_when_the_time_is_up_and_asks_no_longer_than_it(make_job):
    server = Server([make_job(status="pending")])
    assert server.wait(Status.COMPLETED, 60)["status"] == "pending"
    assert server.now == pytest.approx(60)
    assert [wait for wait, _ in server.asked] == [0, 25, 25, 10]


def test_a_server_that_answers_at_once_is_not_asked_without_a_pause(make_job):
    server = Server([make_job(status="pending")], held=0.0)
    server.wait(Status.COMPLETED, 5)
    assert len(server.asked) <= 7


def test_a_status_that_was_passed_is_reached_but_not_one_of_an_earlier_attempt(make_job):
    step = {"source": "pendingModel", "target": "training", "at": "t", "attempt": 1}
    assert reached(make_job(status="completed", transitions=[step]), Status.TRAINING)
    again = make_job(status="pendingGpu", attempt=2, transitions=[step])
    assert not reached(again, Status.TRAINING)


@pytest.mark.parametrize(
    ("status", "reason", "words", "code"),
    [
        ("completed", None, (), Exit.OK),
        ("completed", None, ("--for", "pendingGpu"), Exit.OK),
        ("failed", None, ("--for", "failed"), Exit.OK),
        ("failed", {"code": "trainer.oom", "message": "no memory"}, (), Exit.JOB_ENDED_BADLY),
        ("cancelled", None, (), Exit.JOB_ENDED_BADLY),
        ("failed", {"code": "budget.job", "message": "used up"}, (), Exit.OVER_BUDGET),
        ("completed", None, ("--for", "stalled"), Exit.JOB_ENDED_BADLY),
        ("training", None, ("--timeout", "0"), Exit.TIMED_OUT),
    ],
)
def test_how_waiting_ends(stoker, api, make_job, status, reason, words, code):
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(status=status, reason=reason))
    ran = stoker("wait", "job_01", *words)
    assert ran.code == code
    assert ran.out == ""
    if code == Exit.TIMED_OUT:
        assert "stoker explain job_01" in ran.err
    as_json = stoker("wait", "job_01", "--json", *words)
    assert as_json.code == code
    assert json.loads(as_json.out)["status"] == status


@pytest.mark.parametrize(
    ("text", "span"), [("90", 90), ("45s", 45), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)]
)
def test_times_as_people_write_them(text, span):
    assert seconds(text) == span


@pytest.mark.parametrize("text", ["soon", "-1", "10 minutes", "1e9", "m"])
def test_what_is_no_time_is_said_to_be_none(stoker, api, text):
    with pytest.raises(CliError):
        seconds(text)
    assert stoker("wait", "job_01", f"--timeout={text}").code == Exit.USAGE
    assert api.asked == []


def test_a_status_that_there_is_not_gets_the_list(stoker, api):
    ran = stoker("wait", "job_01", "--for", "trainin")
    assert ran.code == Exit.USAGE
    assert "training" in ran.err


def test_a_poll_says_when_nothing_changed(api, make_job):
    seen = {"ETag": 'W/"a"'}
    api.answers["GET /v1/jobs/job_01"] = [(200, make_job(), seen), (304, b"", seen)]
    client = Client(api.url, "k")
    job, tag = client.poll("job_01")
    assert (job["id"], tag) == ("job_01", 'W/"a"')
    assert client.poll("job_01", wait_s=5, etag=tag) == (None, tag)
    assert "wait=5" in api.asked[1]


# --- what a plan says of its price --------------------------------------------------------------

ESTIMATE = {
    "at": "t",
    "price": {"low": 1, "likely": 2, "high": 3, "display": "$0.30 ($0.20 to $0.90)"},
    "time": {
        "low_s": 1, "likely_s": 2, "high_s": 3, "boot_s": 120.0, "downloads_s": 60.0,
        "training_s": 7300.0, "display": "2 h (1 h to 3 h)",
    },
    "candidates": [{"gpu": "RTX 4090", "price_per_hour": 400_000}],
    "offers_fit": 7,
    "offers_refused": {"blocked by an operator": 1, "for their price": 4},
    "no_offer": None,
    "cap": {"suffices": False, "message": "$0.10 are less than the $0.30"},
    "brakes": [{"code": "kill_switch.on", "message": "renting was stopped"}],
    "assumed": ["the speed is a guess"],
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"1234567890")
    return folder


def dry(stoker, photos, *more):
    return stoker("train", str(photos), "--base", "civitai:1", "--dry-run", *more)


def test_a_dry_run_says_what_it_would_cost(stoker, api, photos):
    api.answers["POST /v1/jobs/estimate"] = (200, ESTIMATE)
    ran = dry(stoker, photos)
    assert ran.code == Exit.OK
    for words in (
        "$0.30 ($0.20 to $0.90), expected",
        "2 h (1 h to 3 h): boot 2 min, downloads 60 s, training 2 h",
        "RTX 4090 at $0.40/h; 7 offers fit",
        "4 for their price, 1 blocked by an operator",
        "too low: $0.10 are less than the $0.30",
        "renting was stopped",
        "the speed is a guess",
    ):
        assert words in ran.err
    sent = json.loads(api.bodies[0])
    assert (sent["images"], sent["bytes"], "dataset_id" in sent) == (2, 20, False)
    assert api.asked == ["POST /v1/jobs/estimate"]
    assert json.loads(dry(stoker, photos, "--json").out)["estimate"] == ESTIMATE


def test_a_dry_run_without_an_offer_says_why(stoker, api, photos):
    none = {**ESTIMATE, "price": None, "time": None, "candidates": [], "no_offer": "all too dear"}
    api.answers["POST /v1/jobs/estimate"] = (200, none)
    assert "no offer fits now: all too dear" in dry(stoker, photos).err


def test_a_market_that_cannot_be_asked_leaves_the_rest_of_the_plan(stoker, api, photos):
    problem = {"detail": "the market cannot be asked now", "code": "market_unavailable"}
    api.answers["POST /v1/jobs/estimate"] = (503, problem)
    ran = dry(stoker, photos, "--json")
    assert ran.code == Exit.OK
    assert "not known now: the market cannot be asked now" in ran.err
    assert json.loads(ran.out)["estimate"] is None


def test_an_order_that_would_be_refused_is_refused_before_anything_is_uploaded(
    stoker, api, photos, monkeypatch
):
    problem = {"detail": "the job cannot be ordered", "errors": [{"pointer": "/base"}]}
    api.answers["POST /v1/jobs/estimate"] = (422, problem)
    assert dry(stoker, photos).code == Exit.USAGE
    monkeypatch.setenv("STOKER_API_KEY", "stk_live_of_a_live_key")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert stoker("train", str(photos), "--base", "civitai:1").code == Exit.USAGE
    assert set(api.asked) == {"POST /v1/jobs/estimate"}
