"""From the outbox to customers' webhooks: at least once, in order within a queue.

A queue is what a job owes to one endpoint; no queue waits for another. A row is claimed (its due
time moved ahead) before it is sent, so two relays do not send the same row at once; a relay that
dies leaves the row due again when its claim runs out.

A worker has few threads, and a host that does not answer holds each of them for 15 s. So no host
gets them all (`Lanes`): what would be one send too many is put off, untried.
"""

from __future__ import annotations

import json
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Protocol

from gpu_agent import wire
from state.endpoints import Endpoint
from state.errors import NotFound
from state.events import Delivery, Outgoing, OutgoingStatus, parts_of
from state.store import Store, Transaction
from tasks.reconcile import Wake

#: Pauses before the second, third … try (the Standard Webhooks schedule, 75.6 h in all).
SCHEDULE_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
#: A claim is longer than any send can take.
CLAIM = timedelta(seconds=60)
SEND_TIMEOUT_S = 15.0
MAX_RETRY_AFTER_S = 86_400.0
#: Why an endpoint was disabled that said so itself.
GONE = "it answered 410 Gone"
#: Sends at once to one host: most of a worker's 16 threads.
TO_ONE = 12
#: The same to a host that is slow, and to all slow hosts together.
TO_ONE_SLOW = 2
TO_ALL_SLOW = 6
#: A host is slow whose latest answer took so long, or that two sends have waited for so long.
SLOW = timedelta(seconds=5)
STUCK = timedelta(seconds=1)


class EndpointRefused(Exception):
    """The customer's URL may not be called (private address, wrong scheme …)."""


