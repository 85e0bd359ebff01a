"""The HTTP edge over a real store, with storage and market imagined."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from flask.testing import FlaskClient
from flask_openapi import utils
from werkzeug.test import TestResponse

from gpu_agent import wire
from gpu_agent.recipe import Recipe
from infra import schema
from infra.crypto import SecretBox
from infra.settings import Settings
from infra.store import SqlStore
from orchestrator.api.ids import new_id
from orchestrator.api.keys import hash_of
from orchestrator.app import create_app
from orchestrator.deps import Deps
from state import record
from state.errors import StorageError
from state.events import ApiKey, Attempt, Dataset, DatasetStatus, Secret
from state.job import Job, JobRequest
from state.lease import Lease, LeaseStatus
from state.memory import MemoryStore
from state.store import Store

TOKEN = "bootstrap-token-of-the-test"


@dataclass(frozen=True)
class ImaginedUpload:
    url: str
    headers: Mapping[str, str]


class ImaginedStorage:
    """Presigns like S3 does, as far as the edge can tell."""

    def __init__(self) -> None:
        self.down = False
        self.sizes: dict[str, int] = {}

    def presign_put(self, key: str, *, bytes: int, expires_s: int) -> ImaginedUpload:
        self._check()
        url = f"https://s3.test/{key}?X-Amz-Signature=put"
        return ImaginedUpload(url, {"Content-Length": str(bytes)})

    def presign_get(self, key: str, *, expires_s: int) -> str:
        self._check()
        return f"https://s3.test/{key}?X-Amz-Signature=get&X-Amz-Expires={expires_s}"

    def head(self, key: str) -> int | None:
        self._check()
        return self.sizes.get(key)

    def _check(self) -> None:
        if self.down:
            raise StorageError("S3 does not answer")


@dataclass(frozen=True)
class ImaginedBundle:
    bytes: bytes = b"#!/usr/bin/env python3\nPK"
    sha256: str = hashlib.sha256(b"#!/usr/bin/env python3\nPK").hexdigest()


@dataclass
class Edge:
    """The application under test, and everything around it that a test wants to turn."""

    store: Store
    clock: Any
    storage: ImaginedStorage = field(default_factory=ImaginedStorage)
    woken: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, str | None] = field(default_factory=dict)
    base_error: Exception | None = None
    base_parts: tuple[wire.Download, ...] = ()

    def __post_init__(self) -> None:
        self.deps = Deps(
            store=self.store,
            storage=self.storage,
            clock=self.clock,
            wake=lambda task, subject: self.woken.append((task, subject)),
            bundle=ImaginedBundle(),
            resolve_base=self._resolve,
            settings=Settings(public_url="https://stoker.test", secret_keys=(SecretBox.new_key(),)),
            ready_checks={
                name: (lambda name=name: self.faults.get(name)) for name in ("database", "redis")
            },
            pause=lambda seconds: self.clock.advance(seconds),
        )
        self.app = create_app(self.deps)

    def _resolve(self, request: JobRequest) -> tuple[wire.Download, ...]:
        if self.base_error:
            raise self.base_error
        file = wire.Download(
            url="https://models.test/base?sig=1", name="base.safetensors", bytes=7, sha256="ab" * 32
        )
        return (file, *self.base_parts)

    def client(self) -> FlaskClient:
        return self.app.test_client()

    def key(
        self, owner: str = "alice", *scopes: str, revoked: bool = False, kind: str = "live"
    ) -> dict[str, str]:
        """Headers with a fresh API key, `live` or `test`."""
        now = self.clock()
        name = new_id("key", now)
        text = f"stk_{kind}_{name}"
        with self.store.transaction() as tx:
            tx.add_api_key(
                ApiKey(
                    id=name,
                    owner=owner,
                    name="test",
                    hash=hash_of(text),
                    scopes=frozenset(scopes or ("jobs:read", "jobs:write")),
                    created_at=now,
                    revoked_at=now if revoked else None,
                )
            )
        return {"Authorization": f"Bearer {text}"}

    @staticmethod
    def csrf_of(page: TestResponse) -> str:
        """The token that a page's own forms and scripts send."""
        return page.text.partition('name="csrf-token" content="')[2].partition('"')[0]

    def page(self) -> FlaskClient:
        """A browser in which an operator is logged in."""
        browser = self.app.test_client()
        browser.environ_base["wsgi.url_scheme"] = "https"
        key = self.key("operations", "operator")["Authorization"].removeprefix("Bearer ")
        token = self.csrf_of(browser.get("/login"))
        answer = browser.post("/login", data={"key": key, "csrf_token": token})
        assert answer.status_code == 302, answer.text
        return browser

    def dataset(self, owner: str = "alice", status: DatasetStatus = DatasetStatus.READY) -> Dataset:
        now = self.clock()
        name = new_id("ds", now)
        dataset = Dataset(
            id=name,
            owner=owner,
            created_at=now,
            status=status,
            zip_key=f"datasets/{name}/dataset.zip",
            zip_bytes=1234,
            zip_sha256="cd" * 32,
        )
        with self.store.transaction() as tx:
            tx.add_dataset(dataset)
        return dataset

    def job(self, owner: str = "alice", **changes: Any) -> Job:
        """A job that waits for a GPU."""
        now = self.clock()
        request = JobRequest(
            dataset_id=self.dataset(owner).id,
            base="civitai:1",
            recipe=Recipe().to_dict(),
            **changes,
        )
        with self.store.transaction() as tx:
            return record.create_job(tx, request, owner=owner, now=now, job_id=new_id("job", now))

    def rent(self, job: Job, *, token: str = TOKEN, hedge: bool = False) -> Attempt:
        """What `allocate` leaves behind: an open lease, and a token for its agent."""
        now = self.clock()
        attempt = Attempt(job=job.id, number=job.attempt, created_at=now)
        with self.store.transaction() as tx:
            if not hedge:
                tx.add_attempt(attempt)
            tx.add_lease(
                Lease(
                    id=new_id("ls", now),
                    job=job.id,
                    attempt=job.attempt,
                    label=f"test/{job.id}/{job.attempt}-{token}",
                    hedge=hedge,
                    token_hash=hashlib.sha256(token.encode()).hexdigest(),
                    token_expires_at=now + timedelta(minutes=30),
                    created_at=now,
                    rented_at=now,
                    expires_at=now + timedelta(hours=12),
                    status=LeaseStatus.RENTED,
                    machine_id="m1",
                    gpu_name="RTX 4090",
                    geo="NO",
                    price=360_000,
                    instance_id="i1",
                )
            )
        return attempt

    def hello(self, token: str = TOKEN, nonce: str = "nonce-one", **more: Any) -> TestResponse:
        body = {"token": token, "nonce": nonce, "version": wire.VERSION, **more}
        return self.client().post("/agent/v1/hello", json=body)

    def agent(self, job: Job | None = None, token: str = TOKEN) -> Agent:
        """An agent that was let in."""
        job = job or self.job()
        self.rent(job, token=token)
        answer = self.hello(token)
        assert answer.status_code == 200, answer.text
        return Agent(self, wire.JobSpec.from_bytes(answer.data))

    def events(self, job_id: str) -> list[str]:
        with self.store.transaction() as tx:
            return [event.type for event in tx.events(job_id, limit=1000)]

    def stored(self, job_id: str) -> Job:
        with self.store.transaction() as tx:
            return tx.job(job_id)


