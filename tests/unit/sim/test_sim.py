"""The simulation: it is deterministic, it converges, and it finds what was planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from orchestrator.sim.profiles import HELL
from orchestrator.sim.run import Summary, cohorts, run
from orchestrator.sim.shrink import shrink
from orchestrator.sim.world import Cohort, Outcome, World
from state import policy
from state.orphan import Orphan
from tasks.deallocate import Keeper


def lived(faults: str, jobs: int, *, seed: int = 1, workers: int = 1) -> Summary:
    return run(cohorts(jobs, seed, faults=faults), seed=seed, faults=faults, workers=workers)


@pytest.fixture(scope="module")
def hell() -> Summary:
    return lived("hell", 300)


@pytest.mark.parametrize("faults", ["calm", "market"])
def test_jobs_come_to_their_end_and_no_invariant_breaks(faults: str) -> None:
    figures = lived(faults, 200).figures()
    assert figures["violations"] == []
    assert sum(figures["statuses"].values()) == 200
    assert figures["machines"]["failed_one_rented_again"] == 0
    assert figures["webhooks"]["exhausted"] == 0
    if faults == "calm":
        assert figures["statuses"] == {"completed": 200}
        assert figures["attempts"]["mean"] == 1.0


def test_hell_is_survived(hell: Summary) -> None:
    figures = hell.figures()
    assert figures["violations"] == []
    assert sum(figures["statuses"].values()) == 300
    assert abs(figures["cost"]["mean_difference"]) < 0.01
    assert figures["crashes"] + sum(figures["faults_injected"].values()) > 100


def test_the_same_seed_gives_the_same_trace_and_another_does_not() -> None:
    first, again, other = (lived("hell", 40, seed=seed).trace_hash for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_number_of_processes_changes_nothing() -> None:
    todo = [Cohort(seed=seed, jobs=15, profile="hell") for seed in range(4)]
    alone = run(todo, seed=1, faults="hell", workers=1)
    spread = run(todo, seed=1, faults="hell", workers=2)
    assert alone.trace_hash == spread.trace_hash
    assert alone.events == spread.events


def test_each_cohort_of_hell_has_faults_of_its_own() -> None:
    drawn = [frozenset(World(Cohort(seed=seed, jobs=1, profile="hell")).rates) for seed in range(8)]
    assert len(set(drawn)) == 8
    assert frozenset().union(*drawn) > frozenset(list(HELL)[:10])


# --- planted mistakes -------------------------------------------------------------------------


def hasty(cohort: Cohort) -> Outcome:
    """Takes a machine that no list shows yet for one that was never made."""
    rules = dataclasses.replace(policy.DEFAULT, settle=timedelta(0))
    return World(cohort, rules=rules).run()


class Credulous(Keeper):
    def is_gone(self, instance_id: str | None) -> bool:
        return True


class Forgetful(Keeper):
    def destroy(self, instance_id: str) -> None:
        pass


def kept_by(keeper: type[Keeper], cohort: Cohort) -> Outcome:
    world = World(cohort)
    old = world.keeper
    world.keeper = keeper(store=old.store, provider=old.provider, clock=old.clock, rules=old.rules)
    return world.run()


class Blind:
    """An object store that finds every file in order."""

    def __init__(self, storage: Any) -> None:
        self.copy = storage.copy

    def verify(self, key: str, *, bytes: int, sha256: str) -> None:
        pass

    verify_safetensors = verify


def unread(cohort: Cohort) -> Outcome:
    world = World(cohort)
    world.verifier = dataclasses.replace(world.verifier, storage=Blind(world.storage))
    return world.run()


def unforgotten(cohort: Cohort) -> Outcome:
    """Does not notice that an orphan is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Orphan, "missed", lambda orphan, at: orphan)
        return World(cohort).run()


@pytest.mark.parametrize(
    ("planted", "broken"),
    [
        pytest.param(hasty, {"I3", "I5", "I7"}, id="lists are believed at once"),
        pytest.param(partial(kept_by, Credulous), {"I7"}, id="no second opinion"),
        pytest.param(partial(kept_by, Forgetful), {"I2", "I4", "I20"}, id="nothing is destroyed"),
        pytest.param(unread, {"I16"}, id="results are not read back"),
        pytest.param(unforgotten, {"I20"}, id="orphans cost money for ever"),
    ],
)
def test_a_planted_mistake_is_found_by_the_invariant_that_it_breaks(
    planted: Callable[[Cohort], Outcome], broken: set[str]
) -> None:
    outcomes = (planted(Cohort(seed=seed, jobs=60, profile="hell")) for seed in range(30))
    found = next(out.violation for out in outcomes if out.violation)
    assert found["invariant"] in broken, found


def test_a_failing_world_is_made_small_and_still_fails() -> None:
    worlds = (Cohort(seed=seed, jobs=60, profile="hell") for seed in range(30))
    cohort, found = next((item, out) for item in worlds if (out := unread(item)).violation)
    small, outcome = shrink(cohort, found, seconds=15.0, live=unread)
    assert small.jobs < cohort.jobs
    assert small.kinds is not None
    assert "host.bad_weights" in small.kinds
    assert outcome.violation is not None
    assert outcome.violation["invariant"] == "I16"
    again = unread(small)
    assert (again.violation, again.trace_hash) == (outcome.violation, outcome.trace_hash)
    assert outcome.trace, "the trace says how it came to that"


def test_a_violation_names_world_job_and_invariant() -> None:
    summary = Summary(jobs=1, seed=1, faults="calm")
    out = Outcome(violation={"invariant": "I3", "job": "job_1", "what": "two"})
    summary.add(Cohort(seed=42, jobs=7), out)
    (violation,) = summary.figures()["violations"]
    assert (violation["seed"], violation["invariant"], violation["job"]) == (42, "I3", "job_1")


def test_two_cohorts_differ_only_by_what_was_said() -> None:
    one, *others = cohorts(1200, 1, faults="market")
    assert [item.jobs for item in (one, *others)] == [500, 500, 200]
    assert len({item.seed for item in (one, *others)}) == 3
    assert dataclasses.replace(others[0], seed=one.seed) == one
