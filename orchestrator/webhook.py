"""The receiver of agents' reports: raw bytes, verify, apply, commit, then 2xx with orders.

It stands in front of Flask, because it carries nearly all of the traffic and needs nothing of
Flask: two thirds of a request's time would go there.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from gpu_agent import wire
from infra import logs
from orchestrator.api import problems
from orchestrator.attempt_auth import AttemptAuth
from orchestrator.group_commit import GroupCommitter
from orchestrator.metrics import Metrics
from orchestrator.waker import Waker
from state import record
from state.store import Store

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logs.logger(__name__)
ROUTE = "/agent/v1/jobs/{job}/attempts/{attempt}/reports"
_PATH = re.compile(r"/agent/v1/jobs/([A-Za-z0-9_-]{1,64})/attempts/([1-9][0-9]{0,8})/reports")
#: A report that is not on disk by then is answered with 503, and comes again.
COMMIT_TIMEOUT_S = 10.0
_HEADERS = {
    "webhook-id": "HTTP_WEBHOOK_ID",
    "webhook-timestamp": "HTTP_WEBHOOK_TIMESTAMP",
    "webhook-signature": "HTTP_WEBHOOK_SIGNATURE",
}
_NO_ORDERS = wire.answer_to_bytes(())
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def too_long(limit: int = wire.MAX_BODY) -> problems.Refusal:
    return problems.Refusal(413, "too_long", f"a body may have at most {limit} bytes")


def truncated() -> problems.Refusal:
    return problems.Refusal(400, "truncated", "the body ended early", retryable=True)


def body_length(stated: str, limit: int = wire.MAX_BODY) -> int | None:
    """What `Content-Length` says; None when there is none.

    Raises:
        Refusal: 413 when it is more than `limit`, 400 when it is no number.
    """
    if not stated:
        return None
    if not (stated.isascii() and stated.isdigit() and len(stated) < 19):
        raise problems.Refusal(400, "bad_length", "Content-Length is not a number")
    if int(stated) > limit:
        raise too_long(limit)
    return int(stated)


def read_body(environ: Mapping[str, Any]) -> bytes:
    """The body, never more than a report may have; a longer one is not read.

    Raises:
        Refusal: 413; or 400 when it ended early or its length cannot be read.
    """
    stated = body_length(environ.get("CONTENT_LENGTH") or "")
    # Without a stated length the body is chunked, and the server ends the stream.
    body: bytes = environ["wsgi.input"].read(wire.MAX_BODY + 1 if stated is None else stated)
    if len(body) > wire.MAX_BODY:
        raise too_long()
    if stated is not None and len(body) < stated:
        raise truncated()
    return body


def signed_headers(environ: Mapping[str, Any]) -> dict[str, str]:
    """The three headers of a signature, by their lower-case names; missing ones are empty."""
    return {name: environ.get(key, "") for name, key in _HEADERS.items()}


def request_id(given: str) -> str:
    """The caller's `X-Request-Id` where it is a decent one, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(10)}"


class ReportTaker:
    """Applies verified reports, several per transaction, and rings for what they need."""

    def __init__(
        self, store: Store, clock: Callable[[], datetime], waker: Waker, metrics: Metrics
    ) -> None:
        self._store, self._clock, self._waker, self._metrics = store, clock, waker, metrics
        self.committer: GroupCommitter[wire.Report, record.Taken] = GroupCommitter(
            self._apply, hopeless=problems.is_outage
        )

    def take(self, report: wire.Report) -> record.Taken:
        """What became of `report`, once that is on disk. Raises: TimeoutError, store errors."""
        return self.committer.submit(report, timeout_s=COMMIT_TIMEOUT_S)

    def _apply(self, group: Sequence[wire.Report]) -> list[record.Taken]:
        began = time.perf_counter()
        with self._store.transaction() as tx:
            results = record.take_reports(tx, group, self._clock())
        self._metrics.commit_seconds.observe(time.perf_counter() - began)
        self._metrics.group_size.observe(len(group))
        for report, taken in zip(group, results, strict=True):
            self._waker(report.job, taken.wake)
        return results


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """A request for the receiver: its method, the attempt that its URL names, and its name."""

    method: str
    job: str
    attempt: int
    name: str
    began: float = field(default_factory=time.perf_counter)


