"""Live streams (server-sent events): many readers, one look a second, and no thread held.

A view authenticates, says what is followed, and answers with a feed:

    feed = streams.hub().open(JobEvents(job.id), since=after, entry=Entry(key_hash), owner=owner)
    return feed.response()

What is followed is a `Channel`: a small hashable value. As long as it has a reader, the hub of
this process asks it once a second (seldomer where a look takes long, but each three seconds), on a
thread of the hub's own, what is the case now (`head`) and
what that means for somebody who knows it as it was (`news`). Readers who stand at the same place
get the same bytes, rendered once. Nobody is told by the database: a NOTIFY in each commit would
queue the receiver's commits behind one lock, and a look is a few statements by primary key.

A `Feed` is the body of the answer. `orchestrator.rsgi` recognises it and follows it on the event
loop; under plain WSGI (tests, `make_app`) it iterates, and holds its thread.

A position is the reader's, not the channel's. Whoever comes back tells where it stood, is brought
to the head in as many steps as that takes, and then goes along with the others: no gap, no
repeat. Whoever does not read is passed over, holds a limited number of bytes meanwhile, and is
cut off after a while. When the database is away, readers get heartbeats until it is back. A reader
whose key is revoked is sent away within a minute.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from flask import Flask, Response, current_app
from granian.rsgi import ProtocolClosed, ProtocolError

from infra import logs
from orchestrator.api import auth
from orchestrator.api.auth import Caller
from orchestrator.api.problems import Refusal, is_outage
from orchestrator.deps import Deps
from orchestrator.peers import queued_bytes
from state.job import Job
from state.store import Store, Transaction

#: How often a channel with readers is looked at.
TICK_S = 1.0
#: One whose look takes long rests so many times as long as that took, but no longer than that.
REST, LONGEST_REST_S = 10, 3.0
#: A stream that says nothing for so long says that it is alive; proxies give up at 30 to 60 s.
HEARTBEAT = timedelta(seconds=15)
#: How old the knowledge that a reader's key is good may be.
ADMISSION = timedelta(seconds=30)
#: Streams of one process, and of one owner in it. granian takes 512 requests at once.
MOST, MOST_OF_ONE = 256, 64
#: What a reader may be sent before it is seen that it reads. granian keeps whatever is not read.
UNSEEN_BYTES = 1_000_000
#: Somebody who has not read that within so long is gone, or as good as.
PATIENCE = timedelta(seconds=30)
#: When a browser comes back after a stream ended.
RETRY_MS = 2000

BEAT = b": still here\n\n"
_log = logs.logger(__name__)


def message(data: str, *, event: str = "", id: str = "") -> bytes:
    """One message as text/event-stream has it; `event` and `id` must be one line."""
    head = (f"id: {id}\n" if id else "") + (f"event: {event}\n" if event else "")
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"{head}{lines}\n".encode()


def bye(code: str) -> bytes:
    """The last message to somebody who is sent away, for a page's script."""
    return message(f'{{"code": "{code}"}}', event="bye")


HELLO = f"retry: {RETRY_MS}\n\n".encode()


@dataclass(frozen=True, kw_only=True)
class News:
    """What brings a reader further.

    Attributes:
        data: whole messages; empty when there is nothing to say.
        at: where the reader stands after it; handed to `Channel.news` the next time.
        more: the head is further on; ask again as soon as this is read.
        over: nothing will follow.
    """

    data: bytes = b""
    at: Hashable
    more: bool = False
    over: bool = False


class Channel(Protocol):
    """Something that can be followed. Hashable: equal channels are one, and share their looks.

    Both methods run on the hub's thread, within one transaction; whatever they raise, other than
    that the database is away, ends the streams of this channel.
    """

    @property
    def jobs(self) -> Collection[str]:
        """Ids of jobs that `head` wants to see; the hub reads those of all channels at once."""

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> Any:
        """What is the case now. Cheap: asked once a second."""

    def news(self, tx: Transaction, since: Any, head: Any) -> News:
        """What somebody must be told who knows the channel as it was at `since`.

        `since` is what `Feed` was opened with, or the `at` of earlier news. Deterministic: two
        readers at one place are told the same.
        """


