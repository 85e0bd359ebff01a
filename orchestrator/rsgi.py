"""The edge under granian's own interface: reports on an event loop, everything else on threads.

A report waits for its commit, and a thread per waiting report would cost more than the report.
So reports are read and answered on the loop, and handed to the committer's thread in between.
Flask keeps its threads, and however slow one of its requests is, reports do not queue behind it.
Live streams are followed on the loop, too (see `orchestrator.streams`).

`granian --interface rsgi --factory orchestrator.wsgi:make_server`
"""

from __future__ import annotations

import asyncio
import io
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from flask import Flask
from granian.rsgi import ProtocolClosed, ProtocolError

from gpu_agent import wire
from orchestrator.api.problems import Refusal
from orchestrator.app import MAX_BODY
from orchestrator.dashboard.live import Looker
from orchestrator.streams import Feed, Hub
from orchestrator.webhook import (
    Call,
    WsgiReceiver,
    body_length,
    only_post,
    too_long,
    truncated,
)
from state import record

#: Flask's requests at once in one process; a long poll holds one, a live stream none.
THREADS = 32
_END = object()


class Headers(Protocol):
    def get(self, key: str, default: Any = None) -> Any: ...
    def items(self) -> list[tuple[str, str]]: ...


class Scope(Protocol):
    """What granian tells of a request."""

    proto: str
    http_version: str
    server: str
    client: str
    scheme: str
    method: str
    path: str
    query_string: str
    headers: Headers


class Stream(Protocol):
    async def send_bytes(self, data: bytes) -> None: ...


class Exchange(Protocol):
    """What granian lets us do with a request."""

    async def __call__(self) -> bytes: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def client_disconnect(self) -> None: ...
    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None: ...
    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None: ...
    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> Stream: ...


