"""A link that logs in: once, for two minutes, with an operator's key that is good."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from infra.crypto import SecretBox
from orchestrator.api.keys import hash_of
from orchestrator.dashboard import tickets


@pytest.fixture
def browser(edge):
    """itsdangerous stamps by the wall's clock; so the edge's is set by it."""
    edge.clock.now = datetime.now(UTC)
    client = edge.client()
    client.environ_base["wsgi.url_scheme"] = "https"
    return client


def link(edge, *scopes, keys=None, **key):
    text = edge.key("ann", *(scopes or ("operator",)), **key)["Authorization"]
    hashed = hash_of(text.removeprefix("Bearer "))
    return tickets.issue(keys or edge.deps.settings.secret_keys, hashed)


def test_a_link_logs_in_once(edge, browser):
    path = link(edge)
    answer = browser.get(path.replace("next=/", "next=/new"))
    assert (answer.status_code, answer.location) == (302, "/new")
    assert "<h1>Fleet</h1>" in browser.get("/").text
    other = edge.client()
    other.environ_base["wsgi.url_scheme"] = "https"
    assert other.get(path).status_code == 401
    assert other.get("/").status_code == 302


def test_an_old_link_is_refused(edge, browser):
    path = link(edge)
    edge.clock.advance(tickets.GOOD_S + 2)
    assert browser.get(path).status_code == 401


def test_a_link_made_before_the_keys_were_rotated_is_good(edge, browser):
    old = edge.deps.settings.secret_keys[0]
    path = link(edge, keys=(old,))
    edge.deps = replace(
        edge.deps,
        settings=replace(edge.deps.settings, secret_keys=(SecretBox.new_key(), old)),
    )
    assert tickets.redeem(edge.deps, path.partition("ticket=")[2]) is not None


@pytest.mark.parametrize("wrong", ["customer", "revoked", "stranger", "garbage", "long"])
def test_what_is_no_operators_link_is_refused(edge, browser, wrong):
    path = {
        "customer": lambda: link(edge, "jobs:read", "jobs:write"),
        "revoked": lambda: link(edge, revoked=True),
        "stranger": lambda: link(edge, keys=(SecretBox.new_key(),)),
        "garbage": lambda: "/login?ticket=a.b%00.c",
        "long": lambda: "/login?ticket=" + "a" * 5000,
    }[wrong]()
    answer = browser.get(path)
    assert answer.status_code == 401
    assert "used already, or is older" in answer.text
    assert browser.get("/").status_code == 302
