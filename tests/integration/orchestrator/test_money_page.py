"""The page Money & hosts: what operators see of it, and what its buttons do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.api.spend import SpendRow
from orchestrator.dashboard.money import bars
from state import brakes
from state.events import HostRecord
from state.memory import MemoryStore
from state.orphan import Orphan
from state.spending import Split


@pytest.fixture
def store() -> MemoryStore:
    """The stores are compared where the API is tested; a page asks the same functions."""
    return MemoryStore()


@pytest.fixture
def browser(edge: Any) -> Any:
    return edge.page()


def post(edge: Any, browser: Any, path: str, **fields: str) -> Any:
    token = edge.csrf_of(browser.get("/money"))
    return browser.post(path, data={"csrf_token": token, **fields})


def remember(edge: Any, machine_id: str, **known: Any) -> None:
    with edge.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id=machine_id, **known))


def beat(edge: Any, name: str, ago: timedelta, **said: Any) -> None:
    with edge.store.transaction() as tx:
        tx.beat(name, edge.clock() - ago, said)


def test_an_empty_installation_says_what_comes_here(browser: Any) -> None:
    page = browser.get("/money").text
    assert "Nothing is rented; nothing burns." in page
    assert "No machine was rented yet." in page
    assert "STOKER_MAX_PER_DAY" in page


def test_what_is_rented_and_why_stands_there_with_balance_and_runway(
    edge: Any, browser: Any
) -> None:
    job = edge.job()
    edge.rent(job)  # 0.36 dollars an hour
    beat(edge, brakes.CREDIT, timedelta(seconds=30), credit=3_600_000)
    page = browser.get("/money").text
    assert job.id in page
    assert "its agent has not said hello yet" in page
    assert "$3.60" in page
    assert "10 h 00 min" in page


def test_a_sweep_that_is_long_ago_is_called_stale(edge: Any, browser: Any) -> None:
    stranger = {
        "instance": "77",
        "label": "<script>x</script>",
        "machine": "5",
        "age_s": 90,
        "price": 1,
        "verdict": "suspect",
        "why": "no lease owns it",
    }
    for ago, word in ((4, "fresh"), (4000, "stale")):
        beat(edge, brakes.SWEEP, timedelta(seconds=ago), seen=2, ours=1, strangers=[stranger])
        page = browser.get("/money").text
        assert f"</span> {word}</span>" in page
    assert "no lease owns it" in page
    assert "<script>x" not in page


def test_a_block_needs_a_reason_and_holds(edge: Any, browser: Any) -> None:
    remember(edge, "7", gpu_name="RTX 4090", good=3)
    post(edge, browser, "/money/hosts/block", machine_id="7", reason="  ")
    assert "Say why" in browser.get("/money").text
    with edge.store.transaction() as tx:
        assert not tx.host("7").blocked
    answer = post(edge, browser, "/money/hosts/block", machine_id="7", reason="throttles")
    assert answer.status_code == 303
    page = browser.get("/money").text
    assert "blocked" in page
    assert "throttles" in page
    post(edge, browser, "/money/hosts/unblock", machine_id="7")
    with edge.store.transaction() as tx:
        assert not tx.host("7").blocked


def test_what_hosts_and_operators_said_is_text_and_no_markup(edge: Any, browser: Any) -> None:
    evil = "<img src=x onerror=alert(1)>"
    remember(edge, "8", gpu_name=evil, geo=evil, last_reason=evil, blocked=True, blocked_why=evil)
    page = browser.get("/money").text
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page


def test_without_a_market_the_machines_are_shown_all_the_same(edge: Any, browser: Any) -> None:
    remember(edge, "7", gpu_name="RTX 4090")
    assert "RTX 4090" in browser.get("/money").text
    part = browser.get("/money/market").text
    assert 'id="market-7"' in part
    assert "not known now" in part
    assert "<html" not in part


def test_renting_is_stopped_with_a_reason_and_resumed(edge: Any, browser: Any) -> None:
    post(edge, browser, "/renting/stop", back="money", why="prices are \0mad")
    page = browser.get("/money").text
    assert "prices are mad" in page
    assert "Resume renting" in page
    post(edge, browser, "/renting/resume", back="money")
    assert "Stop renting" in browser.get("/money").text


def test_a_sweep_is_asked_for_and_a_dry_run_without_a_market_says_why(
    edge: Any, browser: Any
) -> None:
    post(edge, browser, "/sweep", back="money")
    assert "within seconds" in browser.get("/money").text
    post(edge, browser, "/money/sweep")
    assert "no market to ask" in browser.get("/money").text


def test_nothing_is_changed_without_the_pages_token(edge: Any, browser: Any) -> None:
    remember(edge, "7")
    for path in ("/renting/stop", "/money/sweep", "/money/hosts/block", "/money/hosts/unblock"):
        fields = {"machine_id": "7", "reason": "x"}
        assert browser.post(path, data=fields).status_code == 400
    with edge.store.transaction() as tx:
        assert not tx.host("7").blocked
        assert brakes.RENTING not in tx.beats()


def test_money_is_grouped_by_what_there_is(edge: Any, browser: Any) -> None:
    edge.rent(edge.job())
    edge.clock.advance(60)
    for group, key in (("host", "m1"), ("gpu", "RTX 4090"), ("owner", "alice"), ("day", "20")):
        page = browser.get(f"/money?by={group}&days=7").text
        assert f'<th scope="row" class="mono">{key}' in page, group
    for query in ("days=8", "days=x", "by=moon"):
        assert browser.get(f"/money?{query}").status_code == 422, query


def test_what_orphans_cost_stands_in_the_chart_its_legend_and_the_table(
    edge: Any, browser: Any
) -> None:
    now = edge.clock()
    orphan = Orphan(
        id="7",
        label="stoker/x/1-0",
        machine_id="<m9>",
        price=360_000,
        started_at=now - timedelta(hours=1),
        seen_at=now,
    )
    with edge.store.transaction() as tx:
        tx.save_orphan(orphan)
    page = browser.get("/money?days=7").text
    assert 'class="m-orphan"' in page
    assert "orphan $0.36" in page
    assert '<th scope="col" class="num">Orphan' in page
    assert f'<th scope="row" class="mono">{now.date()}' in page
    assert '<th scope="row" class="mono">&lt;m9&gt;' in browser.get("/money?by=host").text


def test_a_bar_is_as_high_as_its_money_and_the_axis_is_round() -> None:
    days = [Split(), Split(1, training=300_000, boot=100_000), Split(1, failed=70_000)]
    drawn, top = bars([SpendRow.of(f"2026-11-0{n}", day) for n, day in enumerate(days, 1)])
    assert top == 500_000
    assert [len(bar.blocks) for bar in drawn] == [0, 2, 1]
    training, boot = drawn[1].blocks
    assert (training.height, boot.height) == (60.0, 20.0)
    assert (training.y, boot.y) == (40.0, 20.0)
    assert bars([SpendRow.of("2026-11-01", Split())])[1] == 0
