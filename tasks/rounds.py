"""What is done again and again, due by the database: the clock of a process that is started anew
more often than a round comes would never let it come."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from state.store import Store

#: How often each comes.
EVERY: Mapping[str, timedelta] = {
    "sweep": timedelta(seconds=30),
    "measure": timedelta(minutes=5),
    "cleanup": timedelta(hours=1),
}


def due(store: Store, now: datetime) -> list[str]:
    """The rounds to make now. Each is told to one caller; were its message lost, it comes again
    after its span."""
    with store.transaction() as tx:
        tx.lock("rounds")
        beats = tx.beats()
        asked = {name: beats[f"{name}.asked"][0] for name in EVERY if f"{name}.asked" in beats}
        found = [
            name for name, span in EVERY.items() if name not in asked or now - asked[name] >= span
        ]
        for name in found:
            tx.beat(f"{name}.asked", now)
    return found


#: A round that somebody asked for comes no sooner after the one before.
APART = timedelta(seconds=10)


def hasten(store: Store, name: str, now: datetime) -> datetime:
    """Make the round `name` as soon as may be; when that is. A worker's next pass finds it due."""
    with store.transaction() as tx:
        tx.lock("rounds")
        asked = tx.beats().get(f"{name}.asked")
        if asked is None:
            return now
        due_at = min(max(now, asked[0] + APART), asked[0] + EVERY[name])
        tx.beat(f"{name}.asked", due_at - EVERY[name])
        return max(due_at, now)
