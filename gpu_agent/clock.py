"""What time it is: on a rented machine nobody promises that the clock is right."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable

#: A clock that differs by less from the server's is right enough to sign with (seconds).
GOOD_ENOUGH = 30.0


class Clock:
    """`now` is seconds since the epoch as the server counts them, once it was heard."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self.monotonic = monotonic
        self._offset = 0.0

    def now(self) -> float:
        return self._wall() + self._offset

    def learn(self, date: str | None) -> None:
        """Take over the time of a server's `Date` header where ours is far from it."""
        try:
            heard = email.utils.parsedate_to_datetime(date or "").timestamp()
        except (ValueError, TypeError, OverflowError):
            return
        offset = heard - self._wall()
        if abs(offset - self._offset) > GOOD_ENOUGH:
            self._offset = offset if abs(offset) > GOOD_ENOUGH else 0.0
