"""Asking the market what a training would cost. Nothing is written, nothing is spent."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from state import brakes, estimate, money, policy, ranking
from state.errors import ProviderError, Throttled
from state.estimate import Estimate
from state.job import GpuNeeds, JobRequest, Reason
from state.money import Limits
from state.offer import Offer
from state.policy import Policy
from state.ranking import Choice, Workload
from state.store import Store
from tasks import search
from tasks.allocate import nothing_fits

#: Offers are shown again for so long: a form asks anew at every keystroke.
LIFE_S = 30.0
#: Of a photograph of which nothing is known.
PHOTOGRAPH_BYTES, PHOTOGRAPHS = 3_000_000, 20
#: Searches at once, each of which holds a thread of the server.
AT_ONCE = 4
#: Of a market that wants pauses, a turn is waited for no longer than this.
PATIENCE_S = 7.0


class Busy(ProviderError):
    """Others are asking the market already."""


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """What is known of a dataset; what is not is guessed."""

    count: int | None = None
    bytes: int | None = None

    def guessed(self) -> tuple[int, list[str]]:
        """Its bytes, and what of them is a guess."""
        if self.bytes is not None:
            return self.bytes, []
        count = PHOTOGRAPHS if self.count is None else self.count
        each = f"{PHOTOGRAPH_BYTES / 1e6:.0f} MB each"
        what = f"{count} photographs" if self.count is None else "photographs"
        return count * PHOTOGRAPH_BYTES, [f"{what} of {each} are assumed"]


@dataclass
class _Answers:
    """What the market answered lately, by question. The dataclasses that ask are hashable."""

    life_s: float
    known: dict[tuple[GpuNeeds, bool], tuple[float, list[Offer]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, question: tuple[GpuNeeds, bool], now: float) -> list[Offer] | None:
        with self.lock:
            self.known = {
                asked: got for asked, got in self.known.items() if now - got[0] < self.life_s
            }
            found = self.known.get(question)
        return None if found is None else found[1]

    def put(self, question: tuple[GpuNeeds, bool], offers: list[Offer], now: float) -> None:
        with self.lock:
            self.known[question] = (now, offers)


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """The market's `offers`, remembered for a while, with patience for its pauses."""

    market: search.Market
    answers: _Answers
    slots: threading.BoundedSemaphore
    monotonic: Callable[[], float]
    pause: Callable[[float], None]

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        """Raises: ProviderError."""
        question = (needs, interruptible)
        known = self.answers.get(question, self.monotonic())
        if known is None:
            with self._slot():
                known = self._ask(needs, interruptible, limit)
            self.answers.put(question, known, self.monotonic())
        return known

    def _ask(self, needs: GpuNeeds, interruptible: bool, limit: int) -> list[Offer]:
        try:
            return self.market.offers(needs, interruptible=interruptible, limit=limit)
        except Throttled as error:
            if error.retry_after > PATIENCE_S:
                raise
            self.pause(error.retry_after)
        return self.market.offers(needs, interruptible=interruptible, limit=limit)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        if not self.slots.acquire(blocking=False):
            raise Busy("others are asking the market; try again", code="busy")
        try:
            yield
        finally:
            self.slots.release()


class Estimator:
    """Estimates for orders that were checked.

    Args:
        market: the one that a request is for; raises what the installation lacks.
        image_bytes: what a machine pulls before our script runs.
        monotonic, pause: seconds; a pause.
    """

    def __init__(
        self,
        store: Store,
        market: Callable[[JobRequest], search.Market],
        *,
        clock: Callable[[], datetime],
        limits: Limits = money.NO_LIMITS,
        kill_switch: bool = False,
        image_bytes: int = 4_000_000_000,
        rules: Policy = policy.DEFAULT,
        life_s: float = LIFE_S,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._market, self._clock = store, market, clock
        self._limits, self._kill_switch = limits, kill_switch
        self._image_bytes, self._rules = image_bytes, rules
        self._monotonic, self._pause = monotonic, pause
        self._answers, self._slots = _Answers(life_s), threading.BoundedSemaphore(AT_ONCE)

    def estimate(self, request: JobRequest, photographs: Photographs) -> Estimate:
        """What `request` would cost and take if it were ordered now.

        Raises: ProviderError, when the market cannot be asked.
        """
        size, assumed = photographs.guessed()
        work = search.workload(request, size, self._image_bytes)
        asking = self._asking(request)
        offers = search.offers(asking, request, rules=self._rules)
        now = self._clock()
        real = request.rehearsal is None
        with self._store.transaction() as tx:
            hosts = tx.hosts() if real else []
            book = brakes.read(tx, self._limits, now, self._rules) if real else None
        choice = ranking.choose(offers, work, hosts=hosts, now=now, rules=self._rules)
        return estimate.estimate(
            request,
            work,
            choice,
            hosts,
            brakes=tuple(self._held(book, request, choice, work)) if book is not None else (),
            refused={} if choice.ranked else self._in_the_way(asking, request.gpu),
            nothing="" if offers else nothing_fits(request.gpu),
            assumed=assumed,
            rules=self._rules,
        )

    def _asking(self, request: JobRequest) -> search.Market:
        if request.rehearsal is not None:
            return self._market(request)  # what only pretends is asked for nothing
        return _Asking(
            market=self._market(request),
            answers=self._answers,
            slots=self._slots,
            monotonic=self._monotonic,
            pause=self._pause,
        )

    def _held(
        self, book: brakes.Book, request: JobRequest, choice: Choice, work: Workload
    ) -> Iterator[Reason]:
        """What would keep the best offer from being rented now."""
        now, limits = self._clock(), self._limits
        stopped = brakes.stopped(book, limits, now, kill_switch=self._kill_switch)
        if stopped is not None:
            yield stopped
        if not choice.ranked:
            return
        offer, _ = choice.ranked[0]
        moved = ranking.bandwidth(offer, work)
        span = money.span(offer.price, moved, request.max_cost, (), timedelta(0), self._rules)
        names = {"id": "estimate", "job": "estimate", "attempt": 1, "label": "estimate"}
        lease = search.lease(offer, request, work, now=now, span=span, **names)
        refused = brakes.refused(book, limits, lease, now)
        if refused is not None:
            yield refused

    def _in_the_way(self, asking: search.Market, needs: GpuNeeds) -> Mapping[str, int]:
        """Which of `needs` the cheapest offers of the whole market do not meet, where the market
        can be asked once more."""
        try:
            every = asking.offers(estimate.WIDEST)
        except ProviderError:
            return {}
        unmet = (ranking.unmet(offer, needs) for offer in every)
        return Counter(f"for their {need}" for need in unmet if need)
