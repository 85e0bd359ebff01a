"""The machine: every state times every event, any order, duplicates, old attempts."""

from __future__ import annotations

import dataclasses
import itertools
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpu_agent.wire import Fact
from state import diagram, machine
from state.errors import IllegalMove
from state.job import ACTIVE, TERMINAL, Job, JobRequest, Reason, Status
from state.machine import MILESTONES, TABLE, Effect, Move

NOW = datetime(2026, 11, 22, tzinfo=UTC)
REASON = Reason(code="agent.silent", message="not heard for 45 s")
AGENT_ORDER = [
    Fact.GPU_READY,
    Fact.IMAGES_READY,
    Fact.MODEL_READY,
    Fact.FILES_POSITIONED,
    Fact.WEIGHTS_UPLOADED,
]


def job(status: Status = Status.PENDING, **changes: object) -> Job:
    fields: dict[str, object] = {"dataset_ready": status is not Status.PENDING, **changes}
    return Job(
        id="job_1",
        owner="o",
        request=JobRequest(dataset_id="ds_1", base="civitai:1"),
        created_at=NOW,
        entered_at=NOW,
        status=status,
        **fields,  # type: ignore[arg-type]
    )


def learn_all(value: Job, facts: list[Fact]) -> tuple[Job, list[Status]]:
    passed: list[Status] = []
    for fact in facts:
        value, steps, _ = machine.learn(value, fact, value.attempt, NOW)
        passed += [step.target for step in steps]
    return value, passed


def test_a_job_passes_exactly_the_published_states() -> None:
    value, steps = machine.move(job(), Move.DATASET_READY, NOW)
    passed = [step.target for step in steps]
    value, more = learn_all(value, AGENT_ORDER)
    value, last = machine.move(value, Move.WEIGHTS_VERIFIED, NOW)
    assert [*passed, *more, *(step.target for step in last)] == [
        Status.PENDING_GPU,
        Status.PENDING_IMAGES,
        Status.PENDING_MODEL,
        Status.TRAINING,
        Status.COMPLETED,
    ]
    assert value.finished_at == NOW


@pytest.mark.parametrize("order", list(itertools.permutations(AGENT_ORDER)))
def test_facts_in_any_order_lead_through_the_same_states(order: tuple[Fact, ...]) -> None:
    value, passed = learn_all(job(Status.PENDING_GPU), list(order))
    assert passed == [Status.PENDING_IMAGES, Status.PENDING_MODEL, Status.TRAINING]
    assert value.known == {str(fact) for fact in AGENT_ORDER}


def test_duplicates_change_nothing() -> None:
    chooser = random.Random(1)
    facts = AGENT_ORDER * 3
    chooser.shuffle(facts)
    value, passed = learn_all(job(Status.PENDING_GPU), facts)
    assert value.status is Status.TRAINING
    assert len(passed) == 3


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("fact", list(Fact))
def test_every_state_times_every_fact(status: Status, fact: Fact) -> None:
    before = job(status)
    after, steps, effect = machine.learn(before, fact, 1, NOW)
    if status not in ACTIVE:
        assert (after, steps, effect) == (before, [], Effect.STALE)
    elif fact not in MILESTONES:
        assert (after, steps, effect) == (before, [], Effect.NOTHING)
    else:
        assert effect is Effect.APPLIED
        assert fact in after.known
        legal = {(row.source, row.target) for row in TABLE}
        assert all((step.source, step.target) in legal for step in steps)


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("what", [Move.STALL, Move.RETRY, Move.FAIL, Move.CANCEL])
def test_every_state_times_every_move(status: Status, what: Move) -> None:
    before = job(status)
    rows = [row for row in TABLE if row.source is status and row.trigger == what]
    if rows:
        after, steps = machine.move(before, what, NOW, reason=REASON)
        assert after.status is rows[0].target
        assert [(step.source, step.target, step.cause) for step in steps] == [
            (status, rows[0].target, what)
        ]
    else:
        with pytest.raises(IllegalMove, match=f"job_1 is {status}"):
            machine.move(before, what, NOW, reason=REASON)


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_terminal_state_is_never_left(status: Status) -> None:
    assert not [row for row in TABLE if row.source is status]


@pytest.mark.parametrize("status", [s for s in Status if s not in TERMINAL])
def test_every_live_state_can_be_cancelled(status: Status) -> None:
    after, _ = machine.move(job(status), Move.CANCEL, NOW)
    assert after.status is Status.CANCELLED


def test_a_fact_of_an_old_attempt_changes_nothing() -> None:
    before = job(Status.PENDING_GPU, attempt=2)
    assert machine.learn(before, Fact.GPU_READY, 1, NOW) == (before, [], Effect.STALE)
    assert machine.learn(before, Fact.GPU_READY, 3, NOW) == (before, [], Effect.STALE)


def test_a_retry_is_a_new_attempt_that_knows_nothing_of_the_old() -> None:
    value, _ = learn_all(job(Status.PENDING_GPU), AGENT_ORDER[:3])
    value, _ = machine.move(value, Move.STALL, NOW, reason=REASON)
    assert value.stalled_from is Status.PENDING_MODEL
    value, _ = machine.move(value, Move.RETRY, NOW)
    assert (value.status, value.attempt, value.known) == (Status.PENDING_GPU, 2, frozenset())
    assert value.reason is None


def test_a_job_without_its_dataset_cannot_be_retried_onto_a_gpu() -> None:
    value, _ = machine.move(job(), Move.STALL, NOW, reason=REASON)
    with pytest.raises(IllegalMove):
        machine.move(value, Move.RETRY, NOW)


def test_weights_are_not_completed_before_the_server_verified_them() -> None:
    value, _ = learn_all(job(Status.PENDING_GPU), AGENT_ORDER[:4])
    with pytest.raises(IllegalMove):
        machine.move(value, Move.WEIGHTS_VERIFIED, NOW)
    value, _ = learn_all(value, [Fact.WEIGHTS_UPLOADED])
    assert value.status is Status.TRAINING


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        job().status = Status.COMPLETED  # type: ignore[misc]


def test_the_diagram_in_the_docs_is_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "states.md"
    assert page.read_text() == diagram.markdown()
