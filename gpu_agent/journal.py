"""The agent's log as the server sees it."""

from __future__ import annotations

import logging
import threading
from collections import deque

#: Lines that an `error` carries, and lines that wait for the next `log.lines`.
TAIL = 60
WAITING = 200
#: One line in a report (characters).
LONGEST = 500


class Journal(logging.Handler):
    """Keeps the last lines for an `error`, and the new ones for the reporter.

    Bounded on purpose: a trainer that babbles loses lines here, not the machine's memory.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._new: deque[str] = deque(maxlen=WAITING)
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()[:LONGEST]
        with self._guard:
            self._tail.append(line)
            self._new.append(line)

    def tail(self) -> list[str]:
        with self._guard:
            return list(self._tail)

    def take(self) -> list[str]:
        """The lines since the last call."""
        with self._guard:
            taken = list(self._new)
            self._new.clear()
            return taken
