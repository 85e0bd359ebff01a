"""What operators are told: by the interface and by Prometheus, the same."""

from __future__ import annotations

import re
from datetime import timedelta

from state import alarms, brakes


def unwell(edge):
    """A worker that was never heard, a list that cannot be read, renting stopped."""
    now = edge.clock()
    with edge.store.transaction() as tx:
        tx.beat("reconcile", now)
        tx.beat(brakes.SWEEP, now - timedelta(seconds=30))
        tx.beat(brakes.UNREADABLE, now, {"error": "HTML", "since": now.isoformat()})
        brakes.switch(tx, stopped=True, why="prices", now=now)
    return {"worker.stale", "list.unreadable", "kill_switch.on"}


def test_operators_read_every_alarm_with_its_mend_the_critical_first(edge, client):
    red = unwell(edge)
    answer = client.get("/v1/alarms", headers=edge.key("ops", "operator"))
    told = answer.get_json()["alarms"]
    assert {item["code"] for item in told} == red
    assert [item["severity"] for item in told] == ["critical", "critical", "warning"]
    assert all(item["mend"] == alarms.MENDS[item["code"]] for item in told)


def test_customers_are_told_no_alarm(edge, client, alice):
    assert client.get("/v1/alarms", headers=alice).status_code == 403
    assert client.get("/v1/alarms").status_code == 401


def test_prometheus_sees_a_one_for_what_stands_and_a_zero_for_all_else(edge, client):
    red = unwell(edge)
    text = client.get("/metrics").get_data(as_text=True)
    gauges = dict(re.findall(r'stoker_alarm\{code="([^"]+)",severity="[^"]*"\} (\S+)', text))
    assert {code for code, value in gauges.items() if float(value)} == red
    assert set(gauges) == set(alarms.MENDS)
