"""The two ends of the conversation with the agent: events out, orders in, JSON lines both ways."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

_log = logging.getLogger(__name__)

#: Seconds between two signs of life in one phase.
_BEAT_EVERY = 1.0
#: Seconds between two looks at a phase that cannot count what it does.
_LOOK_EVERY = 5.0


class Events(Protocol):
    """Where the trainer's events go."""

    def emit(self, event: str, **fields: Any) -> None: ...


class JsonLines:
    """Events as JSON lines on the real stdout.

    Libraries print to stdout as they like; a line of theirs among ours would be garbage to the
    agent. So the real descriptor is kept for events alone, and descriptor 1 becomes stderr, for
    what C code prints too.
    """

    def __init__(self, stream: TextIO, gone: Callable[[], None] = lambda: None) -> None:
        """`gone` is called when nobody reads the events any more."""
        self._stream = stream
        self._gone = gone
        # checkpoints are announced by the thread that writes them
        self._lock = threading.Lock()

    @classmethod
    def take_stdout(cls, gone: Callable[[], None]) -> JsonLines:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        return cls(os.fdopen(kept, "w", encoding="utf-8"), gone)

    def emit(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}, ensure_ascii=False, allow_nan=False)
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except BrokenPipeError:
            _log.warning("nobody reads the events")
            self._gone()


class Orders:
    """What the agent wants, noted by another thread or a signal, obeyed between two steps."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._checkpoint = threading.Event()
        self._sample = threading.Event()

    def note(self, order: object) -> None:
        """Note an order; one that is not known is logged and changes nothing."""
        known = {"stop": self._stop, "checkpoint_now": self._checkpoint, "sample_now": self._sample}
        if isinstance(order, str) and order in known:
            known[order].set()
        else:
            _log.warning("unknown order %.80r", order)

    @property
    def stop(self) -> bool:
        return self._stop.is_set()

    def take_checkpoint(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        return _take(self._checkpoint)

    def take_sample(self) -> bool:
        """Whether sample images were asked for since the last call."""
        return _take(self._sample)

    def listen(self, lines: Iterable[bytes]) -> threading.Thread:
        """Read orders until the lines end, in a thread that does not keep the process alive."""
        thread = threading.Thread(target=self._read, args=(lines,), name="orders", daemon=True)
        thread.start()
        return thread

    def obey_sigterm(self) -> None:
        """From now on SIGTERM means: finish the step, save, leave."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stop.set()

        signal.signal(signal.SIGTERM, stop)

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            try:
                order = json.loads(line)["order"]
            except (ValueError, KeyError, TypeError, RecursionError):
                _log.warning("not an order: %.80r", line)
                continue
            self.note(order)


class Stopped(Exception):
    """A stop was ordered in the middle of something that can be done again elsewhere."""


class Pulse:
    """Signs of life where no steps are done, so that what is slow is not taken for frozen."""

    def __init__(self, events: Events, orders: Orders) -> None:
        self._events, self._orders = events, orders
        self._phase = ""
        self._at = 0.0

    def say(self, phase: str, done: int, total: int) -> None:
        """Tell how far a phase is; at most once a second, but always its beginning."""
        now = time.monotonic()
        if phase != self._phase or now - self._at >= _BEAT_EVERY:
            self._phase, self._at = phase, now
            self._events.emit("alive", phase=phase, done=done, total=total)

    def beat(self, phase: str, done: int, total: int) -> None:
        """As `say`, in a phase that may be left. Raises: Stopped."""
        if self._orders.stop:
            raise Stopped
        self.say(phase, done, total)

    @contextlib.contextmanager
    def watched(
        self, phase: str, measure: Callable[[], int], every: float = _LOOK_EVERY
    ) -> Iterator[None]:
        """For a phase that cannot count: a sign of life as long as `measure` changes."""
        over = threading.Event()

        def look() -> None:
            seen = measure()
            while not over.wait(every):
                before, seen = seen, measure()
                if seen != before:
                    self._events.emit("alive", phase=phase, done=seen, total=0)

        watcher = threading.Thread(target=look, name="watcher", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def mebibytes_touched() -> int:
    """What this process has read and holds in memory: it grows while a model loads. Else 0."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        read = int(Path("/proc/self/io").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return (pages * os.sysconf("SC_PAGE_SIZE") + read) >> 20


def _take(flag: threading.Event) -> bool:
    wanted = flag.is_set()
    flag.clear()
    return wanted