@dataclass
class Agent:
    edge: Edge
    spec: wire.JobSpec
    seq: int = 0

    @property
    def path(self) -> str:
        return self.spec.report_url.removeprefix("https://stoker.test")

    def say(self, fact: wire.Fact, seq: int | None = None, **data: Any) -> wire.Report:
        self.seq += 1
        return wire.Report(
            job=self.spec.job,
            attempt=self.spec.attempt,
            seq=seq or self.seq,
            type=fact,
            at=self.edge.clock().timestamp(),
            data=data,
        )

    def signed(self, body: bytes, webhook_id: str, at: float | None = None) -> dict[str, str]:
        at = self.edge.clock().timestamp() if at is None else at
        return wire.sign(body, secrets=[self.spec.secret], webhook_id=webhook_id, at=at)

    def post(self, report: wire.Report) -> TestResponse:
        body = report.to_bytes()
        return self.edge.client().post(
            self.path, data=body, headers=self.signed(body, report.webhook_id)
        )

    def report(self, fact: wire.Fact, **data: Any) -> TestResponse:
        return self.post(self.say(fact, **data))

    def files(self, wanted: Any) -> TestResponse:
        body = wanted if isinstance(wanted, bytes) else wire.json.dumps(wanted).encode()
        path = self.path.replace("/reports", "/files")
        return self.edge.client().post(path, data=body, headers=self.signed(body, "files"))


