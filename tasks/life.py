"""Signs of life: each process says every few seconds that it is there, in the database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime

import structlog

from state import policy
from state.errors import StoreUnavailable
from state.store import Store

#: Seconds between two signs; well below `policy.LIFE_GAP`.
PAUSE_S = 5.0
_log = structlog.get_logger()


def live(
    store: Store, clock: Callable[[], datetime], name: str, over: threading.Event
) -> threading.Thread:
    """Give signs of life under `name`, on a thread of its own, until `over` is set."""

    def say() -> None:
        while True:
            try:
                with store.transaction() as tx:
                    now = clock()
                    tx.beat(name, now, policy.sign_of_life(tx.beats().get(name), now))
            except StoreUnavailable:
                _log.warning("the database cannot be told of this process", name=name)
            if over.wait(PAUSE_S):
                return

    thread = threading.Thread(target=say, name=f"life-{name}", daemon=True)
    thread.start()
    return thread