class Receiver:
    """What is done with a report, whatever brought it here: WSGI below, `rsgi` on an event loop."""

    def __init__(self, auth: AttemptAuth, taker: ReportTaker, metrics: Metrics) -> None:
        self._auth, self.taker, self._metrics = auth, taker, metrics
        self._outcomes = {item: metrics.reports.labels(item.value) for item in record.Outcome}

    def call(self, method: str, path: str, given_id: str) -> Call | None:
        """None when `path` is none of ours."""
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        return Call(method, found[1], int(found[2]), request_id(given_id))

    def read(self, call: Call, raw: bytes, headers: Mapping[str, str]) -> wire.Report:
        """The report in `raw`. May ask the database. Raises: SignatureError, WireError."""
        webhook_id = self._auth.verify(call.job, call.attempt, raw, headers)
        return _report(call, raw, webhook_id)

    def read_known(self, call: Call, raw: bytes, headers: Mapping[str, str]) -> wire.Report | None:
        """As `read`, asking nobody; None when only `read` can tell. Raises: WireError."""
        webhook_id = self._auth.verify_known(call.job, call.attempt, raw, headers)
        return None if webhook_id is None else _report(call, raw, webhook_id)

    def taken(self, call: Call, taken: record.Taken) -> Answer:
        """The answer to a report that is on disk."""
        self._outcomes[taken.outcome].inc()
        if taken.outcome in (record.Outcome.STALE, record.Outcome.UNKNOWN_JOB):
            return self.refused(call, stale())
        headers = {"Content-Type": "application/json"}
        body = wire.answer_to_bytes(taken.orders) if taken.orders else _NO_ORDERS
        return self._answer(call, 200, headers, body)

    def refused(self, call: Call, error: Exception) -> Answer:
        """The problem that `error` is answered with."""
        if isinstance(error, TimeoutError):
            error = problems.Refusal(
                503, "slow", str(error), headers={"Retry-After": "2"}, retryable=True
            )
        refusal = problems.refusal_of(error)
        with logs.bound(job=call.job, attempt=call.attempt):
            if refusal.status >= 500 and not isinstance(error, problems.Refusal):
                _log.error("report failed", code=refusal.code, exc_info=error)
            else:
                _log.info("report refused", status=refusal.status, why=refusal.detail)
        headers = {"Content-Type": problems.MIMETYPE, **refusal.headers}
        return self._answer(call, refusal.status, headers, problems.body_of(refusal, call.name))

    def _answer(self, call: Call, status: int, headers: dict[str, str], body: bytes) -> Answer:
        self._metrics.answered(call.method, ROUTE, status, time.perf_counter() - call.began)
        headers |= {"Content-Length": str(len(body)), "X-Request-Id": call.name}
        return Answer(status, headers, body)


def _report(call: Call, raw: bytes, webhook_id: str) -> wire.Report:
    report = wire.Report.from_bytes(raw)
    named = (report.job, report.attempt, report.webhook_id)
    if named != (call.job, call.attempt, webhook_id):
        raise wire.WireError("the report, its URL and its webhook-id do not agree")
    return report


def only_post(method: str) -> None:
    """Raises: Refusal 405."""
    if method != "POST":
        raise problems.Refusal(
            405, "method_not_allowed", "reports are POSTed", headers={"Allow": "POST"}
        )


class WsgiReceiver:
    """Answers reports itself, and hands everything else to `app`."""

    def __init__(self, app: WSGIApplication, receiver: Receiver) -> None:
        self._app, self.receiver = app, receiver

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        call = self.receiver.call(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_X_REQUEST_ID", "")
        )
        if call is None:
            return self._app(environ, start_response)
        answer = self._answer(call, environ)
        status = f"{answer.status} {HTTPStatus(answer.status).phrase}"
        start_response(status, list(answer.headers.items()))
        return [answer.body]

    def _answer(self, call: Call, environ: WSGIEnvironment) -> Answer:
        try:
            only_post(call.method)
            report = self.receiver.read(call, read_body(environ), signed_headers(environ))
            return self.receiver.taken(call, self.receiver.taker.take(report))
        except Exception as error:  # noqa: BLE001 -- whatever arrives, the answer is a problem
            return self.receiver.refused(call, error)


def stale() -> problems.Refusal:
    """410 with the order to stop, for an attempt that is not the current one or is over."""
    return problems.Refusal(
        410,
        "stale_attempt",
        "this attempt is over: stop, and give the machine back",
        extra={"orders": [wire.Order.STOP.value]},
    )
