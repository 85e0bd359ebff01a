"""Whether anything moves: one number that grows with every bit of work, whatever the work is."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path


class Moved:
    """A count of bytes, files, steps and lines together; it only grows. Safe for all threads.

    Only that it grew says something, not by how much: a server that saw it stand still for long
    knows that nothing goes on here, though heartbeats come.

    Args:
        path: where it is kept, so that an agent that was started again goes on counting.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._count = self._kept = 0
        with contextlib.suppress(OSError, ValueError):
            self._count = self._kept = int(path.read_text())

    def add(self, amount: int) -> None:
        with self._lock:
            self._count += amount

    def read(self) -> int:
        """The count so far, to be told to others: it is on the disk first."""
        with self._lock:
            if self._count != self._kept:
                self._kept = self._count
                # on a full disk the job is about to end anyway
                with contextlib.suppress(OSError):
                    self._path.write_text(str(self._count))
            return self._count
