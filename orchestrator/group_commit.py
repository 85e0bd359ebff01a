"""Many waiting requests, one transaction.

A commit waits for the disk. While it does, other requests queue up; the committer takes all of
them into the next transaction, and each is answered only after its own is on disk.

A lone request is committed at once. Where the last group had several, more are sure to come: those
just answered send their next. Waiting 2 ms for them nearly doubles the groups, and a transaction
costs as much as ten rows in it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

#: How long a busy committer lets the next group gather.
GATHER_S = 0.002

T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)
R_contra = TypeVar("R_contra", contravariant=True)


class Waiter(Protocol[T_co, R_contra]):
    """One who waits for the outcome of its item. `answer` is called once, from another thread."""

    @property
    def item(self) -> T_co: ...
    def answer(self, result: R_contra | None, error: BaseException | None = None) -> None: ...


class _Sleeper(Generic[T, R]):
    """A thread that waits. A bare lock: a `Future` costs as much as checking a signature."""

    __slots__ = ("_answered", "error", "item", "result")

    def __init__(self, item: T) -> None:
        self.item = item
        self.result: R | None = None
        self.error: BaseException | None = None
        self._answered = threading.Lock()
        self._answered.acquire()

    def answer(self, result: R | None, error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self._answered.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether the answer came in time."""
        return self._answered.acquire(timeout=timeout_s)


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
        self._waiting: queue.SimpleQueue[Waiter[T, R]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, item: T, *, timeout_s: float) -> R:
        """The result of `item`, once it is on disk.

        Raises:
            TimeoutError: not within `timeout_s`; it may still be committed.
            Exception: whatever `apply` raised for it.
        """
        waiter: _Sleeper[T, R] = _Sleeper(item)
        self.enqueue(waiter)
        if not waiter.wait(timeout_s):
            raise TimeoutError("the commit takes too long")
        if waiter.error is not None:
            raise waiter.error
        return waiter.result  # type: ignore[return-value]  # None only beside an error

    def enqueue(self, waiter: Waiter[T, R]) -> None:
        """Have `waiter` answered once its item is on disk."""
        if self._thread is None:
            self._start()
        self._waiting.put(waiter)

    def waiting(self) -> int:
        """How many are not taken into a transaction yet."""
        return self._waiting.qsize()

    def _start(self) -> None:
        # At the first need, not before: the server may fork in between.
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        busy = False
        while True:
            group = [self._waiting.get()]
            if busy:
                time.sleep(GATHER_S)
            while len(group) < self._limit and not self._waiting.empty():
                group.append(self._waiting.get())  # nobody else takes from it
            busy = len(group) > 1
            self._settle(group)

    def _settle(self, group: list[Waiter[T, R]]) -> None:
        try:
            results = self._apply([waiter.item for waiter in group])
        except Exception as error:  # noqa: BLE001 -- handed over to those who wait
            if len(group) == 1 or self._hopeless(error):
                for waiter in group:
                    waiter.answer(None, error)
                return
            for waiter in group:
                self._settle([waiter])
            return
        for waiter, result in zip(group, results, strict=True):
            waiter.answer(result)
