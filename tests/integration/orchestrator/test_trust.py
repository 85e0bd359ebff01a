"""What the machine of one job can do to another, before its end and after it: nothing.

On PostgreSQL, and every table is compared row by row: a refusal that writes is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from gpu_agent import wire
from gpu_agent.wire import Fact
from infra import schema
from state import record
from state.errors import IllegalMove
from state.job import Reason, Status
from state.lease import LeaseStatus

pytestmark = pytest.mark.parametrize("store", ["postgres"], indirect=True)


@pytest.fixture
def unchanged(database_url: str) -> Callable[[], Any]:
    """As a `with`: no row of any table differs afterwards."""

    def rows() -> dict[str, list[str]]:
        found = {}
        with psycopg.connect(database_url) as connection:
            for table in schema.metadata.sorted_tables:
                every = sql.SQL("SELECT t::text FROM {} t").format(sql.Identifier(table.name))
                found[table.name] = sorted(text for (text,) in connection.execute(every))
        return found

    @contextmanager
    def watch() -> Iterator[None]:
        before = rows()
        yield
        assert rows() == before

    return watch


def post(edge: Any, path: str, body: bytes, headers: dict[str, str]) -> int:
    return int(edge.client().post(path, data=body, headers=headers).status_code)


def files_of(agent: Any) -> str:
    return str(agent.path).replace("/reports", "/files")


def test_nothing_forged_replayed_or_stale_writes_a_row(edge: Any, unchanged: Any) -> None:
    mine, theirs = edge.agent(token="mine"), edge.agent(token="theirs")
    report = mine.say(Fact.GPU_READY)
    body, now = report.to_bytes(), edge.clock().timestamp()
    good = mine.signed(body, report.webhook_id)
    of_them = theirs.say(Fact.ERROR, code="x", message="y")
    forged = {
        "no signature": (mine.path, body, {}),
        "of another attempt's secret": (mine.path, body, theirs.signed(body, report.webhook_id)),
        "for another's job": (
            theirs.path, of_them.to_bytes(), mine.signed(of_them.to_bytes(), of_them.webhook_id)
        ),
        "another's files": (files_of(theirs), b"{}", mine.signed(b"{}", "files")),
        "a report at another's address": (theirs.path, body, good),
        "expired": (mine.path, body, mine.signed(body, report.webhook_id, at=now - 301)),
        "of the future": (mine.path, body, mine.signed(body, report.webhook_id, at=now + 302)),
        "another body": (mine.path, body.replace(b"gpu.ready", b"heartbeat"), good),
        "another id": (mine.path, body, {**good, "webhook-id": "other"}),
        "another attempt": (mine.path.replace("attempts/1", "attempts/2"), body, good),
        "a job that is none": (mine.path.replace(mine.spec.job, "job_none"), body, good),
    }  # fmt: skip
    with unchanged():
        assert {why: post(edge, *what) for why, what in forged.items()} == dict.fromkeys(
            forged, 401
        )
    assert post(edge, mine.path, body, good) == 200, "and the true one is still taken"
    with unchanged():
        assert post(edge, mine.path, body, good) == 200, "a replay within the time is a repeat"
        edge.clock.advance(301)
        assert post(edge, mine.path, body, good) == 401, "and after it a forgery"


@pytest.mark.parametrize("how", ["completed", "cancelled", "moved on"])
def test_after_the_end_a_machine_is_told_to_stop_and_can_do_nothing(
    edge: Any, unchanged: Any, how: str
) -> None:
    agent = edge.agent()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        assert agent.report(fact).status_code == 200
    with edge.store.transaction() as tx:
        match how:
            case "cancelled":
                record.cancel(tx, agent.spec.job, edge.clock())
            case "moved on":
                lost = Reason(code="host.ended", message="gone")
                record.stall(tx, agent.spec.job, lost, edge.clock())
                record.retry(tx, agent.spec.job, edge.clock())
    if how == "completed":
        agent.report(Fact.WEIGHTS_UPLOADED, files=[{"name": "w", "bytes": 1, "sha256": "0" * 64}])
        with edge.store.transaction() as tx:
            record.verified(tx, agent.spec.job, 1, edge.clock())
    with unchanged():
        for fact in (Fact.WEIGHTS_UPLOADED, Fact.ERROR, Fact.TRAINING_PROGRESS):
            answer = agent.report(fact, code="x", message="y")
            assert answer.status_code == 410
            assert wire.orders_from_bytes(answer.data) == [wire.Order.STOP]
        wanted = {
            "put": [{"name": "w", "bytes": 1, "sha256": "0" * 64}],
            "get": ["dataset", "base"],
        }
        assert agent.files(wanted).status_code == 410, "no address any more"
        assert edge.hello().status_code == 410


def test_addresses_are_of_the_jobs_own_things_alone(edge: Any) -> None:
    mine, theirs = edge.agent(token="mine"), edge.agent(token="theirs")
    wanted = {"put": [{"name": "lora.safetensors", "bytes": 1, "sha256": "0" * 64}]}
    given = mine.files({**wanted, "get": ["dataset", "base"]}).get_data(as_text=True)
    with edge.store.transaction() as tx:
        own, other = tx.job(mine.spec.job), tx.job(theirs.spec.job)
    keys = [part.split("?")[0] for part in given.split("https://s3.test/")[1:]]
    assert sorted(keys) == sorted(
        [f"datasets/{own.request.dataset_id}/dataset.zip",
         f"jobs/{own.id}/attempts/1/lora.safetensors"]
    )  # fmt: skip
    assert other.id not in given
    assert other.request.dataset_id not in given


def test_a_token_that_two_know_loses_its_machine(edge: Any, soon: Any) -> None:
    """Whoever came second: the job moves on, and the machine is to be destroyed."""
    agent = edge.agent()
    job = agent.spec.job
    first = edge.hello(nonce="nonce-one")
    assert wire.JobSpec.from_bytes(first.data).secret == agent.spec.secret, "a lost answer, again"
    assert edge.hello(nonce="the-thiefs").status_code == 401
    stored = edge.stored(job)
    assert (stored.status, stored.reason.code) == (Status.STALLED, "host.token_reused")
    assert "agent.token_reused" in edge.events(job)
    with edge.store.transaction() as tx:
        (lease,) = tx.leases_of(job)
        assert lease.status is LeaseStatus.RELEASING
        with pytest.raises(IllegalMove):
            lease.to(LeaseStatus.RENTED)
    soon(lambda: ("deallocate", job) in edge.woken)
    assert edge.hello(nonce="nonce-one").status_code in (401, 410)
    assert agent.report(Fact.GPU_READY).status_code == 410
    assert json.loads(agent.files({"get": ["dataset"]}).data)["orders"] == ["stop"]
