"""SIGKILL for every process of ours, in every state that a job passes: it completes all the same,
on the one machine that was rented for it, and the customer hears of each step in order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gpu_agent.wire import Fact
from state import policy
from state.job import Job, Status

pytestmark = pytest.mark.slow

Moment = Callable[[Job], bool]


@dataclass(frozen=True)
class Kill:
    """Who is killed, when, and within how many seconds after that."""

    victim: str
    when: str
    moment: Moment
    within_s: float


def _trained(steps: int) -> Moment:
    return lambda job: job.progress.get("training", {}).get("step", 0) >= steps


def _rented(job: Job) -> bool:
    return job.status is not Status.PENDING


def _uploads(job: Job) -> bool:
    return "result" in job.progress


def _verifies(job: Job) -> bool:
    return policy.to_verify(job) or job.terminal


PLAN = (
    Kill("worker", "while a GPU is rented", _rented, 0.3),
    Kill("beat", "on the way to the images", _rented, 1.0),
    Kill("web", "while the machine wants its job and its files", _rented, 3.0),
    Kill("worker", "in training", lambda job: job.status is Status.TRAINING, 3.0),
    Kill("web", "while progress is reported", _trained(20), 2.0),
    Kill("postgresql", "while progress is reported", _trained(30), 2.0),
    Kill("redis", "in training", _trained(50), 2.0),
    Kill("beat", "in training", _trained(60), 2.0),
    Kill("web", "while weights are uploaded", _uploads, 0.3),
    Kill("s3", "while weights are uploaded", _uploads, 0.3),
    Kill("worker", "while weights are verified", _verifies, 0.02),
)


@dataclass
class Survivor:
    """A job that went through all the kills."""

    id: str
    job: dict[str, Any] = field(default_factory=dict)
    machines: set[str] = field(default_factory=set)
    webhooks: list[dict[str, Any]] = field(default_factory=list)
    in_order: bool = False
    forged: int = 0
    killed: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture(scope="module")
def dice() -> random.Random:
    """Printed, so that a failure can be thrown again."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")  # noqa: T201 -- pytest shows it with a failure
    return random.Random(seed)


@pytest.fixture(scope="module")
def survivor(
    stoker: Any, new_customer: Any, dice: random.Random, until: Callable[..., Any]
) -> Iterator[Survivor]:
    before = stoker.machines_ever()
    with new_customer() as customer:
        live = Survivor(stoker.order(customer))
        for kill in PLAN:
            until(lambda kill=kill: kill.moment(stoker.job(live.id)), kill.when, 120.0)
            at = time.monotonic() + dice.uniform(0, kill.within_s)
            until(lambda at=at: time.monotonic() >= at, "the moment")
            print(f"{kill.victim} is killed {kill.when}")  # noqa: T201 -- likewise
            if pid := stoker.kill(kill.victim):
                live.killed.append((kill.victim, pid))
        live.job = stoker.ended(live.id, 240.0)
        stoker.given_back(live.id)
        until(lambda: customer.has(f"job.{live.job['status']}"), "the last webhook", 120.0)
        live.machines = stoker.machines_ever() - before
        live.webhooks, live.in_order, live.forged = (
            customer.got,
            customer.in_order,
            customer.refused,
        )
        yield live


def test_the_job_completes_in_its_first_attempt(survivor: Survivor) -> None:
    job = survivor.job
    assert job["status"] == "completed", job["reason"]
    assert job["attempt"] == 1
    assert [step["target"] for step in job["transitions"]] == [
        "pendingGpu", "pendingImages", "pendingModel", "training", "completed",
    ]  # fmt: skip
    assert any(item["name"] == "lora.safetensors" for item in job["result_files"])


def test_exactly_one_machine_is_ever_rented(stoker: Any, survivor: Survivor) -> None:
    assert len(survivor.machines) == 1
    rented = [lease for lease in stoker.leases(survivor.id) if lease.rented_at is not None]
    assert {lease.instance_id for lease in rented} == survivor.machines


def test_the_customer_hears_every_step_once_in_order_and_signed(survivor: Survivor) -> None:
    assert survivor.forged == 0
    assert survivor.in_order
    kinds = [item["type"] for item in survivor.webhooks]
    assert [kind for kind in kinds if kind not in ("job.progress", "job.sample")] == [
        "job.pending_gpu", "job.pending_images", "job.pending_model", "job.training",
        "job.completed",
    ]  # fmt: skip


def test_every_report_of_the_agent_counts_once(stoker: Any, survivor: Survivor) -> None:
    with stoker.services.store.transaction() as tx:
        events = tx.events(survivor.id, limit=10_000)
    seqs = [event.agent_seq for event in events if event.agent_seq is not None]
    assert seqs == sorted(set(seqs))
    kinds = [event.type for event in events]
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.WEIGHTS_UPLOADED):
        assert kinds.count(fact) == 1
    progress = [event.data for event in events if event.type == Fact.TRAINING_PROGRESS]
    steps = [data["step"] for data in progress if "step" in data]
    assert steps == sorted(steps), "the training went on, and did not begin anew"


def test_everybody_who_was_killed_runs_again(
    stoker: Any, survivor: Survivor, until: Callable[..., Any]
) -> None:
    assert {name for name, _ in survivor.killed} == {kill.victim for kill in PLAN}
    for name, pid in survivor.killed:
        until(lambda name=name, pid=pid: stoker.pids().get(name) not in (None, pid), name)


def test_nobody_who_was_killed_leaves_orphans(
    stoker: Any, survivor: Survivor, until: Callable[..., Any]
) -> None:
    """A web server that is killed has processes of its own: they must not go on serving."""
    until(lambda: not stoker.orphans(), "only the supervisor's processes run", 30.0)


def test_a_job_that_is_cancelled_while_no_worker_lives_is_told_of_later(
    stoker: Any, customer: Any, until: Callable[..., Any]
) -> None:
    job_id = stoker.order(customer, gpu={"gpu_names": ["NONE"]})
    until(lambda: customer.has("job.pending_gpu"), "the first webhook")
    stoker.kill("worker")
    stoker.client.post(f"/v1/jobs/{job_id}/cancel")

    until(lambda: customer.has("job.cancelled"), "the last webhook", 120.0)

    assert [item["type"] for item in customer.got] == ["job.pending_gpu", "job.cancelled"]
    assert customer.in_order
    assert customer.refused == 0
