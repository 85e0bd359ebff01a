"""What a job is said to wait for, by situation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from state import brakes
from state.brakes import Book
from state.events import Dataset, DatasetStatus, Event
from state.explain import Around, Explanation, Waits, explain
from state.job import Job, JobRequest, Reason, Status
from state.lease import Lease, LeaseStatus
from state.policy import DEFAULT

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
#: Everything that is to be heard was heard just now.
BEATS: dict[str, Any] = {
    name: (NOW - timedelta(seconds=2), {})
    for name in (brakes.SWEEP, "reconcile", "worker", "receiver")
}


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def job(status: Status, since: float = 10, **changes: Any) -> Job:
    """A job that is in `status` for so many seconds."""
    entered = ago(since)
    span = DEFAULT.deadlines.get(status)
    fields: dict[str, Any] = {
        "id": "job_1",
        "owner": "o",
        "request": JobRequest(dataset_id="ds_1", base="civitai:1"),
        "created_at": ago(4000),
        "entered_at": entered,
        "moved_at": entered,
        "status": status,
        "dataset_ready": True,
        "deadline_at": entered + span if span else None,
    }
    return Job(**{**fields, **changes})


def lease(since: float = 30, **changes: Any) -> Lease:
    """A machine that was rented so many seconds ago."""
    fields: dict[str, Any] = {
        "id": "job_1.001",
        "job": "job_1",
        "attempt": 1,
        "label": "test/job_1/1-a",
        "created_at": ago(since),
        "rented_at": ago(since),
        "expires_at": NOW + timedelta(hours=5),
        "status": LeaseStatus.RENTED,
        "machine_id": "m7",
        "gpu_name": "RTX 4090",
        "price": 360_000,
        "boot_s": 60.0,
        "instance_id": "i1",
    }
    return Lease(**{**fields, **changes})


def said(what: Job, *leases: Lease, beats: Any = BEATS, **around: Any) -> Explanation:
    book = Book(leases=around.pop("leases", ()), beats=beats)
    return explain(what, leases, Around(book=book, **around), NOW)


def well(found: Explanation) -> dict[str, bool]:
    return {signal.name: signal.well for signal in found.signals}


def dataset(status: DatasetStatus) -> Dataset:
    return Dataset(id="ds_1", owner="o", created_at=ago(100), status=status)


def running(status: Status, since: float = 300, heard: float = 3, **changes: Any) -> Job:
    """A job whose agent is there."""
    known = {"lease": "job_1.001", "last_heard_at": ago(heard), "moved_at": ago(heard)}
    return job(status, since, **{**known, **changes})


def test_photographs_that_are_not_all_there():
    found = said(job(Status.PENDING), dataset=dataset(DatasetStatus.OPEN))
    assert found.waits_for is Waits.IMAGES
    assert found.next is not None
    assert found.next.by == "caller"
    assert [option.name for option in found.options] == ["seal", "cancel"]


def test_photographs_that_are_being_checked():
    found = said(job(Status.PENDING), dataset=dataset(DatasetStatus.BUILDING))
    assert (found.waits_for, found.next and found.next.by) == (Waits.DATASET, "worker")


def test_waiting_for_an_offer_says_what_was_refused_and_when_the_next_look_is():
    wait = {
        "code": "offers.none",
        "hold": False,
        "at": "2026-11-22T11:59:50.000Z",
        "refused": {"failed a job lately": 3, "blocked by an operator": 1},
    }
    words = "no offer is fit"
    what = job(
        Status.PENDING_GPU,
        due_at=NOW + timedelta(seconds=5),
        progress={"gpu_search": words, "gpu_wait": wait},
    )
    found = said(what)
    assert found.waits_for is Waits.OFFER
    assert words in found.headline
    assert found.search.refused == wait["refused"]
    assert found.next is not None
    assert (found.next.by, found.next.at) == ("worker", NOW + timedelta(seconds=5))
    assert "Offers refused at the last look: 3 failed a job lately, 1 blocked by an operator." in (
        found.sentences
    )
    assert {"reorder", "cancel"} == {option.name for option in found.options}


def test_a_slow_boot_says_what_was_expected_what_the_market_says_and_what_comes():
    slow = lease(55, note="starting: Pulling image layer 3", noted_at=ago(40))
    found = said(job(Status.PENDING_GPU, 65), slow)
    assert found.waits_for is Waits.BOOT
    assert "boots for 55 s, where 60 s were expected" in found.headline
    assert "Pulling image layer 3" in found.headline
    assert found.deadlines[0].name == "hedge"
    assert {"hedge", "boot", "state", "lease"} == {item.name for item in found.deadlines}
    assert found.next is not None
    assert (found.next.by, found.next.at) == ("worker", NOW + timedelta(seconds=5))
    stuck = next(item for item in found.deadlines if item.name == "boot")
    assert stuck.at == ago(40) + DEFAULT.boot_stuck


def test_beside_a_second_machine_no_third_is_announced():
    first, second = lease(200), lease(100, id="job_1.002", label="b", hedge=True, machine_id="m8")
    found = said(job(Status.PENDING_GPU, 210), first, second)
    assert "hedge" not in {item.name for item in found.deadlines}
    assert [machine.machine_id for machine in found.machines] == ["m7", "m8"]
    assert "beside one that was slow" in found.machines[1].words


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (LeaseStatus.INTENDED, "is being rented"),
        (LeaseStatus.UNKNOWN, "no clear answer"),
    ],
)
def test_an_order_under_way(status, words):
    young = lease(1, status=status, rented_at=None, instance_id=None)
    assert words in said(job(Status.PENDING_GPU), young).headline


def test_the_kill_switch_is_named_with_its_mend():
    beats = {**BEATS, brakes.RENTING: (ago(60), {"stopped": True, "why": "a bad day"})}
    found = said(job(Status.PENDING_GPU), beats=beats)
    assert found.waits_for is Waits.BRAKE
    assert "a bad day" in found.headline
    assert [brake.code for brake in found.brakes] == ["kill_switch.on"]
    assert "resume-renting" in " ".join(found.sentences)


def test_a_kill_switch_that_was_lifted_holds_no_more_though_the_job_still_says_so():
    wait = {"code": "kill_switch.on", "hold": True, "at": "2026-11-22T11:59:50.000Z"}
    what = job(Status.PENDING_GPU, progress={"gpu_search": "was stopped", "gpu_wait": wait})
    assert said(what).waits_for is Waits.OFFER


def test_a_budget_that_this_rental_would_break_is_named():
    words = "budget per day: $5.20 of at most $5.00 would be spent or set aside"
    wait = {"code": "budget.day", "hold": True, "at": "2026-11-22T11:59:50.000Z"}
    what = job(Status.PENDING_GPU, progress={"gpu_search": words, "gpu_wait": wait})
    found = said(what)
    assert found.waits_for is Waits.BRAKE
    assert words in found.headline
    assert "STOKER_MAX_PER_DAY" in found.brakes[0].mend


def test_a_brake_says_nothing_to_a_job_that_has_its_machine():
    beats = {**BEATS, brakes.RENTING: (ago(60), {"stopped": True})}
    assert said(job(Status.PENDING_GPU), lease(), beats=beats).brakes == ()
    assert said(running(Status.TRAINING), lease(), beats=beats).brakes == ()


@pytest.mark.parametrize(
    ("status", "kept", "waits", "words"),
    [
        (Status.PENDING_GPU, {}, Waits.AGENT, "getting ready"),
        (
            Status.PENDING_IMAGES,
            {"images": {"bytes": 400, "bytes_total": 1234, "mbps": 80.0}},
            Waits.DATASET_DOWNLOAD,
            "byte 400/1234 at 80 Mbit/s",
        ),
        (
            Status.PENDING_MODEL,
            {"model": {"bytes": 1, "bytes_total": 2}},
            Waits.MODEL_DOWNLOAD,
            "byte 1/2",
        ),
        (
            Status.TRAINING,
            {"training": {"step": 412, "total": 1000, "steps_per_s": 4.0, "eta_s": 147}},
            Waits.TRAINING,
            "step 412/1000 at 4 steps/s, 2 min to go",
        ),
        (Status.TRAINING, {"training": {}, "result": {"loss_best": 0.1}}, Waits.UPLOAD, "uploads"),
    ],
)
def test_what_runs_says_how_far_it_is(status, kept, waits, words):
    found = said(running(status, 60, progress=kept), lease(300, ready_at=ago(200)))
    assert found.waits_for is waits
    assert words in found.headline
    assert all(well(found).values())
    assert well(found).keys() >= {"agent", "moved", "market", "worker", "reconcile"}
    assert {"silence", "state", "lease"} <= {item.name for item in found.deadlines}


def test_training_well_can_be_asked_for_checkpoints_and_samples():
    event = Event(
        job="job_1", seq=9, attempt=1, type="heartbeat", at=ago(1), data={"doing": "validating"}
    )
    found = said(running(Status.TRAINING), lease(900, ready_at=ago(800)), latest=[event])
    assert [option.name for option in found.options] == ["checkpoint", "sample", "cancel"]
    assert "(validating)" in found.headline
    assert found.next is not None
    assert found.next.by == "agent"


def test_a_silent_agent_is_not_well_and_its_end_is_announced():
    found = said(running(Status.TRAINING, heard=30), lease(900, ready_at=ago(800)))
    assert found.deadlines[0].name == "silence"
    assert found.deadlines[0].at == ago(30) + DEFAULT.silence
    assert "another follows" in found.deadlines[0].words
    silent = said(running(Status.TRAINING, heard=50), lease(900, ready_at=ago(800)))
    assert well(silent)["agent"] is False
    assert silent.next is not None
    assert (silent.next.words, silent.next.by) == ("the job is stalled", "reconcile")


def test_an_agent_that_could_not_be_heard_is_not_called_silent():
    what = running(Status.TRAINING, heard=200)
    found = said(what, lease(900, ready_at=ago(800)), since=ago(5))
    assert well(found)["agent"]
    assert found.next is not None
    assert found.next.by == "agent"


def test_weights_that_are_read_back_are_awaited_from_the_server():
    what = running(Status.TRAINING, heard=300, known=frozenset({"weights.uploaded"}), due_at=ago(1))
    found = said(what, lease(900, ready_at=ago(800)))
    assert found.waits_for is Waits.VERIFICATION
    assert found.next is not None
    assert found.next.by == "worker"


def test_a_stalled_job_says_why_and_when_it_goes_on():
    reason = Reason(code="training.frozen", message="no step for 50 s at step 4/9")
    what = job(
        Status.STALLED,
        stalled_from=Status.TRAINING,
        reason=reason,
        retry_at=NOW + timedelta(seconds=40),
        deadline_at=None,
    )
    found = said(what)
    assert found.waits_for is Waits.RETRY
    assert "in training at attempt 1 (training.frozen: no step for 50 s" in found.headline
    assert found.next is not None
    assert found.next.words.startswith("attempt 2 begins")
    assert found.next.at == NOW + timedelta(seconds=40)
    assert "Next: attempt 2 begins, on another machine in 40 s (reconcile)." in (found.sentences)
    assert [option.name for option in found.options] == ["retry", "cancel"]


@pytest.mark.parametrize(
    ("status", "reason", "words", "options"),
    [
        (Status.COMPLETED, None, "completed", ["download"]),
        (Status.CANCELLED, None, "cancelled", ["reorder", "logs"]),
        (
            Status.FAILED,
            Reason(code="budget.job", message="the cap is used up", retryable=False),
            "the cap is used up",
            ["reorder", "logs"],
        ),
    ],
)
def test_what_is_over_waits_for_nothing(status, reason, words, options):
    found = said(job(status, reason=reason, deadline_at=None))
    assert found.waits_for is Waits.NOTHING
    assert words in found.headline
    assert (found.next, found.deadlines, found.signals) == (None, (), ())
    assert [option.name for option in found.options] == options
    if reason:
        assert "a higher cap" in found.sentences[-1]


def test_a_machine_on_its_way_out_is_still_shown():
    going = lease(900, status=LeaseStatus.RELEASING, why="its job is completed")
    found = said(job(Status.COMPLETED, deadline_at=None), going)
    assert "being given back: its job is completed" in found.machines[0].words
    assert found.next is not None
    assert found.next.words == "its machine is destroyed"


def test_processes_that_do_not_run_are_not_well():
    found = said(job(Status.PENDING_GPU), beats={})
    assert well(found) == dict.fromkeys(("receiver", "market", "reconcile", "worker"), False)
    assert "Not well: it never happened yet that a worker was heard." in found.sentences


def test_a_later_attempt_says_so():
    found = said(job(Status.PENDING_GPU, attempt=2, interruptions=1))
    assert found.sentences[1] == "This is attempt 2 of 4."
    assert not any("attempt" in words for words in said(job(Status.PENDING)).sentences)


def test_every_status_can_be_explained():
    for status in Status:
        assert said(job(status)).sentences
