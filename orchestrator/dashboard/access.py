"""Who may see the pages: an operator's API key, traded for a session cookie.

The cookie holds the key's hash, signed; a revoked key ends its sessions with the next request.
Whatever changes something carries a CSRF token, in a form field or the header `X-CSRFToken`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Flask,
    Response,
    g,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask_wtf.csrf import CSRFError, CSRFProtect
from werkzeug.wrappers import Response as AnyResponse

from orchestrator.api import auth, limits
from orchestrator.api.auth import Caller
from orchestrator.api.keys import hash_of
from orchestrator.api.problems import Refusal, refusal_of
from orchestrator.dashboard import tickets
from orchestrator.deps import Deps
from state.errors import StokerError
from state.events import Secret

#: Nobody stays logged in longer than a working day.
SESSION_SPAN = timedelta(hours=12)
_KEY = "key"


def session_secrets(keys: Sequence[Secret]) -> list[bytes]:
    """What sessions are signed with, newest first: derived from the keys for secrets at rest, so
    that every web process has the same and none is stored."""
    return [
        hmac.new(key.reveal().encode(), b"stoker dashboard session", hashlib.sha256).digest()
        for key in keys
    ]


def policy_of(deps: Deps) -> str:
    """The Content-Security-Policy: nothing but our own files, and the storage for photographs."""
    storage = deps.settings.s3_endpoint
    parts = urlsplit(storage)
    origin = f" {parts.scheme}://{parts.netloc}" if parts.netloc else " https://*.amazonaws.com"
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "font-src 'self'",
            f"img-src 'self' data: blob:{origin}",
            f"connect-src 'self'{origin}",
            "form-action 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        )
    )


def secure(app: Flask, deps: Deps) -> CSRFProtect:
    """Set up sessions and CSRF tokens for `app`."""
    secrets = session_secrets(deps.settings.secret_keys)
    if secrets:
        app.secret_key = secrets[0]
        app.config["SECRET_KEY_FALLBACKS"] = secrets[1:]
    app.config.update(
        SESSION_COOKIE_NAME="stoker_session",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=deps.settings.public_url.startswith("https://"),
        PERMANENT_SESSION_LIFETIME=SESSION_SPAN,
        # the API has no cookies; only the pages' own views check tokens
        WTF_CSRF_CHECK_DEFAULT=False,
        WTF_CSRF_TIME_LIMIT=None,
        # behind a proxy that ends TLS, Flask sees http: Referer would never match
        WTF_CSRF_SSL_STRICT=False,
    )
    return CSRFProtect(app)


def _wants_page() -> bool:
    """Whether a person navigates, rather than a script of the page asking for a part of it."""
    return request.method == "GET" and "HX-Request" not in request.headers


def install(pages: Blueprint, deps: Deps, csrf: CSRFProtect) -> None:
    """Put login, logout and the guard before every other view into `pages`."""
    headers = {
        "Content-Security-Policy": policy_of(deps),
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }
    if deps.settings.public_url.startswith("https://"):
        headers["Strict-Transport-Security"] = "max-age=31536000"
    open_to_all = {f"{pages.name}.login", f"{pages.name}.static"}

    @pages.before_request
    def guard() -> AnyResponse | None:
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            csrf.protect()
        if request.endpoint in open_to_all:
            return None
        known = _caller(deps, session.get(_KEY, ""))
        if known is not None:
            g.caller = known
            return None
        session.pop(_KEY, None)
        if not _wants_page():
            away = Response(status=401)
            away.headers["HX-Redirect"] = url_for("pages.login")
            return away
        where = request.full_path.rstrip("?") if request.path != "/" else None
        return redirect(url_for("pages.login", next=where))

    @pages.after_request
    def harden(response: Response) -> Response:
        response.headers.update(headers)
        if request.endpoint == f"{pages.name}.static":
            return response
        response.headers["Cache-Control"] = "no-store"
        return response

    @pages.route("/login", methods=["GET", "POST"])
    def login() -> AnyResponse | str | tuple[str, int]:
        if ticket := request.args.get("ticket", ""):
            return follow(ticket)
        if request.method == "GET":
            return render_template("login.html", fault="", next=inside(request.args.get("next")))
        where = inside(request.form.get("next"))
        key = request.form.get("key", "").strip()
        quota, address = limits.of_app(), request.remote_addr or ""
        left = quota.look("logins", address)
        if left is not None and left.refused:
            raise limits.too_many(left, f"{left.per_minute} logins failed within a minute")
        try:
            caller = auth.authenticate(deps.store, f"Bearer {key}")
        except Refusal:
            quota.take("logins", address)
            fault = "This is no key of this installation, or it was revoked."
            return render_template("login.html", fault=fault, next=where), 401
        if not caller.operator:
            fault = (
                "This key is not an operator's. "
                "`stoker keys create NAME --scope operator` makes one."
            )
            return render_template("login.html", fault=fault, next=where), 403
        _begin(hash_of(key))
        return redirect(where)

    def follow(ticket: str) -> AnyResponse | tuple[str, int]:
        key_hash = tickets.redeem(deps, ticket) if request.method == "GET" else None
        if key_hash is None or _caller(deps, key_hash) is None:
            fault = "This link was used already, or is older than two minutes. Log in with a key."
            return render_template("login.html", fault=fault, next="/"), 401
        _begin(key_hash)
        return redirect(inside(request.args.get("next")))

    @pages.post("/logout")
    def logout() -> AnyResponse:
        session.clear()
        return redirect(url_for("pages.login"))

    @pages.errorhandler(CSRFError)
    def expired(error: CSRFError) -> tuple[str, int]:
        why = "This page is older than your login. Load it anew, and try again."
        return render_template("error.html", status=400, what=why), 400

    @pages.errorhandler(StokerError)
    @pages.errorhandler(Refusal)
    def refused(error: Exception) -> tuple[str, int, dict[str, str]]:
        refusal = refusal_of(error)
        page = render_template("error.html", status=refusal.status, what=refusal.detail)
        return page, refusal.status, refusal.headers


def _begin(key_hash: str) -> None:
    session.clear()
    session.permanent = True
    session[_KEY] = key_hash


def _caller(deps: Deps, key_hash: str) -> Caller | None:
    if not key_hash:
        return None
    with deps.store.transaction() as tx:
        key = tx.api_key_by_hash(key_hash)
    if key is None or key.revoked_at is not None:
        return None
    caller = Caller(owner=key.owner, scopes=key.scopes)
    return caller if caller.operator else None


def key_hash() -> str:
    """By what the session that asks was let in; empty for a stranger."""
    known: str = session.get(_KEY, "")
    return known


def inside(path: str | None) -> str:
    """`path`, if it stays here: one slash first, and no backslash that a browser reads as one."""
    if path and path.startswith("/") and not path.startswith("//") and "\\" not in path:
        return path
    return "/"
