"""Sweeps and clean-ups come by the database's account of them."""

from __future__ import annotations

from typing import Any

from state.memory import MemoryStore
from tasks import rounds
from tasks.schedule import BEAT


def test_a_new_installation_makes_every_round_at_once_and_each_again_in_its_time(
    clock: Any,
) -> None:
    store, made = MemoryStore(), []
    for second in range(3_700):
        made += [(second, name) for name in rounds.due(store, clock())]
        clock.advance(1)
    assert [second for second, name in made if name == "sweep"] == list(range(0, 3_700, 30))
    assert [second for second, name in made if name == "cleanup"] == [0, 3_600]


def test_two_who_ask_at_once_do_not_both_make_it(clock: Any) -> None:
    store = MemoryStore()
    assert rounds.due(store, clock())
    assert rounds.due(store, clock()) == []


def test_beat_itself_times_nothing_that_a_restart_could_put_off() -> None:
    """It starts to count anew whenever it starts, so what it times comes each second."""
    assert [entry["schedule"] for entry in BEAT.values()] == [1.0]


def test_a_sweep_that_is_asked_for_comes_soon_and_never_on_the_heels_of_another(
    clock: Any,
) -> None:
    store, made, began = MemoryStore(), [], clock()
    assert rounds.hasten(store, "sweep", began) == began  # the first is due anyhow
    for second in range(100):
        if second in (3, 4, 15, 16):
            rounds.hasten(store, "sweep", clock())
        made += [second for name in rounds.due(store, clock()) if name == "sweep"]
        clock.advance(1)
    assert made == [0, 10, 20, 50, 80]
