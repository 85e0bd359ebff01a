"""What goes wrong between a client and the market: scripted, seeded, or by its rate limits.

Both are WSGI layers around the sandbox's app, so the market itself never knows of them.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from werkzeug.test import run_wsgi_app
from werkzeug.wrappers import Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Which call is which: method, path, our name.
OPERATIONS: tuple[tuple[str, str, str], ...] = (
    ("POST", r"/api/v0/bundles/?", "search"),
    ("PUT", r"/api/v0/search/asks/?", "search"),
    ("PUT", r"/api/v0/asks/\d+/?", "create"),
    ("GET", r"/api/v1/instances/?", "list"),
    ("GET", r"/api/v0/instances/\d+/?", "show"),
    ("PUT", r"/api/v0/instances/(\d+/?)?", "manage"),
    ("DELETE", r"/api/v0/instances/(\d+/?)?", "destroy"),
    ("PUT", r"/api/v0/instances/bid_price/\d+/?", "bid"),
    ("PUT", r"/api/v0/instances/request_logs/\d+/?", "logs"),
    ("GET", r"/api/v0/users/current/?", "user"),
)
#: Market seconds between two calls that Vast documents.
THRESHOLDS = {
    "search": 6.0,
    "create": 4.5,
    "show": 2.0,
    "list": 1.0,
    "manage": 1.0,
    "destroy": 3.0,
    "bid": 5.5,
}
KINDS = ("drop", "delay", "status", "html", "truncate", "answer")


def operation(method: str, path: str) -> str:
    """Our name of a call, or nothing when it is none of the market's."""
    for verb, pattern, name in OPERATIONS:
        if verb == method and re.fullmatch(pattern, "/" + path.lstrip("/")):
            return name
    return ""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of trouble for the calls `nth` to `nth + times - 1` of an operation.

    Attributes:
        op: one of `OPERATIONS`' names, or `*`.
        kind: `drop` the connection, `delay` the answer by `seconds`, answer `status` with
            nothing, `html` with 200, `truncate` the answer half way, or `answer` with `status`
            and `body`.
        after: whether the call has its effect first (`delay` and `truncate` always do).
    """

    op: str
    kind: str
    after: bool = False
    nth: int = 1
    times: int = 1
    status: int = 502
    body: Any = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        names = {name for _, _, name in OPERATIONS} | {"*"}
        if self.kind not in KINDS or self.op not in names:
            raise ValueError(f"no such fault: {self.kind} of {self.op}")


def read_faults(text: str) -> list[Fault]:
    """Faults from JSON: a list of objects with `Fault`'s fields.

    Raises:
        ValueError: the text is none; it says why.
    """
    read = json.loads(text)
    if not isinstance(read, list):
        raise ValueError("faults are a list of objects")
    try:
        return [Fault(**item) for item in read]
    except TypeError as error:
        raise ValueError(f"a fault cannot be read: {error}") from None


class FaultLayer:
    """Plays `plan`, and with the chance `rate` per call one of the usual troubles besides."""

    def __init__(
        self,
        app: WSGIApplication,
        plan: Sequence[Fault] = (),
        *,
        rate: float = 0.0,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.plan = list(plan)
        self._app, self._rate, self._sleep = app, rate, sleep
        self._random = random.Random(seed)
        self._counts: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        op = operation(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        fault = self._due(op) if op else None
        if fault is None:
            return self._app(environ, start_response)
        answer = Response(status=fault.status)
        if fault.after or fault.kind in ("delay", "truncate"):
            body, status, headers = run_wsgi_app(self._app, environ, buffered=True)
            answer = Response(b"".join(body), status, headers)
        return _spoil(fault, answer, environ, self._sleep)(environ, start_response)

    def _due(self, op: str) -> Fault | None:
        with self._lock:
            due = None
            for index, fault in enumerate(self.plan):
                if fault.op not in (op, "*"):
                    continue
                key = (fault.op, index)
                count = self._counts[key] = self._counts.get(key, 0) + 1
                if due is None and fault.nth <= count < fault.nth + fault.times:
                    due = fault
            if due is None and self._random.random() < self._rate:
                return self._any(op)
            return due

    def _any(self, op: str) -> Fault:
        kind = self._random.choice(("drop", "status", "html", "truncate"))
        after = self._random.random() < 0.5
        return Fault(op=op, kind=kind, after=after, status=self._random.choice((502, 503, 504)))


def _spoil(
    fault: Fault, answer: Response, environ: WSGIEnvironment, sleep: Callable[[float], None]
) -> Response:
    if fault.kind == "drop":
        connection = environ.get("werkzeug.socket")
        if isinstance(connection, socket.socket):
            connection.shutdown(socket.SHUT_RDWR)
        return Response(status=500)
    if fault.kind == "delay":
        sleep(fault.seconds)
        return answer
    if fault.kind == "html":
        return Response("<html><body>Please try again later</body></html>", 200)
    if fault.kind == "truncate":
        data = answer.get_data()
        return Response(data[: len(data) // 2], answer.status, mimetype="application/json")
    body = "" if fault.body is None else json.dumps(fault.body)
    return Response(body, fault.status, mimetype="application/json")


class LimitLayer:
    """Vast's minimum distance between calls, per operation and key; refused in three shapes."""

    def __init__(self, app: WSGIApplication, now: Callable[[], float]) -> None:
        self._app, self._now = app, now
        self._last: dict[tuple[str, str], float] = {}
        self._refused = 0
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        op = operation(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        threshold = THRESHOLDS.get(op, 0.0)
        who = (op, environ.get("HTTP_AUTHORIZATION", ""))
        with self._lock:
            now = self._now()
            early = threshold > 0 and now - self._last.get(who, -threshold) < threshold
            self._last[who] = now if not early else self._last[who]
            self._refused += early
            shape = self._refused % 3
        if early:
            return _throttled(shape, threshold)(environ, start_response)
        return self._app(environ, start_response)


def _throttled(shape: int, threshold: float) -> Response:
    words = f"API requests too frequent endpoint threshold={threshold}"
    bodies: tuple[str | Mapping[str, Any], ...] = (
        f"API requests too frequent: endpoint threshold={threshold}",
        {"detail": words},
        {"success": False, "error": "rate_limit_exceeded", "msg": words},
    )
    body = bodies[shape]
    if isinstance(body, str):
        return Response(body, 429, mimetype="text/plain")
    return Response(json.dumps(body), 429, mimetype="application/json")
