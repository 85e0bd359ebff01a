"""Errors as RFC 9457 `application/problem+json`: one table from error class to status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Flask, Request, Response, g, has_request_context, request
from pydantic import BaseModel, Field, ValidationError
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.http import HTTP_STATUS_CODES

from gpu_agent import wire
from gpu_agent.recipe import RecipeError
from infra import logs
from state import errors

MIMETYPE = "application/problem+json"
_log = logs.logger(__name__)


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="JSON pointer into the body, or `?name` of the query")
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="for programs; never changes its spelling")
    retryable: bool = Field(description="whether the same request may succeed later")
    request_id: str
    errors: list[Fault] = []


class Refusal(Exception):
    """What an endpoint answers instead of a result."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        retryable: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.errors, self.headers = tuple(errors), dict(headers or {})
        self.retryable, self.extra = retryable, dict(extra or {})


#: The first class that an error is an instance of decides: status, code, retryable.
TABLE: tuple[tuple[type[Exception], int, str, bool], ...] = (
    (errors.NotFound, 404, "not_found", False),
    (errors.IllegalMove, 409, "illegal_move", False),
    (errors.Conflict, 409, "conflict", False),
    (errors.TokenRefused, 401, "bad_token", False),
    (wire.SignatureError, 401, "bad_signature", False),
    (RecipeError, 422, "invalid_recipe", False),
    (wire.WireError, 422, "invalid_report", False),
    (errors.StoreUnavailable, 503, "database_unavailable", True),
    (errors.StorageError, 503, "storage_unavailable", True),
    (errors.ProviderError, 503, "market_unavailable", True),
    (RecursionError, 400, "too_deep", False),
)
#: Seconds after which a 503 is worth another try.
RETRY_AFTER = 2


def refusal_of(error: Exception) -> Refusal:
    """What `error` is answered with; anything not in the table is our fault, and says nothing."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code, retryable in TABLE:
        if isinstance(error, kind):
            headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else {}
            faults = [(f"/recipe/{key}", why) for key, why in getattr(error, "faults", {}).items()]
            detail = "the body is nested too deeply" if kind is RecursionError else str(error)
            return Refusal(
                status, code, detail, errors=faults, headers=headers, retryable=retryable
            )
    return Refusal(500, "internal", "something went wrong here; it was logged", retryable=True)


def is_outage(error: BaseException) -> bool:
    """Whether `error` says that the database cannot be asked now."""
    return isinstance(error, errors.StoreUnavailable)


def title_of(status: int) -> str:
    """A status in words. Those of Python's `http` are others since 3.13, and clients know ours."""
    return HTTP_STATUS_CODES[status]


def body_of(refusal: Refusal, request_id: str) -> bytes:
    """The problem document of `refusal`."""
    problem = Problem(
        title=title_of(refusal.status),
        status=refusal.status,
        detail=refusal.detail,
        code=refusal.code,
        retryable=refusal.retryable,
        request_id=request_id,
        errors=[Fault(pointer=pointer, detail=detail) for pointer, detail in refusal.errors],
    )
    return json.dumps({**problem.model_dump(), **refusal.extra}).encode()


def respond(refusal: Refusal) -> Response:
    request_id = g.get("request_id", "") if has_request_context() else ""
    response = Response(body_of(refusal, request_id), status=refusal.status, mimetype=MIMETYPE)
    response.headers.update(refusal.headers)
    if refusal.status == 401:
        response.headers.setdefault("WWW-Authenticate", "Bearer")
    return response


def invalid(error: ValidationError) -> Response:
    """What pydantic found, as a problem; flask-openapi calls this."""
    unreadable = _unreadable(request)
    if unreadable is not None:
        return respond(unreadable)
    faults = [
        (_pointer(item["loc"]), item["msg"])
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return respond(
        Refusal(422, "invalid", "the request is not understood; see errors", errors=faults)
    )


def _pointer(where: Sequence[int | str]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in where)


def _unreadable(asked: Request) -> Refusal | None:
    if asked.method not in ("POST", "PUT", "PATCH"):
        return None
    if not asked.is_json:
        return Refusal(415, "not_json", "send the body as application/json")
    if asked.get_json(silent=True) is None:
        return Refusal(400, "bad_json", "the body is not JSON")
    return None


def install(app: Flask) -> None:
    """Answer every error of `app` as a problem."""

    def of_http(error: HTTPException) -> Response:
        if error.code is None or error.code < 400:  # a redirect of the router's
            return Response(error.get_body(), error.code, error.get_headers())
        code = title_of(error.code).lower().replace(" ", "_")
        headers: dict[str, str] = {}
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return respond(Refusal(error.code, code, error.description or code, headers=headers))

    def of_any(error: Exception) -> Response:
        refusal = refusal_of(error)
        if refusal.status >= 500 and not isinstance(error, Refusal):
            _log.error("request failed", code=refusal.code, exc_info=error)
        return respond(refusal)

    app.register_error_handler(HTTPException, of_http)
    app.register_error_handler(Exception, of_any)
