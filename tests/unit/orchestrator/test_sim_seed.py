"""A simulation can be run again: the seed is all there is to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from orchestrator.sim import run


@pytest.fixture(autouse=True)
def _logs_again() -> Iterator[None]:
    """A simulation silences the logs of its process."""
    yield
    structlog.reset_defaults()


def trace_of(seed: int) -> str:
    (cohort,) = run.cohorts(8, seed, faults="hell")
    summary = run.run([cohort], seed=seed, faults="hell")
    assert not summary.violations
    return summary.trace_hash


def test_the_same_seed_gives_the_same_trace() -> None:
    assert trace_of(1) == trace_of(1)


def test_another_seed_gives_another() -> None:
    assert trace_of(1) != trace_of(2)
