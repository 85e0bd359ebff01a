"""How Vast's records are read, and how calls to it are spaced."""

from __future__ import annotations

from typing import Any

import pytest

from infra.vast import VastProvider, phase
from state.errors import Refused, Throttled, Unreadable
from state.events import Secret


def row(actual: Any, intended: Any, current: Any, following: Any, message: str = "") -> dict:
    return {
        "actual_status": actual,
        "intended_status": intended,
        "cur_state": current,
        "next_state": following,
        "status_msg": message,
    }


R, S = "running", "stopped"
CDI = "Error response from daemon: failed to create task: OCI runtime create failed"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (row(None, R, R, R), "starting"),
        (row("", R, R, R), "starting"),
        (row("created", R, R, R), "starting"),
        (row("loading", R, R, R, "0d30c18b26f8: Downloading"), "starting"),
        (row("loading", R, "loading", R), "starting"),
        (row("rebooting", R, R, R), "starting"),
        (row("recycling", R, R, R), "starting"),
        (row("running", R, R, R, "success, running x/ssh"), "running"),
        (row("running", S, R, S), "running"),
        (row("running", S, S, S), "ended"),
        (row("created", S, S, S, CDI), "ended"),
        (row("created", S, R, R, CDI), "ended"),
        (row("created", S, S, S, "Successfully loaded x"), "ended"),
        (row("loading", S, S, S), "ended"),
        (row(None, S, S, S), "ended"),
        (row(None, None, "unloaded", None), "ended"),
        (row("exited", R, R, R), "ended"),
        (row("exited", S, S, S), "ended"),
        (row("stopped", R, S, R), "ended"),
        (row("frozen", "frozen", R, R), "ended"),
        (row("unknown", R, R, R), "lost"),
        (row("offline", R, R, R), "lost"),
        (row("a new word", R, R, R), "lost"),
        (row(None, None, None, None), "lost"),
        (row({"odd": 1}, 5, [], True), "lost"),
        ({}, "lost"),
    ],
)
def test_the_whole_tuple_of_states_is_read(record: dict[str, Any], wanted: str) -> None:
    assert phase(record) == wanted


class Time:
    """A monotonic clock that only a sleep moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def vast(time: Time) -> VastProvider:
    """A provider whose server cannot be reached: calls fail at once, after their turn came."""
    return VastProvider("key", "http://127.0.0.1:9", timeout=10, clock=time, sleep=time.sleep)


def test_calls_to_one_endpoint_keep_the_documented_distance(vast: VastProvider, time: Time) -> None:
    for _ in range(3):
        with pytest.raises(Refused):
            vast.destroy("5")
    assert time.slept == [3.0, 3.0]


def test_endpoints_do_not_wait_for_each_other(vast: VastProvider, time: Time) -> None:
    with pytest.raises(Refused):
        vast.destroy("5")
    with pytest.raises(Unreadable):
        vast.account()
    assert time.slept == []


def test_a_turn_that_comes_too_late_is_throttled_without_a_call(time: Time) -> None:
    vast = VastProvider("key", "http://127.0.0.1:9", timeout=2, clock=time, sleep=time.sleep)
    with pytest.raises(Refused):
        vast.destroy("5")
    with pytest.raises(Throttled) as caught:
        vast.destroy("6")
    assert caught.value.retry_after == 3.0
    assert time.slept == []


def test_the_key_is_in_no_representation() -> None:
    assert "the-key" not in repr(VastProvider(Secret("the-key"), "http://127.0.0.1:9"))