@pytest.fixture(scope="session", autouse=True)
def _schemas_drawn_once() -> Iterator[None]:
    """flask-openapi draws each model's JSON schema anew for every app, which is most of what an
    app costs; a thousand tests here make one each."""
    drawn: dict[Any, bytes] = {}
    draw = utils.get_model_schema

    def remembered(model: Any, mode: str = "validation") -> Any:
        if (model, mode) not in drawn:
            drawn[model, mode] = marshal.dumps(draw(model, mode))
        return marshal.loads(drawn[model, mode])  # noqa: S302 -- our own; a copy, for it is changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_model_schema", remembered)
        yield


@pytest.fixture(scope="session")
def migrated(database_url: str) -> Iterator[SqlStore]:
    store = SqlStore(database_url, SecretBox([SecretBox.new_key()]))
    yield store
    store.close()


@pytest.fixture
def sql_store(migrated: SqlStore, database_url: str) -> SqlStore:
    """The store over PostgreSQL, with nothing in it."""
    tables = ", ".join(table.name for table in schema.metadata.sorted_tables)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {tables}".encode())
    return migrated


@pytest.fixture(scope="session")
def serve() -> Callable[[str, Secret], contextlib.AbstractContextManager[str]]:
    """`with serve(database_url, key) as url`: two processes of granian, as `stoker serve` runs
    them."""
    return _serve


@contextlib.contextmanager
def _serve(database_url: str, key: Secret) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [
        sys.executable, "-m", "granian", "--interface", "rsgi", "--factory", "--no-ws",
        "--port", str(port), "--workers", "2", "--log-level", "warning",
        "orchestrator.bench.target:server",
    ]  # fmt: skip
    env = {**os.environ, "DATABASE_URL": database_url, "STOKER_SECRET_KEYS": key.reveal()}
    process = subprocess.Popen(argv, env=env)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < until, "the server does not come up"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    yield request.getfixturevalue("sql_store")


@pytest.fixture
def edge(store: Store, clock: Any) -> Edge:
    return Edge(store, clock)


@pytest.fixture
def new_edge() -> type[Edge]:
    """For tests that bring a store or a storage of their own."""
    return Edge


@pytest.fixture
def client(edge: Edge) -> FlaskClient:
    return edge.client()


@pytest.fixture
def alice(edge: Edge) -> dict[str, str]:
    return edge.key("alice")


@pytest.fixture
def soon() -> Callable[[Callable[[], bool]], None]:
    """Waits for something that another thread does."""

    def wait(happened: Callable[[], bool]) -> None:
        until = time.monotonic() + 10
        while not happened():
            assert time.monotonic() < until, "it never happened"
            time.sleep(0.005)

    return wait


def problem(answer: TestResponse, status: int, code: str | None = None) -> dict[str, Any]:
    """The problem document of `answer`, after checking that it is one."""
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/problem+json"
    body: dict[str, Any] = answer.get_json(force=True)
    assert body["status"] == status
    assert {"type", "title", "detail", "code", "retryable", "request_id"} <= set(body)
    assert body["request_id"] == answer.headers["X-Request-Id"]
    if code is not None:
        assert body["code"] == code
    return body


@pytest.fixture(name="problem")
def _problem() -> Callable[..., dict[str, Any]]:
    return problem


def at(clock: Callable[[], datetime]) -> float:
    return clock().timestamp()
