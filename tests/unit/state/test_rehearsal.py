"""How fast a rehearsal's time passes, and by what a lease of one is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from infra.settings import Settings, SettingsError
from orchestrator.api import schemas
from state import money, policy, rehearsal
from state.job import Job, JobRequest, Status
from state.lease import Lease
from state.policy import DEFAULT
from state.rehearsal import Rehearsal

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def job(part: Rehearsal | None) -> Job:
    request = JobRequest(dataset_id="ds", base="civitai:1", rehearsal=part)
    return Job(id="job_1", owner="o", request=request, created_at=NOW, entered_at=NOW)


def lease(label: str, **changes: Any) -> Lease:
    fields: dict[str, Any] = {"price": 360_000, "rented_at": NOW, "created_at": NOW, **changes}
    return Lease(
        id="l", job="job_1", attempt=1, label=label, expires_at=NOW + timedelta(hours=1), **fields
    )


def test_what_is_real_waits_as_it_always_did() -> None:
    assert policy.for_job(job(None)) is DEFAULT


@pytest.mark.parametrize("scale", [1, 1.5, 60, 600])
def test_nothing_is_waited_for_longer_in_a_rehearsal_nor_too_short_to_be_true(scale: float) -> None:
    rules = policy.for_job(job(Rehearsal(time_scale=scale)))
    assert policy.LEAST_SILENCE <= rules.silence <= DEFAULT.silence
    assert policy.LEAST_BOOT <= rules.hedge_least <= DEFAULT.hedge_least
    assert policy.LEAST_PAUSE <= rules.offer_pause <= DEFAULT.offer_pause
    for status, span in DEFAULT.frozen.items():
        assert policy.LEAST_FROZEN <= rules.frozen[status] <= span
    for status, span in DEFAULT.deadlines.items():
        assert policy.LEAST_STATE <= rules.deadlines[status] <= span
    assert rules.deadlines[Status.PENDING] == DEFAULT.deadlines[Status.PENDING]
    assert rules.lease == DEFAULT.lease


def test_what_passes_faster_does_so_once() -> None:
    one = job(Rehearsal(time_scale=2.0))
    rules = policy.for_job(one)
    assert policy.for_job(one, rules) is rules
    assert rules.silence == DEFAULT.silence / 2


def test_a_rehearsal_costs_what_its_pretended_time_would() -> None:
    real, fast = lease("stoker/j/1-a"), lease("test:60:stoker/j/1-a")
    later, soon = NOW + timedelta(minutes=60), NOW + timedelta(minutes=1)
    assert money.cost(fast, soon) == money.cost(real, later)
    assert (real.rehearsed, fast.rehearsed) == (False, True)
    assert (real.pace, fast.pace) == (1.0, 60.0)


@pytest.mark.parametrize("name", ["test:60", "test:60:stoker", "test:"])
def test_no_installation_is_called_as_a_rehearsal_is_marked(name: str) -> None:
    with pytest.raises(SettingsError):
        Settings.from_env({"STOKER_DEPLOYMENT": name})


def test_one_called_test_is_real() -> None:
    assert not lease("test/job_1/1-a").rehearsed
    assert lease(f"{rehearsal.deployment('test', Rehearsal())}/job_1/1-a").rehearsed


def test_interface_and_docs_know_the_same_fixtures() -> None:
    known = get_args(schemas.RehearsalIn.model_fields["fixture"].annotation)
    assert set(known) == set(rehearsal.FIXTURES)
    page = (Path(__file__).parents[3] / "docs" / "test-mode.md").read_text()
    assert all(f"`{name}`" in page for name in rehearsal.FIXTURES)
