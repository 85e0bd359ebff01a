"""Streams on the loop, with sockets, time and channels imagined."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from granian.rsgi import ProtocolClosed

from orchestrator import streams
from orchestrator.api.problems import Refusal
from orchestrator.peers import queued_bytes
from orchestrator.streams import BEAT, HELLO, Entry, Feed, Hub, News
from state.errors import StoreUnavailable
from state.events import ApiKey
from state.job import Job
from state.memory import MemoryStore
from state.store import Transaction

ENTRY = Entry("hash")
PEER = "127.0.0.1:5000"


@dataclass(eq=False)
class Board:
    """A channel: a list of words, and how often it was asked."""

    words: list[str] = field(default_factory=list)
    heads: int = 0
    told: list[int] = field(default_factory=list)
    at_once: int = 100
    over: bool = False
    fault: Exception | None = None

    @property
    def jobs(self) -> Collection[str]:
        return ()

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> int:
        self.heads += 1
        if self.fault is not None:
            raise self.fault
        return len(self.words)

    def news(self, tx: Transaction, since: int, head: int) -> News:
        self.told.append(since)
        until = min(head, since + self.at_once)
        data = b"".join(streams.message(word) for word in self.words[since:until])
        return News(data=data, at=until, more=until < head, over=self.over and until == head)


class Store:
    """In memory, and sometimes away."""

    def __init__(self) -> None:
        self.real, self.away = MemoryStore(), False

    def transaction(self) -> AbstractContextManager[Transaction]:
        if self.away:
            raise StoreUnavailable("nobody is there")
        return self.real.transaction()

    def close(self) -> None: ...


@dataclass
class Socket:
    """Where a stream goes to; whoever reads it may stop."""

    sent: list[bytes] = field(default_factory=list)
    blocked: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def send_bytes(self, data: bytes) -> None:
        if self.gone.is_set():
            raise ProtocolClosed
        if self.blocked:
            await asyncio.Event().wait()
        self.sent.append(data)

    async def disconnect(self) -> None:
        await self.gone.wait()

    @property
    def words(self) -> list[str]:
        text = b"".join(chunk for chunk in self.sent if chunk not in (HELLO, BEAT)).decode()
        return [block.removeprefix("data: ") for block in text.split("\n\n") if block]


class Stage:
    """A hub whose seconds pass when the test says so."""

    def __init__(self, clock: Any, **limits: int) -> None:
        self.clock, self.store = clock, Store()
        self.queued: dict[str, int] = {}
        with self.store.transaction() as tx:
            tx.add_api_key(
                ApiKey(
                    id="key_1",
                    owner="a",
                    name="",
                    hash=ENTRY.key_hash,
                    scopes=frozenset({"jobs:read"}),
                    created_at=clock(),
                )
            )
        self._due: list[asyncio.Event] = []
        self.hub = Hub(
            self.store,
            clock,
            pause=clock.advance,
            rest=self._rest,
            unread=lambda peers: {peer: self.queued[peer] for peer in peers & self.queued.keys()},
            **limits,
        )

    async def _rest(self, seconds: float) -> None:
        self._due.append(asyncio.Event())
        await self._due[-1].wait()

    def open(self, board: Board, since: int = 0, owner: str = "a") -> Feed:
        return self.hub.open(board, since=since, entry=ENTRY, owner=owner)

    def follow(
        self, board: Board, since: int = 0, socket: Socket | None = None
    ) -> tuple[Socket, asyncio.Task[None]]:
        socket = socket or Socket()
        stream = self.hub.follow(self.open(board, since), socket, socket.disconnect, PEER)
        return socket, asyncio.get_running_loop().create_task(stream)

    async def until(self, happened: Callable[[], bool]) -> None:
        for _ in range(30_000):
            if happened():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it never happened")

    async def seconds(self, count: int = 1) -> None:
        """So many ticks, each of them done with."""
        for _ in range(count):
            await self.until(lambda: bool(self._due) and not self._due[-1].is_set())
            self.clock.advance(1)
            known = len(self._due)
            self._due[-1].set()
            await self.until(
                lambda known=known: len(self._due) > known or not self.hub.open_streams
            )


Story = Callable[[Stage], Awaitable[None]]


@pytest.fixture
def play(clock: Any) -> Callable[..., None]:
    def run(story: Story, **limits: int) -> None:
        async def whole() -> None:
            await story(Stage(clock, **limits))

        asyncio.run(whole())

    return run


def test_all_readers_of_a_channel_share_a_look_and_its_words(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board = Board(["a"])
        sockets = [stage.follow(board)[0] for _ in range(20)]
        await stage.until(lambda: all(socket.words == ["a"] for socket in sockets))
        heads, told = board.heads, len(board.told)
        board.words += ["b", "c"]
        await stage.seconds()
        await stage.until(lambda: all(socket.words == ["a", "b", "c"] for socket in sockets))
        assert (board.heads - heads, len(board.told) - told) == (1, 1)

    play(story)


def test_whoever_comes_back_is_caught_up_and_then_goes_along(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board = Board([str(number) for number in range(1000)], at_once=30)
        early, _ = stage.follow(board, since=995)
        await stage.until(lambda: early.words == ["995", "996", "997", "998", "999"])
        late, _ = stage.follow(board, since=500)
        await stage.until(lambda: late.words == board.words[500:])  # within one tick
        board.words.append("1000")
        await stage.seconds()
        await stage.until(lambda: late.words == board.words[500:])
        assert early.words == board.words[995:]

    play(story)


def test_a_channel_nobody_follows_is_not_asked(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board, other = Board(), Board()
        socket, task = stage.follow(board)
        stage.follow(other)
        await stage.seconds()
        socket.gone.set()
        await task
        asked = board.heads
        await stage.seconds(3)
        assert board.heads == asked
        assert other.heads >= 4

    play(story)


def test_a_stream_that_is_over_ends(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board = Board(["a", "b"], at_once=1, over=True)
        socket, task = stage.follow(board)
        await task
        assert socket.words == ["a", "b"]
        assert stage.hub.open_streams == 0

    play(story)


def test_silence_is_broken_every_fifteen_seconds(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        socket, _ = stage.follow(Board())
        await stage.seconds(46)
        assert socket.sent == [HELLO, BEAT, BEAT, BEAT]

    play(story)


def test_a_reader_who_is_gone_counts_no_longer(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        socket, task = stage.follow(Board())
        await stage.seconds()
        assert stage.hub.open_streams == 1
        socket.gone.set()
        await task
        assert stage.hub.open_streams == 0

    play(story)


def test_a_reader_whose_line_is_blocked_is_cut_off(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board = Board(["a"])
        slow, cut = stage.follow(board, socket=Socket(blocked=True))
        other, _ = stage.follow(board)
        await stage.seconds(29)
        assert not cut.done()
        await stage.seconds(2)
        await cut
        assert (slow.sent, other.words) == ([], ["a"])

    play(story)


def test_who_does_not_read_holds_little_and_is_cut_off(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        stage.queued[PEER] = 50_000
        board = Board()
        socket, cut = stage.follow(board)
        for _ in range(29):
            board.words.append("x" * 100_000)
            await stage.seconds()
        assert sum(map(len, socket.sent)) < streams.UNSEEN_BYTES + 200_000
        while not cut.done():
            await stage.seconds()

    play(story)


def test_a_slow_reader_goes_on_where_it_was_once_it_has_read(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        stage.queued[PEER] = 50_000
        board = Board(["x" * streams.UNSEEN_BYTES])
        socket, task = stage.follow(board)
        await stage.until(lambda: len(socket.words) == 1)
        board.words += ["b", "c"]
        await stage.seconds(5)
        assert len(socket.words) == 1
        stage.queued[PEER] = 0
        await stage.seconds(2)
        await stage.until(lambda: socket.words[1:] == ["b", "c"])
        assert not task.done()

    play(story)


def test_who_cannot_be_seen_to_read_comes_back_instead(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        _, task = stage.follow(Board(["x" * streams.UNSEEN_BYTES]))
        await stage.seconds(2)
        await task

    play(story)


def test_an_outage_pauses_streams_and_loses_nothing(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        board = Board(["a"])
        socket, task = stage.follow(board)
        await stage.until(lambda: socket.words == ["a"])
        stage.store.away = True
        board.words.append("b")
        fresh, _ = stage.follow(board)
        await stage.seconds(20)
        assert socket.sent[-1] == BEAT
        assert fresh.words == []
        stage.store.away = False
        await stage.seconds()
        await stage.until(lambda: socket.words == fresh.words == ["a", "b"])
        assert not task.done()

    play(story)


def test_one_channels_fault_ends_no_other_stream(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        good, bad = Board(["a"]), Board(fault=ZeroDivisionError())
        socket, _ = stage.follow(good)
        broken, task = stage.follow(bad)
        await task
        assert b'"broken"' in broken.sent[-1]
        await stage.until(lambda: socket.words == ["a"])

    play(story)


def test_a_revoked_key_ends_its_streams_within_a_minute(
    play: Callable[..., None], clock: Any
) -> None:
    async def story(stage: Stage) -> None:
        socket, task = stage.follow(Board())
        await stage.seconds(40)
        with stage.store.transaction() as tx:
            (key,) = tx.api_keys()
            tx.save_api_key(_revoked(key, clock()))
        revoked_at: datetime = clock()
        while not task.done():
            await stage.seconds()
        assert clock() - revoked_at <= timedelta(minutes=1)
        assert b'"unauthorized"' in socket.sent[-1]

    play(story)


def _revoked(key: ApiKey, at: datetime) -> ApiKey:
    return ApiKey(
        id=key.id,
        owner=key.owner,
        name=key.name,
        hash=key.hash,
        scopes=key.scopes,
        created_at=key.created_at,
        revoked_at=at,
    )


def test_the_end_of_the_process_ends_its_streams(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        streams_ = [stage.follow(Board(["a"])) for _ in range(5)]
        await stage.until(lambda: all(socket.words == ["a"] for socket, _ in streams_))
        stage.hub.stop()
        await asyncio.gather(*(task for _, task in streams_))
        with pytest.raises(Refusal) as refused:
            stage.open(Board())
        assert refused.value.status == 503

    play(story)


def test_a_process_takes_so_many_streams_and_no_more(play: Callable[..., None]) -> None:
    async def story(stage: Stage) -> None:
        held = [stage.open(Board(), owner=owner) for owner in "ab"]
        with pytest.raises(Refusal) as refused:
            stage.open(Board(), owner="a")
        assert refused.value.status == 429
        held.append(stage.open(Board(), owner="c"))
        with pytest.raises(Refusal) as refused:
            stage.open(Board(), owner="d")
        assert refused.value.status == 503
        assert refused.value.headers["Retry-After"]
        del refused
        held.clear()  # dropped unread, as an answer to HEAD is
        stage.open(Board(), owner="d")

    play(story, most=3, most_of_one=1)


def test_a_message_of_many_lines_is_one_message() -> None:
    assert streams.message("<a>\n</a>", event="x", id="7") == (
        b"id: 7\nevent: x\ndata: <a>\ndata: </a>\n\n"
    )


def test_what_the_kernel_knows_of_a_peer_is_found(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n"
    four, six = tmp_path / "tcp", tmp_path / "tcp6"
    four.write_text(
        head
        + "   0: 0100007F:20D0 0100007F:1388 01 0000C350:00000000 00:00000000 00000000 0 0 1\n"
        + "   1: 0100007F:20D0 0200000A:1389 01 00000000:00000000 00:00000000 00000000 0 0 1\n"
    )
    mapped = "0000000000000000FFFF00000100007F"
    six.write_text(head + f"   0: {mapped}:20D0 {mapped}:138A 01 00000010:00000000 00:0 0 0 0 1\n")
    peers = ["127.0.0.1:5000", "10.0.0.2:5001", "[::ffff:127.0.0.1]:5002", "127.0.0.1:9", "unix:"]
    assert queued_bytes(peers, (four, six, tmp_path / "none")) == {
        "127.0.0.1:5000": 50_000,
        "10.0.0.2:5001": 0,
        "[::ffff:127.0.0.1]:5002": 16,
    }
