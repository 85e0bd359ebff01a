"""Virtual time: a heap of events, one seeded random, and a trace that can be hashed."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

START = datetime(2026, 1, 1, tzinfo=UTC)
#: How many calls may be waiting inside each other while time passes in them.
DEPTH = 6


class Crash(BaseException):
    """The process died on this line. Nothing that it had not committed happened."""


class Kernel:
    """What happens when. Times are seconds since `START`."""

    def __init__(self, seed: int, *, keep: int = 400) -> None:
        self.random = Random(seed)
        self.t = 0.0
        self.events = 0
        #: the last lines of the trace; all of them go into the hash
        self.trace: deque[str] = deque(maxlen=keep)
        self._hash = hashlib.sha256()
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._depth = 0
        #: called after each event, also those within a call
        self.after_each: Callable[[], object] = lambda: None
        self._now = (0.0, START)

    def now(self) -> datetime:
        """The clock that everything under test reads."""
        if self._now[0] != self.t:
            self._now = (self.t, START + timedelta(seconds=self.t))
        return self._now[1]

    def at(self, t: float, call: Callable[..., object], *args: Any) -> None:
        heapq.heappush(self._heap, (max(t, self.t), next(self._numbers), call, args))

    def after(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        self.at(self.t + seconds, call, *args)

    def step(self) -> bool:
        """Let the next event happen; False when none is left."""
        if not self._heap:
            return False
        t, _, call, args = heapq.heappop(self._heap)
        self.t = max(self.t, t)
        self.events += 1
        call(*args)
        self.after_each()
        return True

    def pause(self, seconds: float) -> None:
        """Time passes within a call, and others act meanwhile.

        Who began last ends first, so a call may last longer than asked: as with a process that
        is not given the CPU.
        """
        if self._depth >= DEPTH:
            return
        until = self.t + seconds
        self._depth += 1
        try:
            while self._heap and self._heap[0][0] <= until:
                self.step()
        finally:
            self._depth -= 1
        self.t = max(self.t, until)

    def note(self, job: str, what: str) -> None:
        """One line of the trace."""
        line = f"{self.t:.3f} {job} {what}"
        self.trace.append(line)
        self._hash.update(line.encode())

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()


def seconds(when: datetime) -> float:
    """`when` in the kernel's time."""
    return (when - START).total_seconds()
