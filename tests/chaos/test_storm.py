"""SIGKILL at random points of the real process group, with jobs under way all the time; stopped
processes, failing lines and full disks beside it. When it is over, nothing was lost or leaked.

`--chaos-rounds N --chaos-seed S` make it long, and another; see docs/chaos.md.
"""

from __future__ import annotations

from typing import Any

from stand import audit
from state.job import Status

#: The bar: no instance lives for so long after its job has ended (seconds).
ORPHAN_S = 120.0


def test_every_job_that_was_acknowledged_ends(aftermath: Any) -> None:
    assert len(aftermath.jobs) == len(set(aftermath.storm.ordered)) > 0
    assert all(job.terminal for job in aftermath.jobs.values())
    assert sum(aftermath.storm.killed.values()) == aftermath.rounds


def test_a_job_that_does_not_complete_says_why(aftermath: Any) -> None:
    jobs = aftermath.jobs.values()
    failed = [job for job in jobs if job.status is not Status.COMPLETED]
    assert all(job.status is Status.FAILED and job.reason.code for job in failed)
    assert all(job.attempt == job.request.max_attempts for job in failed), "no try was left out"


def test_jobs_are_trained_by_whom_they_were_meant_for(aftermath: Any) -> None:
    """Else there would be few of them, and little to be killed in."""
    meant = {job.id for job in aftermath.jobs.values() if job.request.recipe["trigger"] == "real"}
    assert aftermath.really_trained <= meant


def test_no_acknowledged_report_is_lost(aftermath: Any) -> None:
    """I8: at the front, what had 2xx; in the database, each of them once and as it was sent."""
    assert aftermath.storm.front.acknowledged
    assert aftermath.storm.front.quarrels == []
    assert aftermath.lost == []


def test_every_history_is_a_path_of_the_table(aftermath: Any) -> None:
    """I10"""
    assert aftermath.illegal == []


def test_customers_hear_of_every_step(aftermath: Any) -> None:
    """I12: signed, numbered without gaps, and a repeat says the same."""
    witness = aftermath.storm.witness
    assert witness.refused == 0
    assert aftermath.unheard == []
    assert all(len(bodies) == 1 for bodies in witness.bodies.values())


def test_no_instance_outlives_its_job(aftermath: Any) -> None:
    """I2, I4"""
    assert aftermath.rentals
    assert {name: s for name, s in aftermath.outlived.items() if s > ORPHAN_S} == {}


def test_every_instance_had_a_lease_before_it_was_asked_for(aftermath: Any) -> None:
    """I1, I5"""
    assert audit.unowned_instances(aftermath.rentals, aftermath.leases) == []


def test_weights_of_completed_jobs_are_there(aftermath: Any) -> None:
    """I16"""
    storage = aftermath.storm.services.storage
    for job in aftermath.jobs.values():
        if job.status is Status.COMPLETED:
            (weights,) = (
                item for item in aftermath.artefacts[job.id] if item.name == "lora.safetensors"
            )
            storage.verify_safetensors(weights.key, bytes=weights.bytes, sha256=weights.sha256)
