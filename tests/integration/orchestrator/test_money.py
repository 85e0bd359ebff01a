"""What operators see of money: every machine, what it cost, and what for."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from orchestrator.api.ids import new_id
from state import brakes, money
from state.job import Status
from state.lease import Lease, LeaseStatus
from state.renting import LOST_RACE

KINDS = ("training", "boot", "failed", "other")
GROUPS = ("day", "host", "gpu", "job", "owner")
PATHS = ("instances", "spend", "account")


@pytest.fixture
def ops(edge):
    return edge.key("operations", "operator")


@pytest.fixture
def ask(edge, client, ops):
    def get(path, **query):
        answer = client.get(f"/v1/{path}", query_string=query, headers=ops)
        assert answer.status_code == 200, answer.text
        return answer.get_json()

    return get


@pytest.fixture
def lease(edge):
    """Writes down a lease that began `ago`."""

    def make(job, ago=timedelta(hours=1), **changes):
        began = edge.clock() - ago
        values = {
            "id": new_id("ls", began),
            "job": job.id,
            "attempt": job.attempt,
            "created_at": began,
            "rented_at": began,
            "expires_at": began + timedelta(hours=12),
            "status": LeaseStatus.RENTED,
            "machine_id": "m1",
            "gpu_name": "RTX 4090",
            "price": 360_000,
            "why": "its job is running on it",
        } | changes
        made = Lease(label=f"test/{values['id']}", **values)
        with edge.store.transaction() as tx:
            tx.add_lease(made)
        return made

    return make


def over(edge, ago=timedelta(hours=1), lasted=timedelta(minutes=30), **changes):
    """What a lease says that began `ago` and `lasted`."""
    began = edge.clock() - ago
    end = began + lasted
    gone = {"releasing_at": end, "ended_at": end, "released_at": end, "running_at": began}
    return {"ago": ago, "status": LeaseStatus.RELEASED, **gone, **changes}


def become(edge, job, **changes):
    with edge.store.transaction() as tx:
        tx.save_job(tx.job(job.id).evolve(**changes))


# --- who may ask, and what --------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_customers_are_not_told_of_machines_and_money(client, alice, problem, path):
    problem(client.get(f"/v1/{path}", headers=alice), 403, "forbidden")
    problem(client.get(f"/v1/{path}"), 401, "unauthorized")


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"group_by": "moon"}, "/group_by"),
        ({"group_by": ""}, "/group_by"),
        ({"since": "yesterday"}, "/since"),
        ({"since": "0001-01-01"}, "/since"),
        ({"until": "9999-12-31T23:59:59Z"}, "/until"),
        ({"limit": "0"}, "/limit"),
        ({"color": "red"}, "/color"),
        ({"since": "2026-01-02", "until": "2026-01-02"}, "?since"),
        ({"since": "2020-01-01", "until": "2026-01-01"}, "?since"),
    ],
)
def test_a_garbled_question_about_money_is_told_what_is_wrong(client, ops, problem, query, pointer):
    body = problem(client.get("/v1/spend", query_string=query, headers=ops), 422)
    assert [fault["pointer"] for fault in body["errors"]] == [pointer]


# --- spend ------------------------------------------------------------------------------------


def test_nothing_spent_is_a_row_of_zeros_for_each_day(ask):
    spent = ask("spend", since="2026-01-01", until="2026-01-04T12:00:00Z")
    assert [row["key"] for row in spent["data"]] == [f"2026-01-0{n}" for n in (1, 2, 3, 4)]
    assert {row["total"] for row in spent["data"]} == {0}
    assert spent["total"]["per_completed"] is None


def test_money_is_told_apart_by_what_it_went_into(edge, ask, lease):
    done = edge.job(owner="alice")
    half = over(edge, ready_at=edge.clock() - timedelta(minutes=54))  # 6 of its 30 minutes
    won = lease(done, **half, cost=1_000_000)
    lease(done, **over(edge, hedge=True, why=LOST_RACE), cost=70_000)
    become(edge, done, status=Status.COMPLETED, lease=won.id)
    lost = edge.job(owner="bob")
    lease(lost, **over(edge, machine_id="m2"), cost=30_000)
    become(edge, lost, status=Status.FAILED)
    called_off = edge.job(owner="bob")
    lease(called_off, **over(edge, why="its job is cancelled"), cost=5_000)
    become(edge, called_off, status=Status.CANCELLED)

    total = ask("spend")["total"]
    assert {kind: total[kind] for kind in KINDS} == {
        "training": 800_000,
        "boot": 200_000,
        "failed": 30_000,
        "other": 75_000,
    }
    assert (total["machines"], total["completed"]) == (4, 1)
    assert total["per_completed"] == total["total"] == 1_105_000

    by_owner = {row["key"]: row["total"] for row in ask("spend", group_by="owner")["data"]}
    assert by_owner == {"alice": 1_070_000, "bob": 35_000}
    by_host = ask("spend", group_by="host")["data"]
    assert [row["key"] for row in by_host] == ["m1", "m2"]  # the dearest first
    assert ask("spend", group_by="job", limit=1)["left_out"] == 2


def test_a_retried_attempt_is_money_lost_and_a_machine_that_boots_is_not(edge, ask, lease):
    job = edge.job()
    lease(job, **over(edge, ready_at=edge.clock() - timedelta(minutes=50)), cost=90_000)
    become(edge, job, attempt=2)
    lease(edge.stored(job.id), timedelta(minutes=10))  # 0.36 $/h
    total = ask("spend")["total"]
    assert (total["failed"], total["boot"], total["training"]) == (90_000, 60_000, 0)


def test_what_the_market_charged_counts_once_it_is_final(edge, ask, lease):
    lease(edge.job(), **over(edge), cost=100, billed=250, due_at=None)
    assert ask("spend")["total"]["total"] == 250


def test_a_machine_counts_where_it_was_rented(edge, ask, lease):
    now = edge.clock()
    lease(edge.job(), **over(edge, ago=timedelta(days=40)), cost=7)
    lease(edge.job(), **over(edge, ago=timedelta(days=3)), cost=11)
    assert ask("spend")["total"]["total"] == 11
    rows = ask("spend", since=(now - timedelta(days=41)).isoformat())["data"]
    assert Counter({row["key"]: row["total"] for row in rows if row["total"]}) == {
        (now - timedelta(days=40)).astimezone(UTC).date().isoformat(): 7,
        (now - timedelta(days=3)).astimezone(UTC).date().isoformat(): 11,
    }
    assert len(rows) == 42


moments = some.integers(0, 20 * 24 * 60).map(lambda minutes: timedelta(minutes=minutes))
machines = some.fixed_dictionaries(
    {
        "ago": moments,
        "lasted": some.integers(0, 700).map(lambda minutes: timedelta(minutes=minutes)),
        "made": some.booleans(),
        "open": some.booleans(),
        "ready": some.none() | some.integers(-5, 800),
        "status": some.sampled_from(list(Status)),
        "attempt": some.integers(1, 2),
        "won": some.booleans(),
        "billed": some.none() | some.integers(0, 10**9),
        "price": some.integers(0, 10**7),
        "why": some.sampled_from(["", LOST_RACE, "its job is stalled"]),
        "machine": some.sampled_from(["m1", "m2", ""]),
        "owner": some.sampled_from(["alice", "bob"]),
    }
)


@settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=some.lists(machines, max_size=12))
def test_money_adds_up_to_the_micro_dollar_however_it_is_grouped(edge, ask, drawn):
    now = edge.clock()
    rented, counted = [], {}
    for one in drawn:
        job = edge.job(owner=one["owner"])
        began = now - one["ago"]
        end = min(began + one["lasted"], now)
        lease = Lease(
            id=new_id("ls", began),
            job=job.id,
            attempt=one["attempt"],
            label=f"test/{job.id}",
            created_at=began,
            rented_at=began if one["made"] else None,
            expires_at=began + timedelta(hours=12),
            status=LeaseStatus.RENTED if one["open"] else LeaseStatus.RELEASED,
            ready_at=None if one["ready"] is None else began + timedelta(minutes=one["ready"]),
            released_at=None if one["open"] else end,
            machine_id=one["machine"],
            price=one["price"],
            why=one["why"],
        )
        lease = lease.evolve(cost=money.cost(lease, now).total, billed=one["billed"])
        with edge.store.transaction() as tx:
            tx.add_lease(lease)
        won = lease.id if one["won"] else ""
        become(edge, job, status=one["status"], attempt=2, lease=won)
        rented.append(lease)
        counted[job.id] = lease
    expected = sum(money.spent(item, now) for item in rented if item.rented_at)
    mine = {item.job for item in rented}
    for group_by in GROUPS:
        spent = ask("spend", group_by=group_by, limit=1000, since=str(now.date() - EARLIER))
        for row in (*spent["data"], spent["total"]):
            assert sum(row[kind] for kind in KINDS) == row["total"]
            assert min(row[kind] for kind in KINDS) >= 0
        for field in (*KINDS, "total", "machines", "completed"):
            assert sum(row[field] for row in spent["data"]) == spent["total"][field]
        if group_by == "job":  # examples share a store: this one's own
            told = sum(row["total"] for row in spent["data"] if row["key"] in mine)
            assert told == expected


EARLIER = timedelta(days=30)


# --- instances --------------------------------------------------------------------------------


def test_every_machine_says_why_it_is_kept_or_why_it_goes(edge, ask, lease):
    boots, runs = edge.job(), edge.job()
    lease(boots, timedelta(minutes=2), note="pulling the image")
    lease(runs, ready_at=edge.clock(), instance_id="77")
    become(edge, runs, status=Status.TRAINING)
    goes = edge.job()
    lease(goes, status=LeaseStatus.RELEASING, why="its job is cancelled", tries=4)
    unclear = edge.job()
    lease(unclear, status=LeaseStatus.UNKNOWN, rented_at=None, why="the answer was lost")
    doomed = edge.job()
    lease(doomed)
    become(edge, doomed, status=Status.FAILED)
    lease(edge.job(), **over(edge))

    shown = ask("instances")
    told = {item["job"]: (item["verdict"], item["why"]) for item in shown["data"]}
    assert told == {
        boots.id: ("booting", "its agent has not said hello yet"),
        runs.id: ("kept", "its job is running on it: training"),
        goes.id: ("releasing", "its job is cancelled; asked for 4 times"),
        unclear.id: ("unclear", "the answer was lost; the account's list will tell"),
        doomed.id: ("releasing", "its job is failed"),
    }
    assert shown["data"][0]["verdict"] == "releasing"  # what somebody may have to act on
    assert shown["burn_per_hour"] == 4 * 360_000
    assert (
        shown["cost"]
        == sum(item["cost"] for item in shown["data"])
        == 2 * 360_000 + 12_000 + (360_000)
    )


def test_no_sweep_yet_is_said_to_be_stale(ask):
    assert ask("instances")["sweep"] | {"strangers": []} == {
        "at": None,
        "age_s": None,
        "stale": True,
        "seen": 0,
        "ours": 0,
        "foreign": 0,
        "doubtful": False,
        "error": "",
        "strangers": [],
    }


# --- the account ------------------------------------------------------------------------------


def test_the_account_says_how_long_its_credit_lasts(edge, ask, lease):
    assert ask("account")["credit"] is None
    lease(edge.job())
    with edge.store.transaction() as tx:
        tx.beat(brakes.CREDIT, edge.clock() - timedelta(seconds=40), {"credit": 3_600_000})
    said = ask("account")
    assert (said["credit"], said["burn_per_hour"], said["runway_hours"]) == (3_600_000, 360_000, 10)
    assert (said["age_s"], said["fresh"], said["error"]) == (40, True, "")
    assert said["renting"] == {"stopped": False, "code": None, "why": None}
    edge.clock.advance(3600)
    assert ask("account")["fresh"] is False


def test_the_account_says_why_nothing_is_rented(edge, ask):
    with edge.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="prices doubled", now=edge.clock())
    renting = ask("account")["renting"]
    assert renting["code"] == "kill_switch.on"
    assert "prices doubled" in renting["why"]
