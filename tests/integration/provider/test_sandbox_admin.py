"""The sandbox's admin page and its JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import requests

from infra.sandbox.faults import Fault, HostFault
from infra.sandbox.server import Sandbox, running_sandbox


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with running_sandbox(boot_s=0, admin=("127.0.0.1", 0)) as sandbox:
        yield sandbox


@pytest.fixture
def number(sandbox: Sandbox) -> int:
    (offer, *_) = sandbox.market.search({})
    body = {"image": "x", "label": "<b>job</b>", "onstart": "sleep 600"}
    contract = sandbox.market.create(offer["id"], body)
    sandbox.market.tick()
    return contract.id


def order(sandbox: Sandbox, path: str, body: Any = None, **headers: str) -> requests.Response:
    url = f"{sandbox.admin_url}/admin/api/{path}"
    return requests.post(url, json=body or {}, headers=headers, timeout=5)


def look(sandbox: Sandbox, path: str = "") -> Any:
    return requests.get(f"{sandbox.admin_url}/admin/api/{path}", timeout=5).json()


def test_machines_are_shown_with_all_their_states(sandbox: Sandbox, number: int) -> None:
    (machine,) = look(sandbox, "machines")
    assert machine["contract"] == number
    keys = ("actual_status", "intended_status", "cur_state", "next_state")
    assert {machine[key] for key in keys} == {"running"}
    assert machine["age_s"] >= 0
    assert machine["cost"] == pytest.approx(sandbox.market.contracts[number].cost, abs=1e-3)


@pytest.mark.parametrize(
    ("verb", "key", "value"),
    [
        ("outbid", "intended_status", "stopped"),
        ("lose", "actual_status", "offline"),
        ("abandon", "actual_status", "created"),
        ("stick", "actual_status", "loading"),
    ],
)
def test_a_machine_is_brought_into_trouble(
    sandbox: Sandbox, number: int, verb: str, key: str, value: str
) -> None:
    assert order(sandbox, f"machines/{number}/{verb}").json()["success"] is True
    (machine,) = look(sandbox, "machines")
    assert machine[key] == value


def test_a_lost_machine_is_found_and_a_vanished_is_not(sandbox: Sandbox, number: int) -> None:
    for verb in ("lose", "regain"):
        order(sandbox, f"machines/{number}/{verb}")
    assert look(sandbox, "machines")[0]["actual_status"] == "running"
    order(sandbox, f"machines/{number}/vanish")
    assert look(sandbox, "machines") == []
    assert order(sandbox, f"machines/{number}/lose").status_code == 404


def test_the_ledger_adds_up(sandbox: Sandbox, number: int) -> None:
    order(sandbox, f"machines/{number}/charge", {"kind": "bwu", "gb": 3})
    order(sandbox, f"machines/{number}/vanish")
    ledger = look(sandbox, "ledger")
    (row,) = ledger["contracts"]
    assert row["bwu"] == pytest.approx(3 * sandbox.market.ended[0].host.inet_up_cost)
    assert row["total"] == pytest.approx(ledger["total"])
    assert ledger["credit"] == pytest.approx(100 - ledger["total"])
    order(sandbox, "credit", {"credit": 7})
    assert look(sandbox, "ledger")["credit"] == 7


def test_a_fault_is_planned_fires_and_is_seen(sandbox: Sandbox, number: int) -> None:
    assert order(sandbox, "faults", {"op": "user", "kind": "html"}).json()["success"]
    requests.get(f"{sandbox.url}/api/v0/users/current", timeout=5)
    faults = look(sandbox, "faults")
    assert faults["planned"] == [{"op": "user", "kind": "html"}]
    assert [item["kind"] for item in faults["fired"]] == ["html"]
    assert sandbox.faults.plan == [Fault(op="user", kind="html")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("faults", {"kind": "nonsense"}),
        ("credit", {"credit": "much"}),
        ("credit", {}),
        ("machines/{number}/dance", {}),
        ("machines/{number}/charge", {"kind": "gpu", "gb": 1}),
        ("machines/5/lose", {}),
    ],
)
def test_what_cannot_be_done_is_said(
    sandbox: Sandbox, number: int, path: str, body: dict[str, Any]
) -> None:
    answer = order(sandbox, path.format(number=number), body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["success"] is False


def test_the_page_shows_it_all_without_scripts_or_strangers(sandbox: Sandbox, number: int) -> None:
    sandbox.faults.add(HostFault(kind="abandoned"))
    order(sandbox, f"machines/{number}/outbid")
    answer = requests.get(sandbox.admin_url, timeout=5)
    for words in (str(number), "&lt;b&gt;job&lt;/b&gt;", "outbid", "abandoned", "Ledger"):
        assert words in answer.text
    assert "<script" not in answer.text
    assert "style=" not in answer.text
    assert not re.search(r"(src|href)=\"(https?:)?//", answer.text)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    (sheet,) = re.findall(r'rel="stylesheet" href="([^"]+)"', answer.text)
    assert requests.get(sandbox.admin_url + sheet, timeout=5).ok


def test_its_buttons_work(sandbox: Sandbox, number: int) -> None:
    class Forms(HTMLParser):
        actions: list[str] = []  # noqa: RUF012 -- one page, one parser

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "form":
                self.actions.append(dict(attrs)["action"] or "")

    page = Forms()
    page.feed(requests.get(sandbox.admin_url, timeout=5).text)
    (lose,) = (action for action in page.actions if action.endswith("/lose/"))
    answer = requests.post(sandbox.admin_url + lose, data={"from": "page"}, timeout=5)
    assert "lose" in answer.text
    assert answer.url.startswith(sandbox.admin_url + "/?said=")
    assert sandbox.market.contracts[number].actual == "offline"


def test_another_site_cannot_press_them(sandbox: Sandbox, number: int) -> None:
    site = {"Sec-Fetch-Site": "cross-site"}
    assert order(sandbox, f"machines/{number}/vanish", **site).status_code == 403
    assert number in sandbox.market.contracts
