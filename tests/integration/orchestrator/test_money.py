"""What operators see of money: every machine, what it cost, and what for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import UTC, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from infra.provider import LaunchSpec
from infra.provider_memory import Fault, MemoryProvider
from orchestrator.api.ids import new_id
from orchestrator.app import create_app
from state import brakes, money
from state.errors import Unreadable
from state.events import HostRecord
from state.job import Status
from state.lease import Lease, LeaseStatus
from state.offer import Offer
from state.orphan import Orphan
from state.renting import LOST_RACE
from tasks import rounds
from tasks.deallocate import Keeper, sweep

KINDS = ("training", "boot", "failed", "other", "orphan")
GROUPS = ("day", "host", "gpu", "job", "owner")
PATHS = ("instances", "spend", "account", "offers")


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
        made = Lease(**{"label": f"stoker/{values['id']}"} | values)
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
        "orphan": 0,
    }
    assert (total["machines"], total["completed"]) == (4, 1)
    assert total["per_completed"] == total["total"] == 1_105_000

    by_owner = {row["key"]: row["total"] for row in ask("spend", group_by="owner")["data"]}
    assert by_owner == {"alice": 1_070_000, "bob": 35_000}
    by_host = ask("spend", group_by="host")["data"]
    assert [row["key"] for row in by_host] == ["m1", "m2"]  # the dearest first
    assert ask("spend", group_by="job", limit=1)["left_out"] == 2


@pytest.fixture
def orphan(edge):
    """Writes down an orphan that began `ago`, at 0.36 dollars an hour."""

    def make(ident, ago, **changes):
        began = edge.clock() - ago
        values = {"label": f"stoker/x/{ident}", "machine_id": "m9", "gpu_name": "RTX 3090"}
        times = {"started_at": began, "seen_at": edge.clock()}
        made = Orphan(**{"id": ident, "price": 360_000, **values, **times, **changes})
        with edge.store.transaction() as tx:
            tx.save_orphan(made)
        return made

    return make


def test_orphans_are_money_of_their_own_where_they_began(edge, ask, lease, orphan):
    job = edge.job(owner="alice")
    lease(job, **over(edge), cost=50_000)
    now = edge.clock()
    orphan("7", timedelta(hours=1), job=job.id)  # and it is still there
    before = timedelta(days=2)
    orphan("8", before, ended_at=now - before / 2, gone_at=now - before / 2 + timedelta(seconds=9))
    orphan("9", timedelta(hours=1), price=0)  # of which nobody knows the price
    orphan("10", timedelta(days=40))

    total = ask("spend")["total"]
    assert (total["orphan"], total["total"]) == (25 * 360_000, 25 * 360_000 + 50_000)
    assert total["machines"] == 1
    day = (now - before).astimezone(UTC).date().isoformat()
    told = {
        group: {row["key"]: row["orphan"] for row in ask("spend", group_by=group)["data"]}
        for group in GROUPS
    }
    assert told["day"][day] == 24 * 360_000
    assert told["host"] == {"m9": 25 * 360_000, "m1": 0}
    assert told["gpu"] == {"RTX 3090": 25 * 360_000, "RTX 4090": 0}
    assert told["job"] == {job.id: 360_000, "": 24 * 360_000}
    assert told["owner"] == {"alice": 360_000, "": 24 * 360_000}
    edge.clock.advance(1800)
    assert ask("spend")["total"]["orphan"] == 25 * 360_000 + 180_000


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


def test_what_test_keys_rehearse_is_nobodys_money(edge, ask, lease):
    lease(edge.job(), label="test:60:stoker/job/1-a")
    assert ask("spend")["total"]["total"] == 0
    seen = ask("instances")
    assert (seen["data"], seen["cost"], seen["burn_per_hour"], seen["rehearsed"]) == ([], 0, 0, 1)
    assert ask("account")["burn_per_hour"] == 0


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
    max_examples=8,
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


# --- the market -------------------------------------------------------------------------------


def offer(number, **changes):
    values = {
        "id": str(number),
        "machine_id": f"m{number}",
        "gpu_name": "RTX 4090",
        "num_gpus": 1,
        "vram_gb": 24.0,
        "price": 400_000,
        "storage_price": 5_000,
        "download_price": 0,
        "upload_price": 0,
        "download_mbps": 900.0,
        "upload_mbps": 300.0,
        "reliability": 0.99,
        "verified": True,
        "cuda": 12.6,
        "disk_gb": 200.0,
    }
    return Offer(**values | changes)


@pytest.fixture
def market(edge):
    """Three machines: dear, cheap, and cheapest of all but blocked by an operator."""
    offers = [offer(1, price=900_000), offer(2), offer(3, price=1, gpu_name="RTX 3090")]
    market = MemoryProvider(edge.clock, offers)
    with edge.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id="m3", blocked=True, blocked_why="throttles"))
    edge.deps = dataclasses.replace(edge.deps, market=lambda: market)
    edge.app = create_app(edge.deps)
    return market


@pytest.fixture
def operator(edge, market, ops):
    """Asks the installation that has a market."""

    def call(method, path, **options):
        return edge.client().open(f"/v1/{path}", method=method, headers=ops, **options)

    return call


def test_offers_come_as_a_job_would_take_them_and_the_refused_say_why(operator):
    told = operator("GET", "offers").get_json()
    assert [(row["id"], row["verdict"]) for row in told["data"]] == [
        ("2", "fit"),
        ("1", "fit"),
        ("3", "refused"),
    ]
    cheap, dear, blocked = told["data"]
    assert 0 < cheap["expected_cost"] < dear["expected_cost"]
    assert blocked["expected_cost"] is None
    assert told["refused"] == {blocked["why"]: 1}
    assert told["fit"] == 2

    only = operator("GET", "offers", query_string={"gpu": ["RTX 3090"]}).get_json()
    assert [row["id"] for row in only["data"]] == ["3"]
    none = operator("GET", "offers", query_string={"min_vram_gb": 80}).get_json()
    assert none["data"] == []
    assert "nothing" in none["sentence"]


@pytest.mark.parametrize(
    "query", [{"gpu": "<script>"}, {"min_vram_gb": "nan"}, {"family": "sd9"}, {"vram": 8}]
)
def test_needs_that_are_none_are_refused(operator, problem, query):
    problem(operator("GET", "offers", query_string=query), 422)


def rent(market, number, label):
    market.create(offer(number), LaunchSpec(label=label, image="i", disk_gb=10, onstart=""))


def test_a_dry_sweep_says_what_it_would_do_and_does_nothing(edge, market, operator):
    rent(market, 1, f"{edge.deps.settings.deployment}/job_x/1-a")
    rent(market, 2, "somebody else's")
    edge.clock.advance(60)
    for _ in range(3):  # it is no sight that could doom an orphan
        seen = operator("POST", "sweeps", json={"dry_run": True})
        assert seen.status_code == 200
    told = seen.get_json()
    assert Counter(item["verdict"] for item in told["sights"]) == {"suspect": 1, "foreign": 1}
    assert (told["seen"], told["ours"], told["due_at"]) == (2, 1, None)
    assert len(market.instances()) == 2
    with edge.store.transaction() as tx:
        assert tx.beats() == {}


def test_a_sweep_is_the_workers_and_what_it_saw_is_told(edge, market, operator):
    assert rounds.due(edge.store, edge.clock())
    edge.clock.advance(2)
    asked = operator("POST", "sweeps", json={})
    assert asked.status_code == 202
    assert rounds.due(edge.store, edge.clock()) == []
    edge.clock.advance(8)
    assert rounds.due(edge.store, edge.clock()) == ["sweep"]

    rent(market, 1, f"{edge.deps.settings.deployment}/job_x/1-a")
    rent(market, 2, "somebody else's")
    keeper = Keeper(store=edge.store, provider=market, clock=edge.clock)
    sweep(keeper, edge.deps.settings.deployment)
    edge.clock.advance(30)
    saw = operator("GET", "instances").get_json()["sweep"]
    assert [item["verdict"] for item in saw["strangers"]] == ["suspect", "foreign"]
    assert (saw["seen"], saw["ours"], saw["foreign"], saw["age_s"]) == (2, 1, 1, 30)
    assert saw["stale"] is False


def test_a_market_that_cannot_be_read_is_said_to_be_so(edge, market, operator, problem):
    market.faults = lambda verb: Fault(error=Unreadable("it answered HTML"))
    for answer in (operator("GET", "offers"), operator("POST", "sweeps", json={"dry_run": True})):
        body = problem(answer, 503, "market_unavailable")
        assert body["retryable"] is True
        assert "HTML" in body["detail"]
        assert answer.headers["Retry-After"]


def test_a_server_without_a_market_says_what_is_missing(client, ops, problem):
    problem(client.get("/v1/offers", headers=ops), 503, "market_unset")
    problem(client.post("/v1/sweeps", headers=ops, json={"dry_run": True}), 503, "market_unset")


def test_customers_make_no_sweep(client, alice, problem):
    problem(client.post("/v1/sweeps", headers=alice, json={}), 403, "forbidden")
