"""Endpoints, their queues and what is told of them: both stores do the same."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from state.endpoints import Backlog, Endpoint
from state.errors import Conflict, NotFound
from state.events import Delivery, OutgoingStatus, Secret
from state.job import Status


def endpoint(make: Any, name: str = "we_1", owner: str = "acme", **given: Any) -> Endpoint:
    url = "https://example.com/hook"
    return Endpoint(**{"id": name, "owner": owner, "created_at": make.now, "url": url} | given)


class Interrupted(Exception):
    pass


def test_an_endpoint_comes_back_as_it_was_stored(make, commit):
    full = endpoint(
        make,
        events=("job.completed", "job.failed"),
        description="Ünïcode",
        disabled_at=make.now,
        disabled_why="by hand",
        heard_at=make.after(1),
        old_secret_until=make.after(2),
        owed=7,
    )
    plain = endpoint(make, "we_2", url="")
    for one in (plain, full):
        commit("add_endpoint", one, secrets=[Secret("whsec_1")])
    assert commit("endpoint", "we_1", lock=True) == full
    assert commit("endpoints") == [full, plain]
    commit("save_endpoint", plain.evolve(owed=1))
    assert commit("endpoint", "we_2").owed == 1
    with pytest.raises(Conflict):
        commit("add_endpoint", full)
    for call in (("endpoint", "we_0"), ("save_endpoint", endpoint(make, "we_0"))):
        with pytest.raises(NotFound):
            commit(*call)


def test_an_owner_has_its_own_endpoints_only(make, commit):
    mine, other = endpoint(make), endpoint(make, "we_2", owner="bob")
    commit("add_endpoint", mine)
    commit("add_endpoint", other)
    assert commit("endpoints", "acme") == [mine]
    assert commit("endpoints", "carol") == commit("endpoints", "\x00") == []


def test_an_endpoint_s_secrets_are_replaced_and_go_with_it(make, commit):
    old, new = Secret("whsec_old"), Secret("whsec_new")
    commit("add_endpoint", endpoint(make), secrets=[old])
    commit("set_webhook_secrets", "we_1", [old, new])
    assert [item.reveal() for item in commit("webhook_secrets", "we_1")] == [old, new]
    commit("set_webhook_secrets", "we_1", [new])
    assert commit("webhook_secrets", "we_1") == [new]
    commit("delete_endpoint", "we_1")
    commit("delete_endpoint", "we_1")
    assert commit("webhook_secrets", "we_1") == commit("endpoints", "acme") == []


def test_secrets_of_endpoints_are_not_readable_in_the_database(sql_store, make, database_url):
    with sql_store.transaction() as tx:
        tx.add_endpoint(endpoint(make), secrets=[Secret("whsec_hunter2")])
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("SELECT sealed FROM webhook_secrets").fetchall()
        rows += connection.execute("SELECT * FROM webhook_endpoints").fetchall()
    assert len(rows) == 2
    assert "hunter2" not in str(rows)


def test_a_change_of_endpoints_that_is_rolled_back_did_not_happen(make, commit, store):
    mine = endpoint(make)
    commit("add_endpoint", mine, secrets=[Secret("whsec_1")])

    def interrupted() -> None:
        with store.transaction() as tx:
            tx.add_endpoint(endpoint(make, "we_2"))
            tx.set_webhook_secrets("we_1", [])
            tx.delete_endpoint("we_1")
            assert [item.id for item in tx.endpoints("acme")] == ["we_2"]
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert commit("endpoints", "acme") == [mine]
    assert commit("webhook_secrets", "we_1") == ["whsec_1"]


# --- queues -----------------------------------------------------------------------------------


def test_each_endpoint_has_a_queue_of_its_own_within_a_job(make, commit):
    own = [make.outgoing("job_1", seq) for seq in (1, 2)]
    there = [make.outgoing("job_1", seq, endpoint="we_1") for seq in (1, 2)]
    commit("add_outgoing", [*own, *there])
    until = make.after(30)
    assert commit("queues_of", "job_1") == ["job_1", "job_1/we_1"]
    assert sorted(commit("claim_due_outgoing", make.now, until, 9)) == ["job_1", "job_1/we_1"]
    # the job's own webhook is slow; the endpoint goes on
    commit("save_outgoing", there[0].evolve(status=OutgoingStatus.DELIVERED, due_at=None))
    assert commit("claim_due_outgoing", make.now, until, 9) == ["job_1/we_1"]
    assert commit("next_outgoing", "job_1").seq == 1
    assert commit("next_outgoing", "job_1/we_1") == there[1].evolve(due_at=until)
    assert commit("next_outgoing", "job_1/we_2") is None
    assert commit("queues_of", "job_2") == []
    assert commit("list_outgoing", "job_1")[0] == own[0].evolve(due_at=until)
    with pytest.raises(Conflict):
        commit("add_outgoing", [make.outgoing("job_1", 1, endpoint="we_1")])


def test_what_waits_for_an_endpoint_can_be_listed_and_given_up(make, commit):
    later = make.after(600)
    rows = [
        make.outgoing("job_2", 1, endpoint="we_1", due_at=later),
        make.outgoing("job_1", 1, endpoint="we_1", created_at=make.after(1)),
        make.outgoing("job_1", 2, endpoint="we_1", status=OutgoingStatus.DELIVERED),
        make.outgoing("job_1", 1, endpoint="we_2"),
        make.outgoing("job_1", 1),
    ]
    commit("add_outgoing", rows)
    assert commit("waiting_outgoing", "we_1", 9) == rows[:2]
    assert commit("waiting_outgoing", "we_1", 1) == rows[:1]
    assert commit("disable_outgoing", "we_1", make.now) == 2
    assert commit("disable_outgoing", "we_1", make.now) == 0
    gone = commit("outgoing", rows[0].id)
    assert (gone.status, gone.due_at, gone.ended_at) == (OutgoingStatus.DISABLED, None, make.now)
    assert commit("outgoing", rows[2].id) == rows[2]
    assert commit("queues_of", "job_1") == ["job_1", "job_1/we_2"]


def test_pages_of_webhooks_are_newest_first_and_filtered(make, commit):
    rows = [
        make.outgoing(
            f"job_{n % 2}",
            n,
            owner="acme" if n < 5 else "bob",
            endpoint="we_1" if n % 3 else "",
            created_at=make.after(n // 2),
            status=OutgoingStatus.EXHAUSTED if n == 4 else OutgoingStatus.WAITING,
        )
        for n in range(7)
    ]
    commit("add_outgoing", rows)
    newest = rows[::-1]
    assert commit("page_outgoing") == newest
    first = commit("page_outgoing", limit=3)
    last = first[-1]
    # of two made at the same moment, none is lost or comes twice
    rest = commit("page_outgoing", before=(last.created_at, last.id))
    assert [*first, *rest] == newest

    def numbers(**wanted: Any) -> list[int]:
        return [row.seq for row in commit("page_outgoing", **wanted)]

    assert numbers(owner="bob") == [6, 5]
    assert numbers(endpoint="") == [6, 3, 0]
    assert numbers(endpoint="we_1", job="job_0") == [4, 2]
    assert numbers(status=OutgoingStatus.EXHAUSTED) == [4]
    assert numbers(job="\x00") == numbers(owner="carol") == []


def test_tries_are_found_by_what_was_sent(make, commit):
    commit("add_outgoing", [make.outgoing("job_1", n, id=f"msg_{n}") for n in (1, 2)])
    for n, name in enumerate(("msg_1", "msg_2", "msg_1")):
        tried = Delivery(
            outgoing=name, job="job_1", tried_at=make.after(n), answer=500 + n, took_ms=1
        )
        commit("log_delivery", tried)
    assert [item.answer for item in commit("tries_of", ["msg_1"])] == [500, 502]
    assert [item.answer for item in commit("tries_of", ["msg_2", "msg_1"])] == [500, 501, 502]
    assert commit("tries_of", []) == commit("tries_of", ["\x00", "msg_9"]) == []


def test_the_backlog_says_what_waits_and_what_was_given_up_lately(make, commit):
    lost, old = OutgoingStatus.EXHAUSTED, make.after(-100)
    commit(
        "add_outgoing",
        [
            make.outgoing("job_1", 1, created_at=old),
            make.outgoing("job_1", 2, created_at=make.now),
            make.outgoing("job_1", 1, endpoint="we_1", status=lost, ended_at=make.now),
            make.outgoing("job_1", 2, endpoint="we_1", status=lost, ended_at=old),
            make.outgoing("job_1", 3, status=OutgoingStatus.DELIVERED, ended_at=make.now),
        ],
    )
    assert commit("webhook_backlog", make.after(-10)) == [
        Backlog(endpoint="", status=OutgoingStatus.WAITING, rows=2, oldest=old),
        Backlog(endpoint="we_1", status=lost, rows=1, oldest=make.now),
    ]


def test_old_tests_of_endpoints_go_with_the_history(make, commit):
    job = make.job(status=Status.TRAINING)
    commit("add_job", job)
    old, done = make.after(-100), OutgoingStatus.DELIVERED
    for name in ("we_1", job.id):
        commit(
            "add_outgoing",
            [make.outgoing(name, 1, endpoint="we_1", created_at=old, status=done)],
        )
        commit(
            "log_delivery",
            Delivery(outgoing="m", job=name, tried_at=old, answer=200, took_ms=1),
        )
    assert commit("drop_events_before", make.now, 9) == 2
    assert commit("list_outgoing", "we_1") == commit("deliveries", "we_1") == []
    assert len(commit("list_outgoing", job.id)) == 1
