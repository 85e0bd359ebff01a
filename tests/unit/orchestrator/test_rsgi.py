"""The edge on granian's interface, with granian imagined: bodies, headers, streams, silence."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from flask import Flask, Response, request
from granian.rsgi import ProtocolClosed

from gpu_agent import wire
from infra.settings import Settings
from orchestrator import streams
from orchestrator.app import MAX_BODY, create_app
from orchestrator.deps import Deps
from orchestrator.rsgi import THREADS, Server
from state import record
from state.events import Attempt, Dataset, DatasetStatus, Secret
from state.job import JobRequest
from state.memory import MemoryStore

SECRET = wire.new_secret()


class Headers:
    def __init__(self, given: list[tuple[str, str]]) -> None:
        self._given = given

    def get(self, key: str, default: Any = None) -> Any:
        return next((value for name, value in self._given if name == key), default)

    def items(self) -> list[tuple[str, str]]:
        return self._given


@dataclass
class Scope:
    method: str
    path: str
    headers: Headers
    query_string: str = ""
    proto: str = "http"
    http_version: str = "1.1"
    server: str = "127.0.0.1:8400"
    client: str = "127.0.0.1:5000"
    scheme: str = "http"


@dataclass
class Stream:
    sent: list[bytes] = field(default_factory=list)
    gone_after: int = 10**9

    async def send_bytes(self, data: bytes) -> None:
        if len(self.sent) >= self.gone_after:
            raise ProtocolClosed
        self.sent.append(data)


@dataclass
class Exchange:
    """One request's way in and out."""

    chunks: list[bytes]
    stream: Stream = field(default_factory=Stream)
    read: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    async def __call__(self) -> bytes:
        return b"".join([chunk async for chunk in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            self.read += len(chunk)
            yield chunk

    async def client_disconnect(self) -> None:
        await asyncio.Event().wait()

    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.response_bytes(status, headers, b"")

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.body = status, dict(headers), body

    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> Stream:
        self.status, self.headers = status, dict(headers)
        return self.stream


@dataclass
class House:
    app: Flask
    job: str

    def ask(
        self,
        method: str,
        path: str,
        chunks: list[bytes] | None = None,
        headers: dict[str, str] | None = None,
        *,
        chunked: bool = False,
        query: str = "",
        stream: Stream | None = None,
    ) -> Exchange:
        chunks = chunks or []
        given = list((headers or {}).items())
        if chunks and not chunked:
            given.append(("content-length", str(sum(map(len, chunks)))))
        exchange = Exchange(chunks, stream or Stream())
        scope = Scope(method, path, Headers(given), query)

        async def run() -> None:
            server = Server(self.app)
            server.__rsgi_init__(asyncio.get_running_loop())
            await server.__rsgi__(scope, exchange)

        asyncio.run(run())
        return exchange

    @property
    def path(self) -> str:
        return f"/agent/v1/jobs/{self.job}/attempts/1/reports"


class _Nothing:
    url, headers, bytes, sha256 = "", dict[str, str](), b"pyz", hashlib.sha256(b"").hexdigest()

    def presign_put(self, key: str, *, bytes: int, expires_s: int) -> _Nothing:
        return self

    def presign_get(self, key: str, *, expires_s: int) -> str:
        return ""


@dataclass(frozen=True)
class _Word:
    """A channel with one word to say."""

    jobs = ()

    def head(self, tx: Any, jobs: Any) -> int:
        return 1

    def news(self, tx: Any, since: int | None, head: int) -> streams.News:
        return streams.News(data=b"" if since else streams.message("word"), at=head)


@pytest.fixture
def house(clock: Callable[[], Any]) -> House:
    store, now = MemoryStore(), clock()
    with store.transaction() as tx:
        tx.add_dataset(Dataset(id="ds_1", owner="a", created_at=now, status=DatasetStatus.READY))
        record.create_job(
            tx,
            JobRequest(dataset_id="ds_1", base="civitai:1"),
            owner="a",
            now=now,
            job_id="job_1",
        )
        tx.add_attempt(
            Attempt(
                job="job_1",
                number=1,
                created_at=now,
                secret=Secret(SECRET),
            )
        )
    nothing = _Nothing()
    app = create_app(
        Deps(
            store=store,
            storage=nothing,
            clock=clock,
            wake=lambda task, subject: None,
            bundle=nothing,
            resolve_base=lambda request: (wire.Download(url="u", name="n", bytes=1),),
            settings=Settings(),
        )
    )

    @app.get("/test/stream")
    def stream() -> Response:
        return Response(
            (f"data: {number}\n\n" for number in range(3)), mimetype="text/event-stream"
        )

    @app.get("/test/live")
    def live() -> Response:
        return streams.hub().open(_Word(), entry=streams.Entry("hash"), owner="a").response()

    @app.route("/test/echo/<path:rest>", methods=["GET", "POST"])
    def echo(rest: str) -> Response:
        shown = {
            "rest": rest,
            "args": request.args.to_dict(flat=False),
            "cookies": request.cookies,
            "many": request.headers.get("X-Many"),
            "body": len(request.get_data()),
            "type": request.content_type,
        }
        return Response(json.dumps(shown), mimetype="application/json")

    return House(app, "job_1")


def report(clock: Any, seq: int = 1) -> tuple[bytes, dict[str, str]]:
    at = clock().timestamp()
    said = wire.Report(job="job_1", attempt=1, seq=seq, type=wire.Fact.GPU_READY, at=at)
    body = said.to_bytes()
    return body, wire.sign(body, secrets=[SECRET], webhook_id=said.webhook_id, at=at)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_report_is_taken_and_answered(house: House, clock: Any, chunked: bool) -> None:
    body, headers = report(clock)
    answer = house.ask("POST", house.path, [body[:20], body[20:]], headers, chunked=chunked)
    assert (answer.status, answer.body) == (200, b'{"orders": []}')
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_forged_report_is_a_problem(house: House, clock: Any) -> None:
    body, headers = report(clock)
    answer = house.ask("POST", house.path, [body + b" "], headers)
    assert answer.status == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert house.ask("GET", house.path).headers["allow"] == "POST"


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_are_refused_unread(house: House, chunked: bool) -> None:
    chunks = [b"x" * 100_000] * 100
    answer = house.ask("POST", house.path, chunks, chunked=chunked)
    assert answer.status == 413
    assert answer.read <= wire.MAX_BODY + 100_000 if chunked else answer.read == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_flask_refuses_what_is_too_long_for_it(house: House, chunked: bool) -> None:
    chunks = [b"x" * 1_000_000] * (MAX_BODY // 1_000_000 + 2)
    answer = house.ask("POST", "/test/echo/x", chunks, chunked=chunked)
    assert answer.status == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.read <= MAX_BODY + 1_000_000


def test_flask_sees_the_request_as_it_was_sent(house: House) -> None:
    headers = {"content-type": "text/plain", "cookie": "a=1; b=2", "x-many": "1"}
    answer = house.ask("POST", "/test/echo/a%20b/%C3%A9", [b"abc"], headers, query="q=1&q=%20x")
    assert json.loads(answer.body) == {
        "rest": "a b/\u00e9",
        "args": {"q": ["1", " x"]},
        "cookies": {"a": "1", "b": "2"},
        "many": "1",
        "body": 3,
        "type": "text/plain",
    }


def test_a_header_that_comes_twice_arrives_as_one(house: House) -> None:
    exchange = Exchange([])
    scope = Scope("GET", "/test/echo/x", Headers([("x-many", "1"), ("x-many", "2")]))

    async def run() -> None:
        server = Server(house.app)
        server.__rsgi_init__(asyncio.get_running_loop())
        await server.__rsgi__(scope, exchange)

    asyncio.run(run())
    assert json.loads(exchange.body)["many"] == "1,2"


def test_what_is_unknown_is_a_problem(house: House) -> None:
    answer = house.ask("GET", "/nowhere")
    assert answer.status == 404
    assert json.loads(answer.body)["code"] == "not_found"


def test_a_stream_goes_out_piece_by_piece(house: House) -> None:
    answer = house.ask("GET", "/test/stream")
    assert answer.status == 200
    assert answer.stream.sent == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]


def test_a_reader_who_leaves_ends_the_stream(house: House) -> None:
    answer = house.ask("GET", "/test/stream", stream=Stream(gone_after=1))
    assert answer.stream.sent == [b"data: 0\n\n"]


def test_reports_at_once_are_each_answered(house: House, clock: Any) -> None:
    exchanges = []

    async def run() -> None:
        server = Server(house.app)
        server.__rsgi_init__(asyncio.get_running_loop())
        asked = []
        for seq in range(1, 41):
            body, headers = report(clock, seq)
            given = [*headers.items(), ("content-length", str(len(body)))]
            exchange = Exchange([body])
            exchanges.append(exchange)
            asked.append(server.__rsgi__(Scope("POST", house.path, Headers(given)), exchange))
        await asyncio.gather(*asked)

    asyncio.run(run())
    assert [exchange.status for exchange in exchanges] == [200] * 40


def test_live_streams_hold_no_thread_and_end_with_the_server(house: House) -> None:
    exchanges = [Exchange([]) for _ in range(THREADS + 8)]
    beside = Exchange([])

    async def run() -> None:
        server = Server(house.app)
        server.__rsgi_init__(asyncio.get_running_loop())
        followed = [
            asyncio.ensure_future(server.__rsgi__(Scope("GET", "/test/live", Headers([])), item))
            for item in exchanges
        ]
        while not all(len(item.stream.sent) == 2 for item in exchanges):
            await asyncio.sleep(0.001)
        await server.__rsgi__(Scope("GET", "/test/echo/x", Headers([])), beside)
        assert not any(task.done() for task in followed)
        house.app.extensions["streams"].stop()
        await asyncio.gather(*followed)

    asyncio.run(run())
    assert beside.status == 200
    for item in exchanges:
        assert item.stream.sent == [streams.HELLO, b"data: word\n\n"]
        assert item.headers["cache-control"] == "no-store"
