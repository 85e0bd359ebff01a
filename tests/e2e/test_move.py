"""A machine that dies or is taken away in training: the next one goes on at the step of the last
checkpoint, and the weights are those of a run that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests

pytestmark = pytest.mark.slow

STEPS = 80
#: Checkpoints every so many seconds; what may be lost is no more than that.
CHECKPOINT_S = 2
RECIPE = {
    "steps": STEPS,
    "resolution": 64,
    "rank": 4,
    "validation_every": 20,
    "checkpoint_s": CHECKPOINT_S,
    "seed": 7,
}


@pytest.fixture(scope="module")
def dice() -> random.Random:
    """Printed, so that a failure can be thrown again."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")  # noqa: T201 -- pytest shows it with a failure
    return random.Random(seed)


def _weights(stoker: Any, job_id: str) -> str:
    """SHA-256 of the result."""
    files = stoker.show(job_id)["result_files"]
    return str(next(item["sha256"] for item in files if item["name"].endswith(".safetensors")))


@pytest.fixture(scope="module")
def undisturbed(stoker: Any) -> str:
    job_id = stoker.order(recipe=RECIPE)
    assert stoker.ended(job_id)["status"] == "completed"
    return str(job_id)


@pytest.fixture(scope="module")
def moved(
    stoker: Any, undisturbed: str, until: Callable[..., Any], dice: random.Random
) -> tuple[str, int]:
    """A job whose machine was killed at a random step after its first checkpoint; that step."""
    job_id = stoker.order(recipe=RECIPE)

    def checkpointed() -> Any:
        return stoker.job(job_id).progress.get("checkpoint")

    until(checkpointed, "a first checkpoint", 90.0)
    until_step = stoker.job(job_id).progress["training"]["step"] + dice.randrange(5, 30)
    until(lambda: stoker.job(job_id).progress["training"]["step"] >= until_step, "the step", 60.0)
    killed_at = stoker.job(job_id).progress["training"]["step"]
    for pid in stoker.machine(job_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert stoker.ended(job_id, 180.0)["status"] == "completed"
    return job_id, killed_at


@pytest.fixture(scope="module")
def outbid(stoker: Any, undisturbed: str, until: Callable[..., Any]) -> str:
    """A job on an interruptible machine, for which somebody else soon bid more."""
    job_id = stoker.order(recipe={**RECIPE, "checkpoint_s": 3600}, interruptible=True)
    until(lambda: stoker.job(job_id).progress.get("training", {}).get("step"), "a step", 90.0)
    (instance,) = stoker.instances(job_id)
    settings = stoker.services.settings
    answer = requests.put(
        f"{settings.vast_url}/api/v0/instances/bid_price/{instance.id}/",
        json={"client_id": "me", "price": 0.001},
        headers={"authorization": f"Bearer {settings.vast_api_key.reveal()}"},
        timeout=10,
    )
    assert answer.json()["success"] is True
    assert stoker.ended(job_id, 180.0)["status"] == "completed"
    return str(job_id)


def _steps(stoker: Any, job_id: str) -> list[tuple[int, int]]:
    """(attempt, step) of each checkpoint, in the order that they were stored."""
    with stoker.services.store.transaction() as tx:
        events = tx.events(job_id, type="training.checkpoint", limit=10_000)
    return [(event.attempt, event.data["step"]) for event in events]


def test_the_job_went_to_another_machine(stoker: Any, moved: tuple[str, int]) -> None:
    job = stoker.job(moved[0])
    assert job.attempt == 2
    first, second = (lease.machine_id for lease in stoker.leases(moved[0]))
    assert first != second


def test_it_went_on_at_its_last_checkpoint(stoker: Any, moved: tuple[str, int]) -> None:
    job_id, killed_at = moved
    last = max(step for attempt, step in _steps(stoker, job_id) if attempt == 1)
    with stoker.services.store.transaction() as tx:
        started = [
            event
            for event in tx.events(job_id, type="training.started", limit=100)
            if event.attempt == 2
        ]
    assert started[0].data["step"] == last
    speed = stoker.job(job_id).progress["training"]["steps_per_s"]
    slack_s = 2 * CHECKPOINT_S + 1  # a checkpoint may be on its way when the machine dies
    assert killed_at - last <= speed * slack_s


def test_its_weights_are_those_of_a_run_that_nothing_happened_to(
    stoker: Any, undisturbed: str, moved: tuple[str, int]
) -> None:
    assert _weights(stoker, moved[0]) == _weights(stoker, undisturbed)


def test_being_outbid_is_held_against_nobody(stoker: Any, outbid: str) -> None:
    job = stoker.job(outbid)
    assert (job.attempt, job.interruptions, job.excluded_machines) == (2, 1, ())
    assert stoker.leases(outbid)[0].bid > 0


def test_what_was_outbid_saved_first(stoker: Any, undisturbed: str, outbid: str) -> None:
    with stoker.services.store.transaction() as tx:
        started = [item.data["step"] for item in tx.events(outbid, type="training.started")]
    saved = max(step for attempt, step in _steps(stoker, outbid) if attempt == 1)
    assert started[1] == saved, "at the very step at which it was told to go"
    assert _weights(stoker, outbid) == _weights(stoker, undisturbed)


def test_no_machine_is_left(stoker: Any, moved: tuple[str, int], outbid: str) -> None:
    stoker.given_back(moved[0])
    stoker.given_back(outbid)