class _Answers:
    """Carries results from the committer's thread to the loop, a whole group at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: deque[tuple[asyncio.Future[record.Taken], Any, BaseException | None]]
        self._arrived = deque()
        self._called = False

    def put(
        self, future: asyncio.Future[record.Taken], result: Any, error: BaseException | None
    ) -> None:
        self._arrived.append((future, result, error))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        # First this, then look: what arrives after the look calls again.
        self._called = False
        while self._arrived:
            future, result, error = self._arrived.popleft()
            if future.done():  # its client is gone
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)


class _Waiting:
    """A report that waits for its commit."""

    __slots__ = ("_answers", "future", "item")

    def __init__(self, item: wire.Report, answers: _Answers, loop: asyncio.AbstractEventLoop):
        self.item, self._answers = item, answers
        self.future: asyncio.Future[record.Taken] = loop.create_future()

    def answer(self, result: record.Taken | None, error: BaseException | None = None) -> None:
        self._answers.put(self.future, result, error)


class Server:
    """An RSGI application over `app`, which `create_app` made."""

    def __init__(self, app: Flask) -> None:
        wsgi = app.wsgi_app
        if not isinstance(wsgi, WsgiReceiver):
            raise TypeError("the app must come from create_app")
        self._app, self._receiver = app, wsgi.receiver
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="web")
        self._loop: asyncio.AbstractEventLoop
        self._answers: _Answers

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._answers = loop, _Answers(loop)
        hub: Hub = self._app.extensions["streams"]
        looker: Looker = self._app.extensions["looker"]

        def end() -> None:
            hub.stop()
            looker.close()

        _before_shutdown(loop, end)

    async def __rsgi__(self, scope: Scope, exchange: Exchange) -> None:
        call = self._receiver.call(scope.method, scope.path, scope.headers.get("x-request-id", ""))
        if call is None:
            await self._flask(scope, exchange)
            return
        try:
            answer = self._receiver.taken(call, await self._take(call, scope, exchange))
        except Exception as error:  # noqa: BLE001 -- whatever arrives, the answer is a problem
            answer = self._receiver.refused(call, error)
        exchange.response_bytes(answer.status, _lower(answer.headers.items()), answer.body)

    async def _take(self, call: Call, scope: Scope, exchange: Exchange) -> record.Taken:
        only_post(call.method)
        raw = await _body(scope, exchange, wire.MAX_BODY)
        headers = {
            name: scope.headers.get(name, "")
            for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
        }
        report = self._receiver.read_known(call, raw, headers)
        if report is None:
            report = await self._loop.run_in_executor(
                self._pool, self._receiver.read, call, raw, headers
            )
        waiting = _Waiting(report, self._answers, self._loop)
        self._receiver.taker.committer.enqueue(waiting)
        # No timeout of its own: the database's statements have one, and an agent asks again.
        return await waiting.future

    async def _flask(self, scope: Scope, exchange: Exchange) -> None:
        try:
            environ = _environ(scope, await _body(scope, exchange, MAX_BODY))
        except Refusal:
            # Flask's own words for it: no byte, of more than it takes
            environ = _environ(scope, b"") | {"CONTENT_LENGTH": str(MAX_BODY + 1)}
        begun = await self._loop.run_in_executor(self._pool, _run, self._app, environ)
        if isinstance(begun.chunks, Feed):
            feed = begun.chunks
            stream = exchange.response_stream(begun.status, begun.headers)
            await feed.hub.follow(feed, stream, exchange.client_disconnect, scope.client)
        elif begun.whole:
            body = await self._loop.run_in_executor(self._pool, begun.read)
            exchange.response_bytes(begun.status, begun.headers, body)
        else:
            await self._stream(exchange.response_stream(begun.status, begun.headers), begun)

    async def _stream(self, stream: Stream, begun: _Begun) -> None:
        following = iter(begun.chunks)
        try:
            while True:
                chunk = await self._loop.run_in_executor(self._pool, next, following, _END)
                if not isinstance(chunk, bytes):
                    return
                await stream.send_bytes(chunk)
        except (ProtocolClosed, ProtocolError):
            pass  # its reader is gone
        finally:
            await self._loop.run_in_executor(self._pool, begun.close)


def _before_shutdown(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Have `end` called on `loop` as soon as granian is told to stop.

    granian waits for the answers that it has begun, and `__rsgi_del__` comes after that: a stream
    would never let it go. Its own handler sits behind the loop's wakeup descriptor, which hears of
    a signal whatever Python's handler is; so that one is free to be put before.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        # not under granian: nobody listens on the loop
        if not callable(before) or before is signal.default_int_handler:
            continue

        def first(
            number: int, frame: FrameType | None, before: Callable[..., Any] = before
        ) -> None:
            loop.call_soon_threadsafe(end)
            before(number, frame)

        signal.signal(number, first)


async def _body(scope: Scope, exchange: Exchange, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it. Raises: Refusal 400 or 413."""
    stated = body_length(scope.headers.get("content-length", ""), limit)
    try:
        if stated is not None:
            return await exchange()
        parts = bytearray()
        async for part in exchange:  # chunked: its length is known at the end
            parts += part
            if len(parts) > limit:
                raise too_long(limit)
    except ProtocolError:
        raise truncated() from None
    return bytes(parts)


def _environ(scope: Scope, body: bytes) -> dict[str, Any]:
    """What PEP 3333 wants."""
    host, _, port = scope.server.rpartition(":")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(scope.path).decode("latin-1"),
        "QUERY_STRING": scope.query_string,
        "SERVER_NAME": host,
        "SERVER_PORT": port,
        "SERVER_PROTOCOL": f"HTTP/{scope.http_version}",
        "REMOTE_ADDR": scope.client.rpartition(":")[0],
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.scheme,
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in scope.headers.items():
        key = name.upper().replace("-", "_")
        if key == "CONTENT_TYPE":
            environ[key] = value
        elif key != "CONTENT_LENGTH":
            given = environ.get(f"HTTP_{key}")
            glue = "; " if key == "COOKIE" else ","
            environ[f"HTTP_{key}"] = value if given is None else given + glue + value
    return environ


@dataclass(frozen=True, slots=True)
class _Begun:
    """An answer of Flask's whose body is still to be read."""

    status: int
    headers: list[tuple[str, str]]
    chunks: Iterable[bytes]

    @property
    def whole(self) -> bool:
        """Whether its length is known; else it is a stream."""
        return any(name == "content-length" for name, _ in self.headers)

    def read(self) -> bytes:
        try:
            return b"".join(self.chunks)
        finally:
            self.close()

    def close(self) -> None:
        close = getattr(self.chunks, "close", None)
        if close is not None:
            close()


def _run(app: Flask, environ: dict[str, Any]) -> _Begun:
    begun: list[tuple[int, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
        begun[:] = [(int(status[:3]), _lower(headers))]

    chunks = app(environ, start_response)
    return _Begun(*begun[0], chunks)


def _lower(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers]
