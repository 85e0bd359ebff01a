"""Many waiting requests, one transaction.

A commit waits for the disk. While it does, other requests queue up; the committer takes all of
them into the next transaction, and each is answered only after its own is on disk. No request
waits for company: an idle server commits a lone one at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class GroupCommitter(Generic[T, R]):
    """Runs `apply` on groups of what `submit` is given, in the order of arrival.

    `apply` commits its whole group or raises having done nothing. Where a group raises, each of
    its items is tried alone, so that one poisoned item fails nobody else; unless `hopeless` says
    that the error is nobody's fault (the database is gone), which then is everybody's answer.
    """

    def __init__(
        self,
        apply: Callable[[Sequence[T]], Sequence[R]],
        *,
        limit: int = 100,
        hopeless: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self._apply, self._limit, self._hopeless = apply, limit, hopeless
        self._waiting: deque[tuple[T, Future[R]]] = deque()
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, item: T, *, timeout_s: float) -> R:
        """The result of `item`, once it is on disk.

        Raises:
            TimeoutError: not within `timeout_s`; it may still be committed.
            Exception: whatever `apply` raised for it.
        """
        future: Future[R] = Future()
        with self._arrived:
            if self._thread is None:
                # At the first need, not before: the server may fork in between.
                self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
                self._thread.start()
            self._waiting.append((item, future))
            self._arrived.notify()
        try:
            return future.result(timeout_s)
        except Late:
            if future.done():
                raise
            raise TimeoutError("the commit takes too long") from None

    def _run(self) -> None:
        while True:
            with self._arrived:
                while not self._waiting:
                    self._arrived.wait()
                size = min(len(self._waiting), self._limit)
                group = [self._waiting.popleft() for _ in range(size)]
            self._settle(group)

    def _settle(self, group: list[tuple[T, Future[R]]]) -> None:
        try:
            results = self._apply([item for item, _ in group])
        except Exception as error:  # noqa: BLE001 -- handed over to those who wait
            if len(group) == 1 or self._hopeless(error):
                for _, future in group:
                    future.set_exception(error)
                return
            for one in group:
                self._settle([one])
            return
        for (_, future), result in zip(group, results, strict=True):
            future.set_result(result)
