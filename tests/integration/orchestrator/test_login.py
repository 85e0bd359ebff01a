"""Logging in to the pages: an operator's key for a session, and nothing without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient


def browser_of(edge: Any) -> FlaskClient:
    browser: FlaskClient = edge.client()
    browser.environ_base["wsgi.url_scheme"] = "https"
    return browser


def log_in(edge: Any, browser: FlaskClient, key: str, **more: str) -> Any:
    token = edge.csrf_of(browser.get("/login"))
    return browser.post("/login", data={"key": key, "csrf_token": token, **more})


def key_of(headers: dict[str, str]) -> str:
    return headers["Authorization"].removeprefix("Bearer ")


def test_without_a_session_every_page_leads_to_the_login(edge: Any) -> None:
    answer = browser_of(edge).get("/")
    assert answer.status_code == 302
    assert answer.location == "/login"


def test_a_part_of_a_page_is_not_answered_with_a_login_form(edge: Any) -> None:
    """A swap would put the form into the middle of the page; htmx is told to go there instead."""
    answer = browser_of(edge).get("/", headers={"HX-Request": "true"})
    assert answer.status_code == 401
    assert answer.headers["HX-Redirect"] == "/login"


def test_an_operators_key_opens_the_pages(edge: Any) -> None:
    browser = browser_of(edge)
    answer = log_in(edge, browser, key_of(edge.key("ann", "operator")))
    assert (answer.status_code, answer.location) == (302, "/")
    assert "<h1>Fleet</h1>" in browser.get("/").text


@pytest.mark.parametrize(
    ("scopes", "status", "says"),
    [(("jobs:read", "jobs:write"), 403, "not an operator"), (None, 401, "no key of this")],
)
def test_other_keys_do_not(edge: Any, scopes: Any, status: int, says: str) -> None:
    browser = browser_of(edge)
    key = key_of(edge.key("ann", *scopes)) if scopes else "stk_live_unheard_of_0123456789"
    answer = log_in(edge, browser, key)
    assert answer.status_code == status
    assert says in answer.text
    assert key not in answer.text
    assert browser.get("/").status_code == 302


def test_a_revoked_key_ends_its_sessions(edge: Any) -> None:
    browser = edge.page()
    assert browser.get("/").status_code == 200
    with edge.store.transaction() as tx:
        for key in tx.api_keys():
            tx.save_api_key(replace(key, revoked_at=edge.clock()))
    assert browser.get("/").status_code == 302


def test_a_login_without_its_token_is_refused(edge: Any) -> None:
    browser = browser_of(edge)
    answer = browser.post("/login", data={"key": key_of(edge.key("ann", "operator"))})
    assert answer.status_code == 400
    assert browser.get("/").status_code == 302


def test_logging_out_ends_the_session(edge: Any) -> None:
    browser = edge.page()
    token = edge.csrf_of(browser.get("/"))
    assert browser.post("/logout").status_code == 400
    assert browser.post("/logout", data={"csrf_token": token}).status_code == 302
    assert browser.get("/").status_code == 302


@pytest.mark.parametrize("away", ["//evil.test", "https://evil.test", "/\\evil.test", ""])
def test_a_login_leads_nowhere_else(edge: Any, away: str) -> None:
    answer = log_in(edge, browser_of(edge), key_of(edge.key("ann", "operator")), next=away)
    assert answer.location == "/"


def test_cookie_and_headers_are_strict(edge: Any) -> None:
    browser = browser_of(edge)
    answer = log_in(edge, browser, key_of(edge.key("ann", "operator")))
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "Secure" in cookie
    assert "SameSite=Lax" in cookie
    page = browser.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Cache-Control"] == "no-store"
    assert "<script>" not in page.text
    assert "style=" not in page.text


def test_the_api_takes_no_cookie(edge: Any) -> None:
    """Else a page elsewhere could act in an operator's name."""
    assert edge.page().get("/v1/jobs").status_code == 401