@dataclass(frozen=True)
class Entry:
    """By what a reader was let in, so that it can be looked at again."""

    key_hash: str
    scope: str = auth.READ

    def holds(self, tx: Transaction) -> bool:
        key = tx.api_key_by_hash(self.key_hash)
        if key is None or key.revoked_at is not None:
            return False
        return Caller(owner=key.owner, scopes=key.scopes).may(self.scope)


class Feed:
    """A stream's body, and one reader of a channel.

    Counts against the limits as long as somebody holds it.
    """

    def __init__(
        self, hub: Hub, channel: Channel, since: Hashable, entry: Entry, owner: str
    ) -> None:
        self.hub, self.channel, self.since = hub, channel, since
        self.entry, self.owner = entry, owner

    def response(self) -> Response:
        # passed through: Werkzeug would hide the feed in an iterator of its own
        answer = Response(self, mimetype="text/event-stream", direct_passthrough=True)
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Accel-Buffering"] = "no"  # nginx would collect 4 kB first
        return answer

    def __iter__(self) -> Iterator[bytes]:
        """The stream without a loop: looks for itself, and holds the thread that iterates."""
        hub, at = self.hub, self.since
        told = admitted = hub.clock()
        yield HELLO
        while True:
            asked = (self.channel, at)
            doubtful = hub.clock() - admitted >= ADMISSION
            try:
                found = hub.look([asked], [self.entry] if doubtful else [])
            except Exception as error:
                if not is_outage(error):
                    raise
                found = Found()
            if doubtful:
                admitted = hub.clock()
            if self.entry in found.refused:
                yield bye("unauthorized")
                return
            if self.channel in found.broken:
                return
            news = found.news.get(asked, News(at=at))
            at = news.at
            if news.data:
                told = hub.clock()
                yield news.data
            if news.over:
                return
            if not news.more:
                hub.pause(TICK_S)
            if hub.clock() - told >= HEARTBEAT:
                told = hub.clock()
                yield BEAT

    def close(self) -> None:
        """Count no longer."""
        self.hub.forget(self)


@dataclass
class Found:
    """What a look brought: news by (channel, position), who is not let in, what cannot be seen."""

    news: dict[tuple[Channel, Hashable], News] = field(default_factory=dict)
    refused: set[Entry] = field(default_factory=set)
    broken: set[Channel] = field(default_factory=set)
    #: seconds that each channel's look took
    took: dict[Channel, float] = field(default_factory=dict)


class Sender(Protocol):
    async def send_bytes(self, data: bytes) -> None: ...