class NoAnswer(Exception):
    """The endpoint could not be reached or did not answer in time."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]


class Post(Protocol):
    """Sends `body` once. Raises: EndpointRefused, NoAnswer."""

    def __call__(
        self, url: str, *, headers: Mapping[str, str], body: bytes, timeout: float
    ) -> Answer: ...


class Lanes:
    """Who is being sent to by this process now."""

    def __init__(self) -> None:
        self._under_way: dict[str, list[datetime]] = defaultdict(list)
        self._slow: set[str] = set()
        self._lock = threading.Lock()

    def enter(self, host: str, now: datetime) -> float:
        """0 when a send may begin, and then `leave` must follow; else seconds to put it off."""
        with self._lock:
            sends = self._under_way[host]
            stuck = sum(now - began >= STUCK for began in sends)
            if host in self._slow or stuck >= TO_ONE_SLOW:
                others = sum(len(self._under_way[name]) for name in self._slow - {host})
                if len(sends) >= TO_ONE_SLOW or len(sends) + others >= TO_ALL_SLOW:
                    return SEND_TIMEOUT_S
            elif len(sends) >= TO_ONE:
                return 1.0
            sends.append(now)
            return 0.0

    def leave(self, host: str, began: datetime, now: datetime) -> None:
        with self._lock:
            self._under_way[host].remove(began)
            if now - began >= SLOW:
                self._slow.add(host)
            else:
                self._slow.discard(host)
            if not self._under_way[host] and host not in self._slow:
                del self._under_way[host]


@dataclass(frozen=True, kw_only=True)
class Letter:
    """A claimed row, where it goes, and what signs it (oldest first)."""

    row: Outgoing
    url: str
    secrets: list[str] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Relay:
    store: Store
    post: Post
    clock: Callable[[], datetime]
    #: For the jitter of the retry schedule.
    random: random.Random
    lanes: Lanes = field(default_factory=Lanes)

    def relay_all(self, subject: str, wake: Wake) -> int:
        """Send what is due in a queue; of a job, in all of its queues. One of them here, each
        other in a task of its own: a slow endpoint must not hold up another.
        """
        queues = [subject]
        if not parts_of(subject)[1]:
            with self.store.transaction() as tx:
                queues = tx.queues_of(subject)
        for queue in queues[1:]:
            wake("relay", [queue])
        return self.relay(queues[0]) if queues else 0

    def relay(self, queue: str) -> int:
        """Send what is due in a queue, oldest first, until something is not; how many went out.

        The id of a job is the name of the queue of its own webhook.
        """
        sent = 0
        while (letter := self._claim(queue)) is not None:
            if not self._send(letter):
                break
            sent += 1
        return sent

    def _claim(self, queue: str) -> Letter | None:
        """The first row of a queue, if it is due. Those that no longer lead anywhere end here."""
        while True:
            now = self.clock()
            with self.store.transaction() as tx:
                first = tx.next_outgoing(queue)
                if first is None:
                    return None
                try:
                    row = tx.outgoing(first.id, lock=True)
                    if not _is_due(row, now):
                        return None
                    url, secrets = _address(tx, row, now)
                except NotFound:
                    return None
                if url:
                    row = row.evolve(due_at=now + CLAIM, tries=row.tries + 1)
                    tx.save_outgoing(row)
                    return Letter(row=row, url=url, secrets=secrets)
                tx.save_outgoing(
                    row.evolve(status=OutgoingStatus.DISABLED, due_at=None, ended_at=now)
                )

    def _send(self, letter: Letter) -> bool:
        """One try; whether the row is dealt with, so that the next may go."""
        began = self.clock()
        row, url = letter.row, letter.url
        host = url.partition("://")[2].partition("/")[0]
        if pause := self.lanes.enter(host, began):
            return self._put_off(row, began, pause)
        body = json.dumps(row.payload, separators=(",", ":")).encode()
        stamp = began.timestamp()
        signed = wire.sign(body, secrets=letter.secrets, webhook_id=row.id, at=stamp)
        headers = {"content-type": "application/json", "user-agent": "stoker-webhooks/1", **signed}
        answer: Answer | None = None
        error = ""
        refused = False
        try:
            answer = self.post(url, headers=headers, body=body, timeout=SEND_TIMEOUT_S)
        except EndpointRefused as problem:
            error, refused = str(problem), True
        except NoAnswer as problem:
            error = str(problem)
        finally:
            self.lanes.leave(host, began, self.clock())
        now = self.clock()
        row = self._judge(row, answer, refused, now)
        took = round((now - began).total_seconds() * 1000)
        with self.store.transaction() as tx:
            if row.endpoint and row.status is OutgoingStatus.DISABLED:
                # before its rows, here as everywhere
                _close(tx, row.endpoint, error or GONE, now)
            stored = tx.outgoing(row.id, lock=True)
            # Our claim may have run out meanwhile: then another relay judges, unless we delivered.
            ours = row.status is OutgoingStatus.DELIVERED or stored.tries == row.tries
            if ours and stored.status is OutgoingStatus.WAITING:
                tx.save_outgoing(row.evolve(tries=stored.tries))
            tx.log_delivery(
                Delivery(
                    outgoing=row.id,
                    job=row.job,
                    tried_at=began,
                    answer=answer.status if answer else 0,
                    took_ms=took,
                    error=error[:500],
                )
            )
        return row.status is OutgoingStatus.DELIVERED

    def _put_off(self, row: Outgoing, now: datetime, seconds: float) -> bool:
        """Give the claim back: this was no try. Later, but not all at the same moment."""
        later = now + timedelta(seconds=seconds * self.random.uniform(0.5, 1.5))
        with self.store.transaction() as tx:
            stored = tx.outgoing(row.id, lock=True)
            if stored.status is OutgoingStatus.WAITING and stored.tries == row.tries:
                tx.save_outgoing(row.evolve(due_at=later, tries=row.tries - 1))
        return False

    def _judge(
        self, row: Outgoing, answer: Answer | None, refused: bool, now: datetime
    ) -> Outgoing:
        if answer is not None and 200 <= answer.status < 300:
            return row.evolve(status=OutgoingStatus.DELIVERED, due_at=None, ended_at=now)
        if refused or (answer is not None and answer.status == 410):
            return row.evolve(status=OutgoingStatus.DISABLED, due_at=None, ended_at=now)
        if row.tries > len(SCHEDULE_S):
            return row.evolve(status=OutgoingStatus.EXHAUSTED, due_at=None, ended_at=now)
        pause = SCHEDULE_S[row.tries - 1] * self.random.uniform(0.9, 1.1)
        asked = _retry_after(answer, now) if answer is not None else 0.0
        return row.evolve(due_at=now + timedelta(seconds=max(pause, asked)))


def _is_due(row: Outgoing, now: datetime) -> bool:
    waits = row.status is OutgoingStatus.WAITING
    return waits and row.due_at is not None and row.due_at <= now


def _address(tx: Transaction, row: Outgoing, now: datetime) -> tuple[str, list[str]]:
    """Where a row goes, "" when nowhere any more, and what signs it. Raises: NotFound."""
    if not row.endpoint:
        job = tx.job(row.job)
        secrets = [secret.reveal() for secret in tx.webhook_secrets(job.id)]
        return job.request.webhook_url or "", secrets
    try:
        endpoint: Endpoint = tx.endpoint(row.endpoint)
    except NotFound:
        return "", []
    # What a listener did not fetch in time is due, and ends as well.
    if endpoint.disabled_at is not None or endpoint.listener:
        return "", []
    good = endpoint.in_force(tx.webhook_secrets(endpoint.id), now)
    return endpoint.url, [secret.reveal() for secret in good]


def _close(tx: Transaction, endpoint_id: str, why: str, now: datetime) -> None:
    """Send nothing more to an endpoint, nor what waits for it; both can be taken back."""
    try:
        endpoint = tx.endpoint(endpoint_id, lock=True)
    except NotFound:
        return  # somebody deleted it meanwhile
    tx.save_endpoint(endpoint.disabled(now, why))
    tx.disable_outgoing(endpoint_id, now)


def _retry_after(answer: Answer, now: datetime) -> float:
    """Seconds that a 429 or 5xx asks us to wait; 0 when it does not, or not readably."""
    if answer.status != 429 and answer.status < 500:
        return 0.0
    text = answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return min(max(0.0, (when - now).total_seconds()), MAX_RETRY_AFTER_S)
