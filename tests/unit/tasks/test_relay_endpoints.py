"""Several places are told of one job: each in its own order, none waits for another."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from gpu_agent import wire
from gpu_agent.wire import Fact
from state import record
from state.endpoints import LISTEN, TYPES, Endpoint, sample
from state.events import OutgoingStatus, Secret
from tasks.reconcile import reconcile
from tasks.relay import GONE, SCHEDULE_S, Answer, EndpointRefused, NoAnswer, Relay

OLD, NEW = (Secret("whsec_" + letter * 44) for letter in "AB")


class Places:
    """Customers' servers by host; each answers as told, else 200."""

    def __init__(self) -> None:
        self.got: dict[str, list[str]] = {}
        self.answers: dict[str, Any] = {}
        self.last: tuple[bytes, dict[str, str]] = b"", {}

    def __call__(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        host = url.split("/")[2]
        self.got.setdefault(host, []).append(headers["webhook-id"])
        self.last = body, dict(headers)
        answer = self.answers.get(host, 200)
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer, {})


@pytest.fixture
def places() -> Places:
    return Places()


@pytest.fixture
def relay(world: Any, places: Places) -> Relay:
    return Relay(store=world.store, post=places, clock=world.clock, random=random.Random(1))


def add(world: Any, name: str, **given: Any) -> Endpoint:
    url = f"https://{name}.example/hook"
    made = Endpoint(
        **{"id": f"we_{name}", "owner": "o", "created_at": world.clock(), "url": url} | given
    )
    with world.store.transaction() as tx:
        tx.add_endpoint(made, secrets=[OLD, NEW])
    return made


def run(world: Any, relay: Relay) -> None:
    """What the reconcile pass wakes, in the order in which it wakes it."""
    woken: list[str] = []
    reconcile(
        world.store, lambda task, ids: woken.extend(ids if task == "relay" else []), world.clock()
    )
    for queue in woken:
        relay.relay(queue)


def statuses(world: Any, job: str = "job_1") -> dict[str, list[OutgoingStatus]]:
    found: dict[str, list[OutgoingStatus]] = {}
    with world.store.transaction() as tx:
        for row in tx.list_outgoing(job):
            found.setdefault(row.endpoint, []).append(row.status)
    return found


def test_a_dead_endpoint_delays_no_other_and_each_has_its_own_order(
    world: Any, relay: Relay, places: Places
) -> None:
    add(world, "dead")
    add(world, "well")
    world.add_job()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY):
        world.report(fact)
    places.answers["dead.example"] = NoAnswer("timed out")
    run(world, relay)
    assert places.got["dead.example"] == ["job_1.1.we_dead"]
    assert places.got["well.example"] == [f"job_1.{n}.we_well" for n in (1, 2, 3)]
    assert places.got["example.com"] == [f"job_1.{n}" for n in (1, 2, 3)]
    del places.answers["dead.example"]
    world.clock.advance(6)
    run(world, relay)
    assert places.got["dead.example"] == [f"job_1.{n}.we_dead" for n in (1, 1, 2, 3)]
    assert len(places.got["well.example"]) == 3


def test_a_job_without_a_webhook_of_its_own_is_told_at_the_endpoints(
    world: Any, relay: Relay, places: Places
) -> None:
    add(world, "all")
    add(world, "picky", events=("job.pending_images",))
    add(world, "off", disabled_at=world.clock(), disabled_why="by hand")
    add(world, "other", owner="somebody else")
    world.add_job(webhook_url=None)
    world.report(Fact.GPU_READY)
    run(world, relay)
    assert places.got == {
        "all.example": ["job_1.1.we_all", "job_1.2.we_all"],
        "picky.example": ["job_1.2.we_picky"],
    }


@pytest.mark.parametrize(
    ("answer", "why"),
    [(410, GONE), (EndpointRefused("its address is private"), "its address is private")],
)
def test_what_must_not_be_called_again_is_closed(
    world: Any, relay: Relay, places: Places, answer: Any, why: str
) -> None:
    """Once, however many jobs wait for it; and the others go on."""
    add(world, "gone")
    add(world, "well")
    for name in ("job_1", "job_2"):
        world.add_job(name)
    places.answers["gone.example"] = answer
    run(world, relay)
    with world.store.transaction() as tx:
        closed = tx.endpoint("we_gone")
    assert (closed.disabled_at, closed.disabled_why) == (world.clock(), why)
    assert len(places.got["gone.example"]) == 1
    assert len(places.got["well.example"]) == 2
    world.report(Fact.GPU_READY)
    assert statuses(world)["we_gone"] == [OutgoingStatus.DISABLED]
    assert len(statuses(world)["we_well"]) == 2


