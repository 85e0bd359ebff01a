"""A machine that nobody may be looking after gives itself back."""

from __future__ import annotations

import time

import pytest

from gpu_agent.clock import Clock
from gpu_agent.deadman import DeadMan, Instance, Promise


class Time:
    """Time that only moves when somebody sleeps."""

    def __init__(self):
        self.now = 1_000.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def switch(stoker):
    """A dead man's switch, its time, and what it told."""
    clock, told = Time(), []
    made = DeadMan(
        Instance(id="77", api_key=stoker.container["CONTAINER_API_KEY"], market_url=stoker.url),
        clock=Clock(wall=clock, monotonic=clock),
        on_end=told.append,
        sleep=clock.sleep,
    )
    made.limit(lease_ends_at=5_000.0, silence_limit_s=900.0)
    made.time, made.told = clock, told
    return made


def test_nothing_is_due_while_the_server_answers(switch):
    for _ in range(40):
        switch.time.now += 99
        switch.heard()
        assert switch.due() is None


def test_the_leases_end_is_absolute(switch):
    switch.time.now = 4_999.0
    switch.heard()
    assert switch.due() is None
    switch.time.now = 5_000.0
    switch.heard()
    assert switch.due() == "lease"


def test_silence_is_counted_from_the_last_answer(switch):
    switch.time.now = 1_500.0
    switch.heard()
    switch.time.now = 2_399.0
    assert switch.due() is None
    switch.time.now = 2_400.0
    assert switch.due() == "silence"


def test_before_the_job_is_known_silence_alone_counts():
    clock = Time()
    switch = DeadMan(None, clock=Clock(wall=clock, monotonic=clock), on_end=print)
    clock.now += 899
    assert switch.due() is None
    clock.now += 1
    assert switch.due() == "silence"


def test_a_passed_limit_stops_the_trainer_and_destroys_the_instance(stoker, switch):
    switch.start()
    assert stoker.destroyed.wait(20)
    assert switch.told == ["silence"]


def test_destroying_is_repeated_with_growing_patience(stoker, switch, faults):
    stoker.faults["destroy"] += [500, "cut", 429, 302, 503]
    stoker.faults["destroy"] += [
        faults.send(b"<html>maintenance</html>"),
        faults.send(b'{"success": false, "msg": "try later"}'),
        faults.send(b""),
    ]
    assert switch.destroy()
    assert stoker.destroyed.is_set()
    assert switch.time.slept == [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0, 60.0]


def test_an_answer_that_is_lost_is_asked_for_again(stoker, switch):
    stoker.faults["destroy"] += ["lost"]
    assert switch.destroy()


@pytest.mark.parametrize("status", [404, 410])
def test_an_instance_that_is_gone_is_destroyed(stoker, switch, status):
    stoker.faults["destroy"] += [status]
    assert switch.destroy()
    assert switch.time.slept == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_not_destroy_stops_the_instance_instead(stoker, switch, status):
    stoker.always["destroy"] = status
    assert switch.destroy()
    assert stoker.stopped.is_set()


def test_stopping_is_repeated_as_well(stoker, switch, faults):
    stoker.always["destroy"] = 403
    stoker.faults["stop"] += [503, faults.send(b'{"success": false}'), "cut"]
    assert switch.destroy()
    assert stoker.stopped.is_set()


def test_a_destroyed_instance_is_not_destroyed_again(stoker, switch):
    assert switch.destroy()
    assert switch.destroy()
    assert len(stoker.requests) == 1


def test_the_start_script_is_told_how_long_to_wait_whatever_clocks_say(tmp_path):
    promise = Promise(tmp_path / "due")
    promise.renew(960.4)
    assert (tmp_path / "due").read_text().split() == ["1", "960"]
    promise.renew(-3.0)
    assert (tmp_path / "due").read_text().split() == ["2", "0"]


def test_without_a_market_there_is_nothing_to_destroy():
    switch = DeadMan(None, clock=Clock(), on_end=print)
    assert not switch.destroy()


def test_the_key_is_in_no_repr():
    instance = Instance(id="77", api_key="key-canary", market_url="https://market")
    assert "canary" not in repr(instance)


def test_a_silent_server_ends_a_running_job(stoker, start, until):
    stoker.spec["silence_limit_s"] = 1.0
    agent = start("say('started'); time.sleep(600)")
    until(lambda: stoker.has("training.started"))
    stoker.always["report"] = 503
    assert agent.join() == 1
    assert stoker.destroyed.is_set()


def test_the_end_of_the_lease_ends_a_running_job(stoker, start, until):
    stoker.spec["lease_ends_at"] = time.time() + 2.5
    agent = start("say('started'); time.sleep(600)")
    assert agent.join() == 1
    assert stoker.destroyed.is_set()
    assert not stoker.has("error")
