"""What is done again and again, due by the database: the clock of a process that is started anew
more often than a round comes would never let it come."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from state.brakes import Beats
from state.store import Store

#: How often each comes.
EVERY: Mapping[str, timedelta] = {
    "sweep": timedelta(seconds=30),
    "measure": timedelta(minutes=5),
    "cleanup": timedelta(hours=1),
}


#: A round that somebody asked for comes no sooner after the one before.
APART = timedelta(seconds=10)


def due(store: Store, now: datetime) -> list[str]:
    """The rounds to make now. Each is told to one caller; were its message lost, it comes again
    after its span."""
    with store.transaction() as tx:
        tx.lock("rounds")
        beats = tx.beats()
        found = [name for name in EVERY if _next(beats, name, now) <= now]
        for name in found:
            tx.beat(f"{name}.asked", now)
    return found


def hasten(store: Store, name: str, now: datetime) -> datetime:
    """Ask for the round `name`; when it is due. A worker's next pass finds it."""
    with store.transaction() as tx:
        tx.lock("rounds")
        tx.beat(f"{name}.wanted", now)
        return max(now, _next(tx.beats(), name, now))


def _next(beats: Beats, name: str, now: datetime) -> datetime:
    if f"{name}.asked" not in beats:
        return now
    last, span = beats[f"{name}.asked"][0], EVERY[name]
    wanted = f"{name}.wanted" in beats and beats[f"{name}.wanted"][0] > last
    return last + (APART if wanted else span)