class Hub:
    """All streams of this process.

    Args:
        clock: aware UTC now.
        pause: waits so many seconds; for feeds that hold a thread.
        rest: the same on the loop.
        unread: how many bytes each peer (`address:port`) has not taken yet; unknown ones missing.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], datetime],
        *,
        pause: Callable[[float], None],
        rest: Callable[[float], Awaitable[None]] = asyncio.sleep,
        unread: Callable[[Collection[str]], Mapping[str, int]] = queued_bytes,
        most: int = MOST,
        most_of_one: int = MOST_OF_ONE,
    ) -> None:
        self._store, self.clock, self.pause, self._rest = store, clock, pause, rest
        self._unread = unread
        self._most, self._most_of_one = most, most_of_one
        self._guard = threading.Lock()
        self._feeds: weakref.WeakSet[Feed] = weakref.WeakSet()
        self._readers: dict[Feed, _Reader] = {}
        self._resting: dict[Channel, datetime] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="streams")
        self._watching: asyncio.Task[None] | None = None
        self._called: asyncio.Event  # of the loop that there is while somebody reads
        self._stopped = False
        self._away = False

    # --- from the views

    def open(self, channel: Channel, *, since: Hashable = None, entry: Entry, owner: str) -> Feed:
        """A feed for one reader, who knows the channel as it was at `since`.

        Raises:
            Refusal: 503 when this process has as many streams as it may, 429 when the owner has.
        """
        with self._guard:
            if self._stopped or len(self._feeds) >= self._most:
                raise Refusal(
                    503,
                    "too_many_streams",
                    "this server has as many streams as it takes; ask again, or poll",
                    headers={"Retry-After": "5"},
                    retryable=True,
                )
            if sum(feed.owner == owner for feed in self._feeds) >= self._most_of_one:
                raise Refusal(
                    429,
                    "too_many_streams",
                    f"you have {self._most_of_one} streams open; end some, or poll",
                    headers={"Retry-After": "5"},
                    retryable=True,
                )
            feed = Feed(self, channel, since, entry, owner)
            self._feeds.add(feed)
        return feed

    def forget(self, feed: Feed) -> None:
        with self._guard:
            self._feeds.discard(feed)

    @property
    def open_streams(self) -> int:
        return len(self._feeds)

    @property
    def reading(self) -> bool:
        """Whether anybody is followed on the loop."""
        return self._watching is not None

    # --- on the hub's thread

    def look(
        self, asked: Collection[tuple[Channel, Hashable]], entries: Collection[Entry]
    ) -> Found:
        """Bring those who stand at the places `asked` to their channels' heads.

        Raises:
            StoreUnavailable: nobody can be told anything now.
        """
        found = Found()
        places: dict[Channel, list[Hashable]] = {}
        for channel, since in asked:
            places.setdefault(channel, []).append(since)
        while True:
            now: Channel | None = None
            try:
                with self._store.transaction() as tx:
                    found.refused = {entry for entry in entries if not entry.holds(tx)}
                    jobs = tx.jobs({job for channel in places for job in channel.jobs})
                    for now, sinces in places.items():
                        began = time.perf_counter()
                        head = now.head(tx, jobs)
                        for since in sinces:
                            found.news[now, since] = now.news(tx, since, head)
                        found.took[now] = time.perf_counter() - began
                    now = None
                return found
            except Exception as error:
                if now is None or is_outage(error):
                    raise
                # its fault must not end the others' streams: once more without it
                _log.error("a stream cannot go on", channel=str(now), exc_info=error)
                found.broken.add(now)
                del places[now]

    # --- on the loop

    async def follow(
        self,
        feed: Feed,
        sender: Sender,
        gone: Callable[[], Awaitable[None]],
        peer: str = "",
    ) -> None:
        """Send `feed` to its reader until it is over, the reader is gone, or the hub stops."""
        loop = asyncio.get_running_loop()
        reader = _Reader(self, feed, sender, peer)
        self._readers[feed] = reader
        if self._stopped:
            reader.end()
        tasks = [loop.create_task(reader.run()), loop.create_task(_until(gone))]
        reader.task = tasks[0]
        if self._watching is None:
            self._called = asyncio.Event()
            self._watching = loop.create_task(self._watch())
        self._called.set()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._readers[feed]
            feed.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """End every stream, and take no other; call it on the loop."""
        self._stopped = True
        for reader in self._readers.values():
            reader.end()

    def call(self) -> None:
        """Somebody can be served before the next tick."""
        self._called.set()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._readers and not self._stopped:
                await self._serve(everybody=True)
                resting = loop.create_task(_until(lambda: self._rest(TICK_S)))
                while not resting.done():
                    called = loop.create_task(self._called.wait())
                    await asyncio.wait({resting, called}, return_when=asyncio.FIRST_COMPLETED)
                    called.cancel()
                    if self._called.is_set() and not resting.done():
                        self._called.clear()
                        await self._serve(everybody=False)
        finally:
            self._watching = None

    async def _serve(self, *, everybody: bool) -> None:
        """Look for all who have read what they were sent; else only for those who are behind."""
        now = self.clock()
        readers = list(self._readers.values())
        if everybody:
            await self._mind(readers, now)
        self._resting = {channel: end for channel, end in self._resting.items() if end > now}
        ready = [
            reader
            for reader in readers
            if reader.ready
            and (reader.behind or (everybody and reader.feed.channel not in self._resting))
        ]
        doubtful = [
            reader for reader in readers if everybody and now - reader.admitted_at >= ADMISSION
        ]
        if ready or doubtful:
            asked = {(reader.feed.channel, reader.at) for reader in ready}
            entries = {reader.feed.entry for reader in doubtful}
            look = asyncio.get_running_loop().run_in_executor(
                self._thread, self.look, asked, entries
            )
            try:
                self._tell(ready, doubtful, await look, now)
            except Exception as error:  # noqa: BLE001 -- streams outlive any fault of a look
                self._say_away(error)
        if everybody:
            for reader in readers:
                reader.beat(now)

    def _tell(
        self, ready: list[_Reader], doubtful: list[_Reader], found: Found, now: datetime
    ) -> None:
        if self._away:
            self._away = False
            _log.info("streams see the database again")
        for channel, took in found.took.items():
            self._resting[channel] = now + timedelta(seconds=min(REST * took, LONGEST_REST_S))
        for reader in doubtful:
            reader.admitted_at = now
            if reader.feed.entry in found.refused:
                reader.end(bye("unauthorized"))
        for reader in ready:
            if reader.feed.channel in found.broken:
                reader.end(bye("broken"))
            else:
                reader.take(found.news[reader.feed.channel, reader.at])

    def _say_away(self, error: Exception) -> None:
        if not is_outage(error):
            _log.error("streams cannot look", exc_info=error)
        elif not self._away:
            self._away = True
            _log.warning("streams wait for the database", error=str(error))

    async def _mind(self, readers: list[_Reader], now: datetime) -> None:
        """See who reads, and cut off who does not."""
        full = [reader for reader in readers if reader.full]
        if full:
            peers = {reader.peer for reader in full}
            loop = asyncio.get_running_loop()
            queued = await loop.run_in_executor(self._thread, self._unread, peers)
            for reader in full:
                reader.mind(queued.get(reader.peer), now)
        for reader in readers:
            if reader.since_stuck is not None and now - reader.since_stuck >= PATIENCE:
                reader.cut()


class _Reader:
    """One stream on the loop: where its reader stands, and what it has not been sent yet."""

    def __init__(self, hub: Hub, feed: Feed, sender: Sender, peer: str) -> None:
        self.feed, self.peer = feed, peer
        self.at = feed.since
        #: Has not reached the head yet.
        self.behind = True
        self.admitted_at = self._sent_at = hub.clock()
        #: Since when it was seen not to read.
        self.since_stuck: datetime | None = None
        self.task: asyncio.Task[None] | None = None
        self._hub, self._sender = hub, sender
        self._outbox = [HELLO]
        self._over = False
        self._news = asyncio.Event()
        self._unseen = 0

    async def run(self) -> None:
        try:
            while True:
                while self._outbox:
                    data = self._outbox[0]
                    self.since_stuck = self.since_stuck or self._hub.clock()
                    await self._sender.send_bytes(data)
                    self._outbox.pop(0)
                    self._unseen += len(data)
                    self._sent_at = self._hub.clock()
                    if not self.full:
                        self.since_stuck = None
                if self._over:
                    return
                if self.behind:
                    self._hub.call()
                self._news.clear()
                await self._news.wait()
        except (ProtocolClosed, ProtocolError):
            pass  # its reader is gone

    @property
    def full(self) -> bool:
        """Whether it must be seen to read before it is sent more."""
        return self._unseen >= UNSEEN_BYTES

    @property
    def ready(self) -> bool:
        """Whether it can be sent something."""
        return not self._outbox and not self._over and not self.full

    def take(self, news: News) -> None:
        if self._over:
            return
        self.at, self.behind, self._over = news.at, news.more, news.over
        if news.data:
            self._outbox.append(news.data)
        self._news.set()

    def beat(self, now: datetime) -> None:
        if self.ready and now - self._sent_at >= HEARTBEAT:
            self._outbox.append(BEAT)
            self._news.set()

    def mind(self, queued: int | None, now: datetime) -> None:
        """It was sent a lot; `queued` bytes lie in the kernel, unread. None: that is unknown."""
        if queued is None:
            self.end()  # it comes back, and by that has read
        elif queued == 0:
            self._unseen, self.since_stuck = 0, None
            self._news.set()
        else:
            self.since_stuck = self.since_stuck or now

    def end(self, last: bytes = b"") -> None:
        """Send what there is, and end."""
        if last and not self._over:
            self._outbox.append(last)
        self._over = True
        self._news.set()

    def cut(self) -> None:
        """End now."""
        if self.task is not None:
            self.task.cancel()


def install(app: Flask, deps: Deps) -> None:
    """Give `app` its hub."""
    app.extensions["streams"] = Hub(deps.store, deps.clock, pause=deps.pause)


def hub() -> Hub:
    """The hub of the application that is asked."""
    known: Hub = current_app.extensions["streams"]
    return known


async def _until(gone: Callable[[], Awaitable[None]]) -> None:
    await gone()
