"""A host that does not answer holds a few threads of a worker, and never all of them."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from state.events import OutgoingStatus
from tasks.relay import SEND_TIMEOUT_S, TO_ALL_SLOW, TO_ONE, TO_ONE_SLOW, Answer, NoAnswer, Relay

#: As many as a worker has.
THREADS = 16
NUMBERS = itertools.count()


class Customers:
    """Hosts named `dead…` take a call and say nothing until `give_up`; all others answer."""

    def __init__(self) -> None:
        self.give_up = threading.Event()
        self.under_way: list[str] = []
        self.most: dict[str, int] = {}
        self.answered: list[str] = []
        self.revived = False
        self._lock = threading.Lock()

    def __call__(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        host = url.split("/")[2]
        with self._lock:
            self.under_way.append(host)
            self.most[host] = max(self.most.get(host, 0), self.under_way.count(host))
        try:
            if host.startswith("dead") and not self.revived:
                self.give_up.wait(30)
                raise NoAnswer("timed out")
            self.answered.append(headers["webhook-id"])
            return Answer(200, {})
        finally:
            with self._lock:
                self.under_way.remove(host)


@pytest.fixture
def customers() -> Customers:
    return Customers()


@pytest.fixture
def relay(world: Any, customers: Customers) -> Relay:
    return Relay(store=world.store, post=customers, clock=world.clock, random=random.Random(1))


def until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def jobs(world: Any, *hosts: str) -> list[str]:
    """A job for each of `hosts`, which is owed one webhook: that a GPU is looked for."""
    names = [f"{host}.{next(NUMBERS)}" for host in hosts]
    for name, host in zip(names, hosts, strict=True):
        world.add_job(name, webhook_url=f"https://{host}.example/hook")
    return names


def hang(world: Any, relay: Relay, customers: Customers, names: list[str]) -> None:
    """One relay of each of `names`, all at once; those that call wait out the time there is."""
    customers.most.clear()
    with ThreadPoolExecutor(len(names)) as pool:
        sent = [pool.submit(relay.relay, name) for name in names]
        until(lambda: sum(item.done() for item in sent) + len(customers.under_way) == len(names))
        world.clock.advance(SEND_TIMEOUT_S)
        customers.give_up.set()
    customers.give_up.clear()


def rows(world: Any, names: list[str]) -> list[Any]:
    with world.store.transaction() as tx:
        return [tx.list_outgoing(name)[0] for name in names]


def test_one_dead_endpoint_leaves_threads_for_all_others(
    world: Any, relay: Relay, customers: Customers
) -> None:
    dead, fine = jobs(world, *["dead"] * 40), jobs(world, *["fine"] * 30)
    with ThreadPoolExecutor(THREADS) as pool:
        for name in [*dead, *fine]:
            pool.submit(relay.relay, name)
        try:
            until(lambda: len(customers.answered) == len(fine))
            assert customers.under_way, "while the dead one still says nothing"
        finally:
            customers.give_up.set()


def test_sends_that_wait_for_over_a_second_let_no_more_begin(
    world: Any, relay: Relay, customers: Customers
) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for name in jobs(world, *["dead"] * TO_ONE_SLOW):
            pool.submit(relay.relay, name)
        until(lambda: len(customers.under_way) == TO_ONE_SLOW)
        world.clock.advance(1)
        (late,) = jobs(world, "dead")
        assert relay.relay(late) == 0
        customers.give_up.set()
    assert rows(world, [late])[0].tries == 0


def test_a_slow_host_gets_few_threads_and_to_be_put_off_is_no_try(
    world: Any, relay: Relay, customers: Customers
) -> None:
    hang(world, relay, customers, jobs(world, "dead"))
    later = jobs(world, *["dead"] * 10)
    hang(world, relay, customers, later)
    assert customers.most == {"dead.example": TO_ONE_SLOW}
    put_off = [row for row in rows(world, later) if row.tries == 0]
    assert len(put_off) == len(later) - TO_ONE_SLOW
    assert all(
        row.status is OutgoingStatus.WAITING and row.due_at > row.created_at for row in put_off
    )


def test_many_slow_hosts_together_get_less_than_half_of_the_threads(
    world: Any, relay: Relay, customers: Customers
) -> None:
    hosts = [f"dead{number}" for number in range(12)]
    hang(world, relay, customers, jobs(world, *hosts))
    hang(world, relay, customers, jobs(world, *hosts, *hosts))
    assert sum(customers.most.values()) <= TO_ALL_SLOW < THREADS / 2


def test_a_host_that_answers_again_has_all_its_threads_back(
    world: Any, relay: Relay, customers: Customers
) -> None:
    hang(world, relay, customers, jobs(world, "dead"))
    world.clock.advance(10)
    customers.revived = True
    for name in jobs(world, *["dead"] * 5):
        assert relay.relay(name) == 1
    customers.revived = False
    hang(world, relay, customers, jobs(world, *["dead"] * THREADS))
    assert customers.most == {"dead.example": TO_ONE}
