"""`/v1/hosts`: what operators see of machines, and do about them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from state.events import HostRecord


@pytest.fixture
def operator(edge):
    return edge.key("ops", "operator")


def remember(edge, machine_id, **known):
    with edge.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id=machine_id, **known))


def test_only_operators_see_or_change_machines(edge, client, alice, problem):
    remember(edge, "7")
    for method, path in (
        ("GET", "/v1/hosts"),
        ("GET", "/v1/hosts/7"),
        ("POST", "/v1/hosts/7/block"),
        ("POST", "/v1/hosts/7/unblock"),
    ):
        body = {"reason": "x"} if path.endswith("/block") else None
        problem(client.open(path, method=method, json=body), 401, "unauthorized")
        problem(client.open(path, method=method, json=body, headers=alice), 403, "forbidden")
    with edge.store.transaction() as tx:
        assert not tx.host("7").blocked


def test_those_to_look_at_come_first_and_bad_names_fade(edge, client, operator):
    now = edge.clock()
    remember(edge, "good", good=9, last_seen_at=now, boot_s=80.0, steps_per_s=6.5)
    remember(edge, "bad", bad=2, last_failed_at=now, last_reason="host.boot: stuck")
    remember(edge, "long-ago", bad=2, last_failed_at=now - timedelta(days=7))
    remember(edge, "liar", bad=1, lies=1, last_failed_at=now)
    remember(edge, "blocked", blocked=True, blocked_why="hot")
    page = client.get("/v1/hosts", headers=operator).json
    assert [host["machine_id"] for host in page["data"]] == [
        "blocked",
        "liar",
        "bad",
        "long-ago",
        "good",
    ]
    by_name = {host["machine_id"]: host for host in page["data"]}
    assert (by_name["bad"]["bad"], by_name["long-ago"]["bad"]) == (2.0, 1.0)
    assert [by_name[name]["shunned"] is None for name in ("bad", "long-ago", "good")] == [
        False,
        True,
        True,
    ]
    assert by_name["bad"]["last_reason"] == "host.boot: stuck"
    assert (by_name["good"]["boot_s"], by_name["good"]["steps_per_s"]) == (80.0, 6.5)
    assert page["total"] == 5


def test_a_block_holds_until_it_is_taken_back_and_then_all_is_forgiven(edge, client, operator):
    remember(edge, "7", bad=3, lies=1, last_failed_at=edge.clock(), boot_s=70.0)
    body = {"reason": "throttles after ten minutes"}
    blocked = client.post("/v1/hosts/7/block", json=body, headers=operator)
    assert blocked.status_code == 200
    assert (blocked.json["blocked"], blocked.json["blocked_why"]) == (True, body["reason"])
    edge.clock.advance(90 * 86_400)
    assert client.get("/v1/hosts/7", headers=operator).json["shunned"] is not None
    free = client.post("/v1/hosts/7/unblock", headers=operator).json
    assert (free["blocked"], free["shunned"], free["bad"], free["lies"]) == (False, None, 0.0, 0)
    assert free["boot_s"] == 70.0


def test_a_machine_that_was_never_rented_can_be_blocked(client, operator):
    answer = client.post("/v1/hosts/4711/block", json={"reason": "heard of it"}, headers=operator)
    assert answer.json["blocked"]


def test_unknown_machines_and_blocks_without_a_reason_are_refused(client, operator, problem):
    problem(client.get("/v1/hosts/8", headers=operator), 404, "not_found")
    problem(client.post("/v1/hosts/8/unblock", headers=operator), 404, "not_found")
    problem(client.post("/v1/hosts/a%00b/block", json={"reason": "x"}, headers=operator), 404)
    for body in ({}, {"reason": ""}, {"reason": "a\x00b"}, {"reason": 7}):
        problem(client.post("/v1/hosts/8/block", json=body, headers=operator), 422)
