"""SIGKILL for worker, web and beat, in every state that a job passes: it completes all the same,
on the one machine that was rented for it, and the customer hears of each step in order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gpu_agent.wire import Fact
from state import policy
from state.job import Job, Status

#: Who is killed, when, and within how many seconds after that.
Moment = Callable[[Job], bool]


@dataclass(frozen=True)
class Kill:
    victim: str
    when: str
    moment: Moment
    within_s: float


def _trains_since(step: int) -> Moment:
    return lambda job: job.progress.get("training", {}).get("step", 0) >= step


PLAN = (
    Kill("worker", "while a GPU is looked for", lambda job: job.status is Status.PENDING_GPU, 0.3),
    Kill("beat", "on the way to the images", lambda job: job.status is not Status.PENDING, 1.0),
    Kill(
        "web",
        "while the machine wants its job and its files",
        lambda job: job.status is not Status.PENDING,
        3.0,
    ),
    Kill("worker", "in training", lambda job: job.status is Status.TRAINING, 3.0),
    Kill("web", "while progress is reported", _trains_since(30), 2.0),
    Kill("beat", "in training", _trains_since(50), 2.0),
    Kill(
        "web",
        "while weights are uploaded",
        lambda job: job.status is Status.TRAINING and "result" in job.progress,
        0.3,
    ),
    Kill(
        "worker",
        "while weights are verified",
        lambda job: policy.to_verify(job) or job.terminal,
        0.05,
    ),
)


@pytest.fixture
def dice() -> random.Random:
    """Printed, so that a failure can be thrown again."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")  # noqa: T201 -- pytest shows it with a failure
    return random.Random(seed)


def test_a_job_survives_every_kill_on_its_one_machine(
    stoker: Any, customer: Any, dice: random.Random, until: Callable[..., Any]
) -> None:
    job_id = stoker.order(customer)
    most_alive = 0
    restarts: list[tuple[str, int]] = []

    for kill in PLAN:
        until(lambda kill=kill: kill.moment(stoker.job(job_id)), kill.when, 120.0)
        at = time.monotonic() + dice.uniform(0, kill.within_s)
        until(lambda at=at: time.monotonic() >= at, "the moment")
        most_alive = max(most_alive, len(stoker.instances(job_id)))
        print(f"{kill.victim} is killed {kill.when}")  # noqa: T201 -- likewise
        if pid := stoker.pids().get(kill.victim):
            restarts.append((kill.victim, pid))
        stoker.kill(kill.victim)

    job = stoker.ended(job_id, 240.0)

    assert job["status"] == "completed", job["reason"]
    assert job["attempt"] == 1
    assert [step["target"] for step in job["transitions"]] == [
        "pendingGpu", "pendingImages", "pendingModel", "training", "completed",
    ]  # fmt: skip
    assert any(item["name"] == "lora.safetensors" for item in job["result_files"])
    stoker.given_back(job_id)
    rented = [lease for lease in stoker.leases(job_id) if lease.rented_at is not None]
    assert len(rented) == 1
    assert most_alive <= 1
    for name, pid in restarts:
        assert stoker.pids()[name] != pid, f"{name} was started again"


def test_the_customer_hears_every_step_once_in_order_and_signed(
    stoker: Any, customer: Any, until: Callable[..., Any]
) -> None:
    """A worker that is killed while it sends leaves the rest to the next one."""
    job_id = stoker.order(customer, gpu={"gpu_names": ["NONE"]})
    until(lambda: customer.has("job.pending_gpu"), "the first webhook")
    stoker.kill("worker")
    stoker.client.post(f"/v1/jobs/{job_id}/cancel")

    until(lambda: customer.has("job.cancelled"), "the last webhook", 120.0)

    assert [item["type"] for item in customer.got] == ["job.pending_gpu", "job.cancelled"]
    assert customer.in_order
    assert customer.refused == 0


def test_agents_reports_are_counted_once_each(stoker: Any) -> None:
    """Of the job that went through all the kills: no report is missing, none is there twice."""
    jobs = [job for job in stoker.client.pages("/v1/jobs") if job["status"] == "completed"]
    if not jobs:
        pytest.skip("no job was completed in this run")
    with stoker.services.store.transaction() as tx:
        events = tx.events(jobs[0]["id"], limit=10_000)
    seqs = [event.agent_seq for event in events if event.agent_seq is not None]
    assert seqs == sorted(set(seqs))
    kinds = [event.type for event in events]
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.WEIGHTS_UPLOADED):
        assert kinds.count(fact) == 1
