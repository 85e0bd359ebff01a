"""The receiver of agents' reports: raw bytes, verify, apply, commit, then 2xx with orders.

It stands in front of Flask as a plain WSGI application, because it carries nearly all of the
traffic and needs nothing of Flask: two thirds of a request's time would go there.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def too_long() -> problems.Refusal:
    return problems.Refusal(413, "too_long", f"a body may have at most {wire.MAX_BODY} bytes")


def read_body(environ: Mapping[str, Any]) -> bytes:
    """The body, never more than a report may have; a longer one is not read.

    Raises:
        Refusal: 413; or 400 when it ended early or its length cannot be read.
    """
    stated = environ.get("CONTENT_LENGTH") or ""
    if stated and not (stated.isascii() and stated.isdigit() and len(stated) < 19):
        raise problems.Refusal(400, "bad_length", "Content-Length is not a number")
    if stated and int(stated) > wire.MAX_BODY:
        raise too_long()
    # Without a stated length the body is chunked, and the server ends the stream.
    body: bytes = environ["wsgi.input"].read(int(stated) if stated else wire.MAX_BODY + 1)
    if len(body) > wire.MAX_BODY:
        raise too_long()
    if stated and len(body) < int(stated):
        raise problems.Refusal(400, "truncated", "the body ended early", retryable=True)
    return body


def signed_headers(environ: Mapping[str, Any]) -> dict[str, str]:
    """The three headers of a signature, by their lower-case names; missing ones are empty."""
    return {name: environ.get(key, "") for name, key in _HEADERS.items()}


def request_id(environ: Mapping[str, Any]) -> str:
    """The caller's `X-Request-Id` where it is a decent one, else a new one."""
    given = environ.get("HTTP_X_REQUEST_ID", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(10)}"


class ReportTaker:
    """Applies verified reports, several per transaction, and rings for what they need."""

    def __init__(
        self, store: Store, clock: Callable[[], datetime], waker: Waker, metrics: Metrics
    ) -> None:
        self._store, self._clock, self._waker, self._metrics = store, clock, waker, metrics
        self._committer: GroupCommitter[wire.Report, record.Taken] = GroupCommitter(
            self._apply, hopeless=problems.is_outage
        )

    def take(self, report: wire.Report) -> record.Taken:
        """What became of `report`, once that is on disk. Raises: TimeoutError, store errors."""
        return self._committer.submit(report, timeout_s=COMMIT_TIMEOUT_S)

    def _apply(self, group: Sequence[wire.Report]) -> list[record.Taken]:
        began = time.perf_counter()
        with self._store.transaction() as tx:
            results = record.take_reports(tx, group, self._clock())
        self._metrics.commit_seconds.observe(time.perf_counter() - began)
        self._metrics.group_size.observe(len(group))
        for report, taken in zip(group, results, strict=True):
            self._waker(report.job, taken.wake)
        return results


class Receiver:
    """WSGI: answers POSTs of reports itself, and hands everything else to `app`."""

    def __init__(
        self,
        app: WSGIApplication,
        auth: AttemptAuth,
        taker: ReportTaker,
        metrics: Metrics,
    ) -> None:
        self._app, self._auth, self._taker, self._metrics = app, auth, taker, metrics

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        found = _PATH.fullmatch(environ["PATH_INFO"])
        if found is None:
            return self._app(environ, start_response)
        began = time.perf_counter()
        name = request_id(environ)
        headers = {"Content-Type": "application/json"}
        try:
            if environ["REQUEST_METHOD"] != "POST":
                raise problems.Refusal(
                    405, "method_not_allowed", "reports are POSTed", headers={"Allow": "POST"}
                )
            status, body = self._receive(environ, found[1], int(found[2]))
        except Exception as error:  # noqa: BLE001 -- whatever arrives, the answer is a problem
            refusal = self._refusal(error, found[1], int(found[2]))
            status, body = refusal.status, problems.body_of(refusal, name)
            headers = {"Content-Type": problems.MIMETYPE, **refusal.headers}
        self._metrics.requests.labels(environ["REQUEST_METHOD"], ROUTE, status).inc()
        self._metrics.seconds.labels(ROUTE).observe(time.perf_counter() - began)
        headers |= {"Content-Length": str(len(body)), "X-Request-Id": name}
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [body]

    def _receive(self, environ: WSGIEnvironment, job: str, attempt: int) -> tuple[int, bytes]:
        raw = read_body(environ)
        webhook_id = self._auth.verify(job, attempt, raw, signed_headers(environ))
        report = wire.Report.from_bytes(raw)
        if (report.job, report.attempt) != (job, attempt) or report.webhook_id != webhook_id:
            raise wire.WireError("the report, its URL and its webhook-id do not agree")
        taken = self._taker.take(report)
        self._metrics.reports.labels(taken.outcome.value).inc()
        if taken.outcome in (record.Outcome.STALE, record.Outcome.UNKNOWN_JOB):
            raise stale()
        return 200, wire.answer_to_bytes(taken.orders)

    def _refusal(self, error: Exception, job: str, attempt: int) -> problems.Refusal:
        if isinstance(error, TimeoutError):
            error = problems.Refusal(
                503, "slow", str(error), headers={"Retry-After": "2"}, retryable=True
            )
        refusal = problems.refusal_of(error)
        with logs.bound(job=job, attempt=attempt):
            if refusal.status >= 500 and not isinstance(error, problems.Refusal):
                _log.error("report failed", code=refusal.code, exc_info=error)
            else:
                _log.info("report refused", status=refusal.status, why=refusal.detail)
        return refusal


def stale() -> problems.Refusal:
    """410 with the order to stop, for an attempt that is not the current one or is over."""
    return problems.Refusal(
        410,
        "stale_attempt",
        "this attempt is over: stop, and give the machine back",
        extra={"orders": [wire.Order.STOP.value]},
    )
