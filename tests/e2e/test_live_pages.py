"""Money & hosts and Webhooks in a browser stay true while somebody looks at them: nothing is loaded
anew, nothing is asked again and again, and nothing that somebody types is lost."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Page, Request, expect

from stand.browser import Reader

#: Of a web process that is killed on purpose.
KILLED = ("net::ERR_", "htmx:sse:error: network error", "htmx:sse:error: Failed to fetch")


def open_page(reader: Reader, key: str, path: str) -> tuple[Page, list[str]]:
    """A page of the operator, once its stream is open; and what it asks for from then on, but for
    the market's word, which is asked once and takes longer than the page."""
    page = reader.tab()
    reader.log_in(page, key)
    with page.expect_response("**/live/**") as stream:
        page.goto(reader.url + path)
    assert stream.value.ok
    asked: list[str] = []

    def note(request: Request) -> None:
        if request.resource_type in ("document", "fetch", "xhr"):
            asked.append(urlsplit(request.url).path)

    page.on("request", note)
    return page, asked


def test_what_is_rented_and_blocked_comes_onto_money(reader: Reader, key: str, stoker: Any) -> None:
    page, asked = open_page(reader, key, "/money")
    job = stoker.order()
    rented = page.locator("#now tbody tr").filter(has_text=job)
    expect(rented).to_be_visible()
    (lease,) = stoker.leases(job)
    stoker.client.post(f"/v1/hosts/{lease.machine_id}/block", {"reason": "throttles <b>badly</b>"})
    host = page.locator(f"#host-{lease.machine_id}")
    expect(host).to_contain_text("blocked throttles <b>badly</b>")
    reader.inspect(page, "money-live")
    stoker.client.post(f"/v1/hosts/{lease.machine_id}/unblock")
    expect(host).to_contain_text("may be rented")
    stoker.client.post(f"/v1/jobs/{job}/cancel")
    expect(rented).to_have_count(0)
    expect(page.locator("#spend tbody tr").first).to_be_attached()
    assert set(asked) <= {"/money/market"}


def test_a_delivery_comes_onto_webhooks_and_an_open_form_stays(
    reader: Reader, key: str, stoker: Any, customer: Any
) -> None:
    place = {"url": customer.url, "secret": customer.secret}
    made = stoker.client.post("/v1/webhook-endpoints", place)
    page, asked = open_page(reader, key, "/webhooks")
    row = page.locator(f"#{made['id']}")
    row.get_by_role("button", name="Edit").click()
    form = page.locator(f"#edit-{made['id']}")
    form.get_by_label("What it is for").fill("half a sen")
    sent = stoker.client.post(f"/v1/webhook-endpoints/{made['id']}/test")
    delivery = page.locator(f"[id='delivery-{sent['id']}']")
    expect(delivery).to_contain_text("HTTP 2")
    stoker.client.call(
        "PATCH", f"/v1/webhook-endpoints/{made['id']}", json={"events": ["job.failed"]}
    )
    expect(row).to_contain_text("1 of ")
    expect(form.get_by_label("What it is for")).to_have_value("half a sen")
    form.get_by_role("button", name="Leave it").click()
    reader.inspect(page, "webhooks-live")
    assert asked == []


def test_webhooks_are_true_again_after_the_web_process_was_killed(
    reader: Reader, key: str, stoker: Any
) -> None:
    page, _ = open_page(reader, key, "/webhooks")
    page.evaluate("window.same = true")
    lost = page.get_by_text("Reconnecting…")
    stoker.kill("web")
    expect(lost).to_be_visible()
    made = stoker.client.post("/v1/webhook-endpoints", {"url": "https://shop.test/hooks"})
    expect(page.locator(f"#{made['id']}")).to_contain_text("https://shop.test/hooks")
    expect(lost).to_be_hidden()
    assert page.evaluate("window.same"), "the page was loaded anew"
    reader.faults = [item for item in reader.faults if not any(line in item for line in KILLED)]
