"""Stalls by progress: what stands still is seen within a minute, what is slow is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from gpu_agent.wire import Fact
from state import record
from state.job import Reason, Status

NEVER = math.inf
TO_TRAINING = (
    Fact.GPU_READY,
    Fact.IMAGES_READY,
    Fact.MODEL_READY,
    Fact.FILES_POSITIONED,
    Fact.TRAINING_STARTED,
)


def reach(world: Any, *facts: Fact, **request: Any) -> None:
    world.add_job(**request)
    world.tick()
    for number, fact in enumerate(facts, 1):
        world.report(fact, {"moved": number})


def live(
    world: Any,
    seconds: float,
    say: Callable[[float], tuple[Fact, dict[str, Any]]],
    *,
    every: float = 10,
) -> float:
    """The agent says something at a steady pace; after how many seconds its job stalled."""
    began = world.clock()
    status = world.job().status
    while (passed := (world.clock() - began).total_seconds()) < seconds:
        if passed % every == 0:
            world.report(*say(passed))
        world.tick()
        if world.job().status is not status:
            return (world.clock() - began).total_seconds()
    return NEVER


def why(world: Any) -> Reason:
    reason = world.job().reason
    assert reason is not None
    return reason


@pytest.mark.parametrize(
    ("reached", "status"),
    [
        (TO_TRAINING[:1], "pendingImages"),
        (TO_TRAINING[:2], "pendingModel"),
        (TO_TRAINING, "training"),
    ],
)
def test_an_agent_that_lives_but_gets_nothing_done_is_seen_within_a_minute(
    world: Any, reached: tuple[Fact, ...], status: str
) -> None:
    reach(world, *reached)
    assert world.job().status == status
    stalled = live(world, 300, lambda passed: (Fact.HEARTBEAT, {"moved": 5}))
    assert stalled <= 60
    assert why(world).code == f"{status}.frozen"
    assert why(world).retryable
    assert (world.job().stalled_from, world.job().excluded_machines) == (status, ("m1",))


def test_a_gpu_that_never_answers_its_agent_is_given_up(world: Any) -> None:
    reach(world)
    stalled = live(world, 1000, lambda passed: (Fact.HEARTBEAT, {"moved": 0}))
    assert 180 <= stalled <= 190
    assert why(world).message == "no word of the GPU for 3 min at the agent's hello"


@pytest.mark.parametrize("reached", [TO_TRAINING[:1], TO_TRAINING[:2], TO_TRAINING])
def test_slow_but_moving_is_not_stalled(world: Any, reached: tuple[Fact, ...]) -> None:
    reach(world, *reached)
    slowly = lambda passed: (Fact.HEARTBEAT, {"moved": 10 + int(passed) // 40})  # noqa: E731
    assert live(world, 1500, slowly) == NEVER


@pytest.mark.parametrize(
    "garbage", ["12", 1.5, True, -4, 2**70, None, [7], 3, float("1e300")], ids=repr
)
def test_a_count_that_makes_no_sense_is_no_progress(world: Any, garbage: object) -> None:
    reach(world, *TO_TRAINING)
    assert world.job().moved == 5
    stalled = live(world, 300, lambda passed: (Fact.HEARTBEAT, {"moved": garbage}))
    assert stalled <= 60
    assert world.job().moved == 5


def test_an_agent_that_does_not_count_is_judged_by_bytes_files_and_steps(world: Any) -> None:
    world.add_job()
    world.tick()
    world.report(Fact.GPU_READY)
    growing = lambda passed: (Fact.IMAGES_PROGRESS, {"bytes": 10 + int(passed)})  # noqa: E731
    assert live(world, 200, growing) == NEVER
    still = {"bytes": 10 + 190, "bytes_total": 5000}
    stalled = live(world, 200, lambda passed: (Fact.IMAGES_PROGRESS, still))
    assert stalled <= 60
    assert why(world).message == "no byte of the dataset for 50 s at byte 200/5000"


def test_the_reason_says_what_stands_still_for_how_long_and_where(world: Any) -> None:
    reach(world, *TO_TRAINING)
    data = {"step": 412, "total": 1000, "steps_per_s": 4.0, "moved": 900}
    world.report(Fact.TRAINING_PROGRESS, data)
    live(world, 300, lambda passed: (Fact.HEARTBEAT, {"moved": 900}))
    assert why(world).message == "no step for 50 s at step 412/1000"


def test_long_steps_are_waited_for(world: Any) -> None:
    reach(world, *TO_TRAINING)
    data = {"step": 4, "total": 100, "steps_per_s": 1 / 30, "moved": 900}
    world.report(Fact.TRAINING_PROGRESS, data)
    stalled = live(world, 600, lambda passed: (Fact.HEARTBEAT, {"moved": 900}))
    assert 300 <= stalled <= 305


def test_a_step_of_a_thousand_years_still_meets_the_deadline_of_the_state(world: Any) -> None:
    reach(world, *TO_TRAINING)
    world.report(Fact.TRAINING_PROGRESS, {"step": 4, "total": 9, "steps_per_s": 1e-300})
    assert world.job().due_at <= world.job().deadline_at


def test_an_upload_that_stands_still_does_not_hide_behind_long_steps(world: Any) -> None:
    reach(world, *TO_TRAINING)
    world.report(Fact.TRAINING_PROGRESS, {"step": 4, "total": 4, "steps_per_s": 1 / 30, "moved": 9})
    world.report(Fact.TRAINING_COMPLETED, {"loss_best": 0.1, "moved": 10})
    stalled = live(world, 300, lambda passed: (Fact.HEARTBEAT, {"moved": 10}))
    assert stalled <= 60
    assert "no byte of the result sent" in why(world).message


def test_a_cut_line_is_silence_and_not_frozen_work(world: Any) -> None:
    reach(world, *TO_TRAINING)
    world.report(Fact.HEARTBEAT, {"moved": 6})
    for _ in range(8):
        world.tick()
    world.report(Fact.HEARTBEAT, {"moved": 6})
    for _ in range(44):
        world.tick()
    assert world.job().status is Status.TRAINING
    for _ in range(2):
        world.tick()
    assert world.job().excluded_machines == ("m1",)
    with world.store.transaction() as tx:
        told = [row.payload["data"] for row in tx.list_outgoing("job_1")]
    assert [data["reason"]["code"] for data in told if "reason" in data] == ["agent.silent"]


def test_nothing_counts_while_the_server_itself_was_away(world: Any) -> None:
    reach(world, *TO_TRAINING)
    world.receiver_up = False
    for _ in range(600):
        world.tick()
    world.receiver_up = True
    for _ in range(60):
        world.tick()
    # The first word after the break is a heartbeat; what was done comes a moment later.
    world.report(Fact.HEARTBEAT, {"moved": 5})
    for _ in range(4):
        world.tick()
    world.report(Fact.TRAINING_PROGRESS, {"step": 900, "total": 1000, "moved": 900})
    for _ in range(20):
        world.tick()
    assert world.job().status is Status.TRAINING


def test_a_short_break_of_the_server_is_no_time_of_the_agent(world: Any) -> None:
    reach(world, *TO_TRAINING)
    world.receiver_up = False
    for _ in range(24):
        world.tick()
    world.receiver_up = True
    stalled = live(world, 200, lambda passed: (Fact.HEARTBEAT, {"moved": 5}))
    assert 50 <= stalled <= 60


def test_where_why_and_when_are_in_the_job_the_event_and_the_webhook(world: Any) -> None:
    reach(world, *TO_TRAINING)
    live(world, 300, lambda passed: (Fact.HEARTBEAT, {"moved": 5}))
    job = world.job()
    assert (job.stalled_from, job.reason.code) == (Status.TRAINING, "training.frozen")
    again = record.rfc3339(job.retry_at)
    with world.store.transaction() as tx:
        event = tx.events("job_1", type="transition")[-1].data
        webhook = tx.list_outgoing("job_1")[-1].payload
    assert webhook["type"] == "job.stalled"
    for told in (event, webhook["data"]):
        assert (told["stalled_from"], told["retry_at"]) == ("training", again)
        assert told["reason"] == job.reason.to_dict()


# --- training that slows ----------------------------------------------------------------------


def training(world: Any, speed: Callable[[float], float], *, hours: float = 8) -> float:
    """A training of 10,000 steps whose speed (steps/s) is a function of time; after how many
    seconds it stalled."""
    began, step, moved = world.clock(), 0.0, 100
    while (passed := (world.clock() - began).total_seconds()) < hours * 3600 and step < 10_000:
        now_speed = speed(passed)
        step, moved = step + 10 * now_speed, moved + 1
        data: dict[str, Any] = {"step": int(step), "total": 10_000, "moved": moved}
        if now_speed:
            data |= {"steps_per_s": now_speed, "eta_s": (10_000 - step) / now_speed}
        world.report(Fact.TRAINING_PROGRESS if now_speed else Fact.HEARTBEAT, data)
        world.tick(10)
        if world.job().status is not Status.TRAINING:
            return (world.clock() - began).total_seconds()
    return NEVER


def test_a_steady_slow_run_is_left_to_end(world: Any) -> None:
    reach(world, *TO_TRAINING)
    assert training(world, lambda passed: 0.4) == NEVER


def test_a_jittery_run_is_left_to_end(world: Any) -> None:
    reach(world, *TO_TRAINING)
    assert training(world, lambda passed: 3 + 2.5 * math.sin(passed / 7)) == NEVER


def test_a_run_that_slows_for_ever_is_seen_and_its_host_is_left(world: Any) -> None:
    reach(world, *TO_TRAINING)
    stalled = training(world, lambda passed: 5 * 0.5 ** (passed / 600))
    # At best 36 minutes were believed; at this decay it would never end.
    assert 15 * 60 <= stalled <= 40 * 60
    assert why(world).code == "training.slowing"
    assert why(world).retryable
    assert world.job().excluded_machines == ("m1",)


def test_an_end_that_stays_as_far_away_as_ever_is_seen(world: Any) -> None:
    reach(world, *TO_TRAINING)
    moved = iter(range(100, 10_000))
    data = {"step": 1, "total": 10_000, "eta_s": 1200.0}
    say = lambda passed: (Fact.TRAINING_PROGRESS, {**data, "moved": next(moved)})  # noqa: E731
    stalled = live(world, 8 * 3600, say)
    assert stalled <= 40 * 60


def test_what_a_trainer_believes_in_its_first_minute_is_not_held_against_it(world: Any) -> None:
    reach(world, *TO_TRAINING)
    for moved in range(10, 15):
        data = {"step": moved, "total": 10_000, "eta_s": 1.0, "moved": moved}
        world.report(Fact.TRAINING_PROGRESS, data)
        world.tick(10)
    assert training(world, lambda passed: 1.0) == NEVER


@pytest.mark.parametrize("at", [120, 1500])
def test_one_long_pause_for_validation_or_samples_is_no_slowing(world: Any, at: float) -> None:
    reach(world, *TO_TRAINING)

    def speed(passed: float) -> float:
        if at <= passed < at + 900:
            return 0.0
        # What is said just after it counts the pause in.
        return 0.2 if at + 900 <= passed < at + 930 else 5.0

    assert training(world, speed) == NEVER


def test_on_the_last_try_slow_is_better_than_failed(world: Any) -> None:
    reach(world, *TO_TRAINING, max_attempts=1)
    assert training(world, lambda passed: max(0.05, 5 * 0.5 ** (passed / 600)), hours=3) == NEVER


@pytest.mark.parametrize("eta", [-1, "soon", True, None, 1e300, [1]], ids=repr)
def test_an_estimate_that_makes_no_sense_is_none(world: Any, eta: object) -> None:
    reach(world, *TO_TRAINING)
    for number in range(20):
        world.report(Fact.TRAINING_PROGRESS, {"step": number, "eta_s": eta, "moved": 10 + number})
        world.tick(10)
    assert "outlook" not in world.job().progress
