"""How work on a rented machine ends early: a fault of its own, or a word from outside."""

from __future__ import annotations

import threading
from typing import NoReturn


class Fault(Exception):
    """The attempt cannot go on.

    `code` is one of those listed in `docs/wire.md`. `retryable` says whether another machine may
    do better: true for a fault of the host or the line, false for one of the customer's data.
    """

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code, self.message, self.retryable = code, message, retryable


class Halted(Exception):
    """The work was told to end; `Halt.reason` says by whom."""


class Halt:
    """Told once, seen by every thread: the work is to end, and why. The first reason stays."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._warning = ""
        self.reason = ""

    def call(self, reason: str) -> bool:
        """End the work; False when something else had ended it before."""
        with self._lock:
            if self._event.is_set():
                return False
            self.reason = reason
            self._event.set()
            return True

    def warn(self, reason: str, grace_s: float) -> None:
        """The work will be ended in `grace_s` seconds; what can be saved until then is to be.

        Whoever has nothing to save (any more) calls `leave`. Further warnings change nothing.
        """
        with self._lock:
            if self._warning or self._event.is_set():
                return
            self._warning = reason
        timer = threading.Timer(grace_s, self.call, (reason,))
        timer.daemon = True
        timer.start()

    @property
    def warned(self) -> bool:
        return bool(self._warning)

    def leave(self) -> NoReturn:
        """End the work that was warned. Raises: Halted."""
        self.call(self._warning)
        raise Halted(self.reason)

    def check(self) -> None:
        """Raises: Halted."""
        if self._event.is_set():
            raise Halted(self.reason)

    def sleep(self, seconds: float) -> None:
        """Wait, but not past the end. Raises: Halted."""
        self._event.wait(seconds)
        self.check()

    def wait(self, seconds: float) -> bool:
        """Wait, but not past the end; whether the end came."""
        return self._event.wait(seconds)
