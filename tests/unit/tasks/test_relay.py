"""Webhooks out: at least once, in order, signed anew for each try, and never for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gpu_agent import wire
from gpu_agent.wire import Fact
from state.events import OutgoingStatus
from tasks.relay import SCHEDULE_S, Answer, EndpointRefused, NoAnswer, Relay

SECRET = "whsec_" + "A" * 44


class Endpoint:
    """A customer's endpoint that answers as told."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.got, self.answers = clock, [], []

    def __call__(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        wire.verify(body, headers, secrets=[SECRET], now=self.clock().timestamp())
        self.got.append(headers["webhook-id"])
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Answer) else Answer(answer, {})


@pytest.fixture
def endpoint(clock: Any) -> Endpoint:
    return Endpoint(clock)


@pytest.fixture
def relay(world: Any, endpoint: Endpoint) -> Relay:
    world.add_job()
    return Relay(store=world.store, post=endpoint, clock=world.clock, random=random.Random(1))


def row(world: Any, number: int = 0) -> Any:
    with world.store.transaction() as tx:
        return tx.list_outgoing("job_1")[number]


def test_transitions_arrive_in_order(world: Any, relay: Relay, endpoint: Endpoint) -> None:
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    assert relay.relay("job_1") == 4
    assert endpoint.got == [f"job_1.{number}" for number in range(1, 5)]
    assert relay.relay("job_1") == 0


def test_a_failed_webhook_holds_back_its_jobs_next_ones(
    world: Any, relay: Relay, endpoint: Endpoint
) -> None:
    world.report(Fact.GPU_READY)
    endpoint.answers = [500]
    relay.relay("job_1")
    assert endpoint.got == ["job_1.1"]
    world.clock.advance(6)
    relay.relay("job_1")
    assert endpoint.got == ["job_1.1", "job_1.1", "job_1.2"]


def test_the_schedule_is_kept_and_then_given_up(
    world: Any, relay: Relay, endpoint: Endpoint
) -> None:
    endpoint.answers = [NoAnswer("timeout")] * 20
    for pause in (0, *SCHEDULE_S):
        world.clock.advance(pause * 1.11)
        relay.relay("job_1")
    assert len(endpoint.got) == len(SCHEDULE_S) + 1
    assert row(world).status is OutgoingStatus.EXHAUSTED


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (410, OutgoingStatus.DISABLED),
        (EndpointRefused("10.0.0.1 is a private address"), OutgoingStatus.DISABLED),
        (302, OutgoingStatus.WAITING),
        (204, OutgoingStatus.DELIVERED),
        (NoAnswer("connection refused"), OutgoingStatus.WAITING),
    ],
)
def test_what_each_answer_means(
    world: Any, relay: Relay, endpoint: Endpoint, answer: Any, status: OutgoingStatus
) -> None:
    endpoint.answers = [answer]
    relay.relay("job_1")
    assert row(world).status is status


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("120", 120), ("Sun, 22 Nov 2026 12:10:00 GMT", 600), ("soon", 4.5), ("-5", 4.5), ("", 4.5)],
)
def test_retry_after_is_obeyed_when_it_can_be_read(
    world: Any, relay: Relay, endpoint: Endpoint, text: str, seconds: float
) -> None:
    endpoint.answers = [Answer(429, {"retry-after": text})]
    relay.relay("job_1")
    waited = (row(world).due_at - world.clock()).total_seconds()
    assert seconds <= waited <= seconds * 1.3


def test_two_relays_at_once_send_a_row_once(world: Any, relay: Relay, endpoint: Endpoint) -> None:
    class Nested(Endpoint):
        def __call__(self, *args: Any, **named: Any) -> Answer:
            relay.relay("job_1")
            return endpoint(*args, **named)

    outer = Relay(
        store=world.store, post=Nested(world.clock), clock=world.clock, random=random.Random(1)
    )
    outer.relay("job_1")
    assert endpoint.got == ["job_1.1"]


def test_a_relay_that_died_is_followed_by_another(
    world: Any, relay: Relay, endpoint: Endpoint
) -> None:
    class Died(BaseException):
        pass

    def die(*args: Any, **named: Any) -> Answer:
        raise Died

    dying = Relay(store=world.store, post=die, clock=world.clock, random=random.Random(1))
    with pytest.raises(Died):
        dying.relay("job_1")
    assert relay.relay("job_1") == 0
    world.clock.advance(61)
    assert relay.relay("job_1") == 1


def test_each_try_is_in_the_delivery_log(world: Any, relay: Relay, endpoint: Endpoint) -> None:
    endpoint.answers = [503, NoAnswer("timeout")]
    for _ in range(3):
        relay.relay("job_1")
        world.clock.advance(400)
    with world.store.transaction() as tx:
        log = tx.deliveries("job_1")
    assert [item.answer for item in log] == [200, 0, 503]
    assert log[1].error == "timeout"


def test_a_job_without_a_webhook_owes_nothing(world: Any, endpoint: Endpoint) -> None:
    world.add_job("job_2", webhook_url=None)
    relay = Relay(store=world.store, post=endpoint, clock=world.clock, random=random.Random(1))
    assert relay.relay("job_2") == 0