def test_an_endpoint_that_never_answers_is_given_up_and_the_next_webhook_goes(
    world: Any, relay: Relay, places: Places
) -> None:
    add(world, "dead")
    world.add_job(webhook_url=None)
    world.report(Fact.GPU_READY)
    places.answers["dead.example"] = 500
    for pause in (0, *SCHEDULE_S):
        world.clock.advance(pause * 1.11)
        relay.relay("job_1/we_dead")
    assert statuses(world)["we_dead"] == [OutgoingStatus.EXHAUSTED, OutgoingStatus.WAITING]
    with world.store.transaction() as tx:
        assert tx.outgoing("job_1.1.we_dead").ended_at == world.clock()
        assert tx.endpoint("we_dead").disabled_at is None
    del places.answers["dead.example"]
    run(world, relay)
    assert places.got["dead.example"][len(SCHEDULE_S) + 1] == "job_1.2.we_dead"


@pytest.mark.parametrize(("later", "good"), [(59, (True, True)), (60, (False, True))])
def test_both_secrets_sign_until_the_rotation_is_over(
    world: Any, relay: Relay, places: Places, later: float, good: tuple[bool, bool]
) -> None:
    """Verified by the reference library as well as by ours."""
    until = world.clock.now + timedelta(seconds=60)
    add(world, "turning", old_secret_until=until)
    world.add_job(webhook_url=None)
    world.clock.advance(later)
    run(world, relay)
    body, headers = places.last
    at = world.clock()
    wanted = [
        Webhook(key.reveal()).sign(headers["webhook-id"], at, body.decode()) for key in (OLD, NEW)
    ]
    offered = headers["webhook-signature"].split(" ")
    assert tuple(signature in offered for signature in wanted) == good
    for key, holds in zip((OLD, NEW), good, strict=True):
        try:
            wire.verify(body, headers, secrets=[key.reveal()], now=at.timestamp())
        except wire.SignatureError:
            assert not holds


def test_what_a_deleted_endpoint_was_owed_ends(world: Any, relay: Relay, places: Places) -> None:
    add(world, "gone")
    world.add_job(webhook_url=None)
    world.report(Fact.GPU_READY)
    with world.store.transaction() as tx:
        tx.delete_endpoint("we_gone")
    run(world, relay)
    assert places.got == {}
    assert statuses(world)["we_gone"] == [OutgoingStatus.DISABLED] * 2


def test_what_no_listener_fetched_ends_after_its_time(
    world: Any, relay: Relay, places: Places
) -> None:
    add(world, "laptop", url="")
    world.add_job(webhook_url=None)
    run(world, relay)
    assert statuses(world)["we_laptop"] == [OutgoingStatus.WAITING]
    world.clock.advance(LISTEN.total_seconds())
    run(world, relay)
    assert (places.got, statuses(world)["we_laptop"]) == ({}, [OutgoingStatus.DISABLED])


def test_a_message_for_a_job_sends_one_queue_and_hands_on_the_others(
    world: Any, relay: Relay, places: Places
) -> None:
    """What comes of a report names the job alone."""
    add(world, "one")
    add(world, "two")
    world.add_job()
    handed: list[tuple[str, list[str]]] = []
    wake = lambda task, ids: handed.append((task, list(ids)))  # noqa: E731 -- a stand-in
    assert relay.relay_all("job_1", wake) == 1
    assert handed == [("relay", ["job_1/we_one"]), ("relay", ["job_1/we_two"])]
    assert places.got == {"example.com": ["job_1.1"]}
    for _, (queue,) in list(handed):
        assert relay.relay_all(queue, wake) == 1
    assert len(handed) == 2
    assert relay.relay_all("job_1", wake) == 0


def test_samples_say_what_a_real_life_says(world: Any) -> None:
    """The documentation shows samples, and developers build on them."""
    place = add(world, "all")
    world.add_job()
    world.tick()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    world.report(Fact.TRAINING_STARTED)
    world.report(Fact.TRAINING_PROGRESS, {"step": 30, "total": 100, "loss": 0.1})
    world.report(Fact.TRAINING_SAMPLE, {"step": 30, "name": "sample-30-0.png"})
    world.report(Fact.ERROR, {"code": "training.oom", "message": "out of memory"})
    with world.store.transaction() as tx:
        record.retry(tx, "job_1", world.clock())
        record.cancel(tx, "job_1", world.clock())
    for retryable, job in ((False, "job_2"), (True, "job_3")):
        world.add_job(job)
        world.tick()
        if not retryable:
            world.report(Fact.ERROR, {"code": "x", "message": "y", "retryable": False}, job=job)
            continue
        for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
            world.report(fact, job=job)
        world.report(Fact.TRAINING_COMPLETED, job=job)
        world.report(Fact.WEIGHTS_UPLOADED, {"files": []}, job=job)
        with world.store.transaction() as tx:
            record.verified(tx, job, 1, world.clock())
    told: dict[str, dict[str, Any]] = {}
    with world.store.transaction() as tx:
        for job in ("job_1", "job_2", "job_3"):
            told |= {row.type: dict(row.payload["data"]) for row in tx.list_outgoing(job)}
    assert {*told, "webhook.test"} == set(TYPES)
    for kind, real in told.items():
        shown = sample(kind, place, 7, "2026-01-01T00:00:00.000Z")["data"]
        assert set(shown) == set(real), kind
        said = ("status", "to", "cause")
        assert [shown.get(key) for key in said] == [real.get(key) for key in said], kind
