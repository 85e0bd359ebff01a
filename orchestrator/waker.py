"""Doorbells after a commit, rung by a thread of their own.

A message is only a wake-up: whatever is due is found in the database anyway. So ringing must never
delay an answer (the broker may be gone and its client may wait), and losing one is harmless.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from infra import logs

_log = logs.logger(__name__)
#: More wake-ups than this wait for nobody: the reconcile pass will find the work.
LIMIT = 10_000


class Waker:
    """Calls `wake(task, subject)` soon; the same pair waiting already is rung once."""

    def __init__(self, wake: Callable[[str, str], None]) -> None:
        self._wake = wake
        self._waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._pairs: set[tuple[str, str]] = set()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, subject: str, tasks: Iterable[str]) -> None:
        """Ring each of `tasks` for `subject`."""
        for task in tasks:
            pair = (task, subject)
            with self._guard:
                if pair in self._pairs or len(self._pairs) >= LIMIT:
                    continue
                self._pairs.add(pair)
                if self._thread is None:
                    # At the first need, not before: the server may fork in between.
                    self._thread = threading.Thread(target=self._run, name="waker", daemon=True)
                    self._thread.start()
            self._waiting.put(pair)

    def _run(self) -> None:
        while True:
            pair = self._waiting.get()
            with self._guard:
                self._pairs.discard(pair)
            try:
                self._wake(*pair)
            except Exception as error:  # noqa: BLE001 -- a lost doorbell costs only latency
                _log.warning("wake-up lost", task=pair[0], subject=pair[1], error=str(error))
