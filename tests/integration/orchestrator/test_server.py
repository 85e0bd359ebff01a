"""Two real processes of granian over one PostgreSQL, as `stoker serve` runs them."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from gpu_agent import wire
from infra.crypto import SecretBox
from infra.store import SqlStore
from orchestrator.api.ids import new_id
from orchestrator.api.keys import hash_of
from state import record
from state.events import ApiKey, Attempt, Dataset, DatasetStatus, Secret
from state.job import JobRequest


class Site:
    """A running server, and its store seen from outside."""

    def __init__(self, url: str, store: SqlStore) -> None:
        self.url, self.store = url, store

    def agent(self) -> tuple[str, str]:
        """Job and secret of an attempt that may report."""
        now, secret = datetime.now(UTC), wire.new_secret()
        job = new_id("job", now)
        with self.store.transaction() as tx:
            dataset = Dataset(id=new_id("ds", now), owner="a", created_at=now)
            tx.add_dataset(dataset.evolve(status=DatasetStatus.READY))
            request = JobRequest(dataset_id=dataset.id, base="civitai:1")
            record.create_job(tx, request, owner="a", now=now, job_id=job)
            tx.add_attempt(
                Attempt(
                    job=job,
                    number=1,
                    created_at=now,
                    secret=Secret(secret),
                )
            )
        return job, secret

    def customer(self) -> tuple[str, str]:
        """An API key, and a dataset of its owner."""
        now = datetime.now(UTC)
        key = new_id("stk_live", now)
        dataset = Dataset(id=new_id("ds", now), owner="b", created_at=now)
        with self.store.transaction() as tx:
            tx.add_dataset(dataset.evolve(status=DatasetStatus.READY))
            tx.add_api_key(
                ApiKey(
                    id=new_id("key", now),
                    owner="b",
                    name="b",
                    hash=hash_of(key),
                    scopes=frozenset({"jobs:read", "jobs:write"}),
                    created_at=now,
                )
            )
        return key, dataset.id

    def post(self, job: str, secret: str, seq: int) -> int:
        said = wire.Report(job=job, attempt=1, seq=seq, type=wire.Fact.HEARTBEAT, at=time.time())
        body = said.to_bytes()
        headers = wire.sign(body, secrets=[secret], webhook_id=said.webhook_id, at=time.time())
        path = f"{self.url}/agent/v1/jobs/{job}/attempts/1/reports"
        return requests.post(path, data=body, headers=headers, timeout=30).status_code


@pytest.fixture(scope="module")
def site(database_url: str, serve: Any) -> Iterator[Site]:
    key = SecretBox.new_key()
    store = SqlStore(database_url, SecretBox([key]))
    try:
        with serve(database_url, key) as url:
            yield Site(url, store)
    finally:
        store.close()


def test_the_same_report_at_both_processes_is_one_event(site: Site) -> None:
    job, secret = site.agent()
    with ThreadPoolExecutor(16) as pool:
        for seq in range(1, 6):
            answers = list(pool.map(lambda _, seq=seq: site.post(job, secret, seq), range(16)))
            assert set(answers) == {200}
    with site.store.transaction() as tx:
        events = tx.events(job, limit=1000)
        stored = tx.job(job)
    assert [event.type for event in events].count("heartbeat") == 5
    assert [event.seq for event in events] == list(range(1, stored.seq + 1))


def test_twenty_orders_with_one_key_at_once_are_one_job(site: Site) -> None:
    key, dataset = site.customer()

    def order(_: int) -> requests.Response:
        return requests.post(
            f"{site.url}/v1/jobs",
            json={"dataset_id": dataset, "base": "civitai:1"},
            headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "order-42"},
            timeout=30,
        )

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(order, range(20)))
    assert {answer.status_code for answer in answers} <= {202, 409}  # 409: the first is under way
    jobs = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    with site.store.transaction() as tx:
        assert {job.id for job in tx.list_jobs(owner="b")} == jobs
    assert len(jobs) == 1


def test_a_body_of_ten_megabytes_is_refused(site: Site) -> None:
    job, _ = site.agent()
    host, port = site.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("POST", f"/agent/v1/jobs/{job}/attempts/1/reports")
    connection.putheader("Content-Length", str(10_000_000))
    connection.endheaders()
    connection.send(b"x" * 1000)
    answer = connection.getresponse()
    assert answer.status == 413
    assert answer.getheader("content-type") == "application/problem+json"
    connection.close()


def test_a_body_without_a_length_is_refused_once_it_is_too_long(site: Site) -> None:
    job, _ = site.agent()
    path = f"{site.url}/agent/v1/jobs/{job}/attempts/1/reports"
    chunks = (b"x" * 1000 for _ in range(wire.MAX_BODY // 1000 + 2))
    assert requests.post(path, data=chunks, timeout=30).status_code == 413


@pytest.mark.parametrize("path", ["/nowhere", "/v1/jobs/%00", "/v1/jobs/%ff%2F..", "/%E2%82"])
def test_odd_paths_are_problems(site: Site, path: str) -> None:
    answer = requests.get(site.url + path, timeout=30)
    assert answer.status_code in (401, 404)
    assert answer.headers["content-type"] == "application/problem+json"


def test_ordinary_answers_come_through(site: Site) -> None:
    assert requests.get(f"{site.url}/healthz", timeout=30).json() == {"status": "alive"}
    head = requests.head(f"{site.url}/healthz", timeout=30)
    assert (head.status_code, head.content) == (200, b"")
    spec = requests.get(f"{site.url}/openapi.json", timeout=30)
    assert int(spec.headers["content-length"]) == len(spec.content)
    bundle = requests.get(f"{site.url}/agent/v1/gpu_agent.pyz", timeout=30)
    assert bundle.content == b""


def test_a_connection_that_breaks_off_harms_nobody(site: Site) -> None:
    host, port = site.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(
                b"POST /agent/v1/jobs/job_1/attempts/1/reports HTTP/1.1\r\n"
                b"host: x\r\ncontent-length: 1000\r\n\r\nhalf"
            )
    job, secret = site.agent()
    assert site.post(job, secret, 1) == 200
