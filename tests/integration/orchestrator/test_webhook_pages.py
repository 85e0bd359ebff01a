"""The page Webhooks: endpoints with their secrets, and what became of each message."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orchestrator.api import webhook_endpoints
from orchestrator.api.auth import Caller
from orchestrator.api.webhook_endpoints import EndpointIn
from state.events import Delivery, Outgoing, OutgoingStatus
from state.memory import MemoryStore

SECRET = re.compile(r"whsec_[A-Za-z0-9+/]{20,}={0,2}")
URL = "https://shop.test/hooks"


@pytest.fixture
def store() -> MemoryStore:
    """The stores are compared where the API is tested; a page asks the same functions."""
    return MemoryStore()


@pytest.fixture
def browser(edge: Any) -> Any:
    return edge.page()


def post(edge: Any, browser: Any, path: str, **fields: Any) -> Any:
    """What a form of the page sends."""
    token = edge.csrf_of(browser.get("/webhooks"))
    return browser.post(path, data={"csrf_token": token, **fields})


def endpoint(edge: Any, url: str | None = URL, **more: Any) -> Any:
    caller = Caller(owner="alice", scopes=frozenset({"operator"}))
    return webhook_endpoints.create(edge.deps, caller, EndpointIn(url=url, **more))[0]


def owed(edge: Any, to: Any, number: int = 1, **changes: Any) -> Outgoing:
    row = Outgoing(
        **{
            "id": f"{to.id}.{number}",
            "job": to.id,
            "seq": number,
            "type": "webhook.test",
            "created_at": edge.clock(),
            "payload": {"type": "webhook.test", "data": {"note": "<script>alert(1)</script>"}},
            "status": OutgoingStatus.EXHAUSTED,
            "tries": 1,
            "ended_at": edge.clock(),
            "endpoint": to.id,
            "owner": to.owner,
            **changes,
        }
    )
    tried = Delivery(
        outgoing=row.id,
        job=row.job,
        tried_at=edge.clock(),
        answer=500,
        took_ms=7,
        error="<b>no</b>",
    )
    with edge.store.transaction() as tx:
        tx.add_outgoing([row])
        tx.log_delivery(tried)
    return row


def test_a_new_endpoint_shows_its_secret_once_and_never_again(edge: Any, browser: Any) -> None:
    form = {"url": URL, "events": ["job.completed"], "form_key": "form_1"}
    made = post(edge, browser, "/webhooks", **form)
    assert made.status_code == 200
    secret = SECRET.search(made.text)
    assert secret is not None
    with edge.store.transaction() as tx:
        [stored] = tx.endpoints(None)
        assert [item.reveal() for item in tx.webhook_secrets(stored.id)] == [secret[0]]
    assert (stored.url, stored.owner, stored.events) == (URL, "operations", ("job.completed",))
    assert not SECRET.search(browser.get("/webhooks").text)
    # the page sent again, as a browser does that is asked to load it anew
    again = post(edge, browser, "/webhooks", **form)
    assert not SECRET.search(again.text)
    with edge.store.transaction() as tx:
        assert len(tx.endpoints(None)) == 1


def test_a_rotated_secret_is_shown_once_and_the_old_one_stays_good(edge: Any, browser: Any) -> None:
    made = endpoint(edge)
    page = post(edge, browser, f"/webhooks/{made.id}/rotate", form_key="form_2")
    fresh = SECRET.search(page.text)
    assert fresh is not None
    assert fresh[0] != made.secret
    assert made.secret not in page.text
    assert "two secrets" in browser.get("/webhooks").text
    assert not SECRET.search(browser.get("/webhooks").text)
    with edge.store.transaction() as tx:
        assert len(tx.webhook_secrets(made.id)) == 2
    post(edge, browser, f"/webhooks/{made.id}/rotate", form_key="form_3")
    assert "“It leaked” ends both" in browser.get("/webhooks").text
    page = post(edge, browser, f"/webhooks/{made.id}/rotate", form_key="form_4", now="1")
    assert SECRET.search(page.text)
    with edge.store.transaction() as tx:
        assert len(tx.webhook_secrets(made.id)) == 1


def test_a_url_that_cannot_be_called_is_refused_beside_its_field(edge: Any, browser: Any) -> None:
    page = post(edge, browser, "/webhooks", url="http://shop.test/hooks", description="shop")
    assert page.status_code == 422
    assert "must begin with https://" in page.text
    assert 'value="http://shop.test/hooks"' in page.text
    with edge.store.transaction() as tx:
        assert tx.endpoints(None) == []


def test_an_endpoint_is_edited_disabled_enabled_and_deleted(edge: Any, browser: Any) -> None:
    made = endpoint(edge, events=["job.failed"])
    path = f"/webhooks/{made.id}"

    def stored() -> Any:
        with edge.store.transaction() as tx:
            return tx.endpoint(made.id)

    changed = post(edge, browser, path, url=URL + "/2", events=["job.completed", "job.failed"])
    assert changed.status_code == 303
    assert (stored().url, stored().events) == (URL + "/2", ("job.completed", "job.failed"))
    post(edge, browser, f"{path}/disable")
    assert stored().disabled_at is not None
    assert "by hand" in browser.get("/webhooks").text
    post(edge, browser, f"{path}/enable")
    assert stored().disabled_at is None
    post(edge, browser, f"{path}/delete")
    assert URL not in browser.get("/webhooks").text


def test_a_test_is_owed_at_once_and_leads_to_its_delivery(edge: Any, browser: Any) -> None:
    made = endpoint(edge)
    answer = post(edge, browser, f"/webhooks/{made.id}/test", type="job.completed")
    assert answer.status_code == 303
    page = browser.get(answer.location)
    assert "job.completed" in page.text
    assert URL in page.text
    assert post(edge, browser, f"/webhooks/{made.id}/test", type="no.such").status_code == 303
    assert "there is no event" in browser.get("/webhooks").text


def test_deliveries_are_filtered_and_replayed_under_the_same_id(edge: Any, browser: Any) -> None:
    made, other = endpoint(edge), endpoint(edge, "https://other.test/hooks")
    row = owed(edge, made)
    owed(edge, other, type="job.failed", status=OutgoingStatus.DELIVERED)
    link = f"/webhooks/deliveries/{row.id}"
    assert link in browser.get(f"/webhooks?to={made.id}&status=exhausted").text
    assert link not in browser.get(f"/webhooks?to={other.id}").text
    assert link not in browser.get("/webhooks?status=waiting").text
    answer = post(edge, browser, f"{link}/replay", back=f"/webhooks?to={made.id}")
    assert answer.location == f"/webhooks?to={made.id}"
    assert post(edge, browser, f"{link}/replay", back="//evil.test").location == "/"
    with edge.store.transaction() as tx:
        assert tx.outgoing(row.id).status is OutgoingStatus.WAITING


def test_filters_that_mean_nothing_are_refused_in_words(browser: Any) -> None:
    for query in ("status=lost", "cursor=x", "job=" + "x" * 100):
        page = browser.get(f"/webhooks?{query}")
        assert page.status_code == 422, query
        assert "<h1>" in page.text


def test_what_others_wrote_is_text_and_no_markup(edge: Any, browser: Any) -> None:
    made = endpoint(edge, description="<img src=x onerror=alert(1)>")
    row = owed(edge, made)
    listed, single = browser.get("/webhooks").text, browser.get(f"/webhooks/deliveries/{row.id}")
    assert "&lt;img src=x" in listed
    assert "<img src=x" not in listed
    assert "&lt;script&gt;alert(1)" in single.text
    assert "<script>alert" not in single.text
    assert "<b>no</b>" not in listed + single.text


def test_nothing_is_changed_without_the_pages_token(edge: Any, browser: Any) -> None:
    made = endpoint(edge)
    row = owed(edge, made)
    for path in (
        "/webhooks",
        f"/webhooks/{made.id}",
        f"/webhooks/{made.id}/rotate",
        f"/webhooks/{made.id}/delete",
        f"/webhooks/{made.id}/test",
        f"/webhooks/deliveries/{row.id}/replay",
    ):
        assert browser.post(path, data={"url": URL}).status_code == 400, path
    with edge.store.transaction() as tx:
        assert [item.id for item in tx.endpoints(None)] == [made.id]
        assert len(tx.webhook_secrets(made.id)) == 1


def test_what_is_not_there_is_said_so(edge: Any, browser: Any) -> None:
    assert browser.get("/webhooks/deliveries/we_none.1").status_code == 404
    assert post(edge, browser, "/webhooks/we_none/delete").status_code == 404
    assert "stoker listen" in browser.get("/webhooks").text
