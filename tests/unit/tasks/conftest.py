"""A whole Stoker in memory: store, market, clock; nothing runs unless a test says so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import pytest

from gpu_agent.wire import Fact, Report
from infra.provider_memory import MemoryProvider
from state import policy, record
from state.errors import NotFound, StorageError
from state.events import Dataset, DatasetStatus, Secret
from state.job import Job, JobRequest
from state.lease import Lease
from state.memory import MemoryStore
from state.offer import Offer
from tasks.allocate import Renter, Terms
from tasks.deallocate import Keeper
from tasks.reconcile import RECEIVER, reconcile


class Clock(Protocol):
    now: datetime

    def __call__(self) -> datetime: ...
    def advance(self, seconds: float) -> datetime: ...


def offer(number: int = 1, **changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "id": str(number),
        "machine_id": f"m{number}",
        "gpu_name": "RTX 4090",
        "num_gpus": 1,
        "vram_gb": 24.0,
        "price": 400_000,
        "storage_price": 10_000,
        "download_price": 0,
        "upload_price": 0,
        "download_mbps": 800.0,
        "upload_mbps": 800.0,
        "reliability": 0.99,
        "verified": True,
        "cuda": 12.8,
        "disk_gb": 100.0,
    }
    return Offer(**{**fields, **changes})


@dataclass
class World:
    """Drive it by `tick`; the tasks that a worker would run are run in place."""

    clock: Clock
    provider: MemoryProvider
    store: MemoryStore = field(default_factory=MemoryStore)
    terms: Terms = field(
        default_factory=lambda: Terms(
            deployment="test", image="image", public_url="http://stoker", onstart="true"
        )
    )
    numbers: dict[str, int] = field(default_factory=dict)
    receiver_up: bool = True

    @property
    def renter(self) -> Renter:
        return Renter(store=self.store, provider=self.provider, terms=self.terms, clock=self.clock)

    @property
    def keeper(self) -> Keeper:
        return Keeper(store=self.store, provider=self.provider, clock=self.clock)

    def add_job(self, job_id: str = "job_1", **request: Any) -> Job:
        with self.store.transaction() as tx:
            if f"ds_{job_id}" not in self.numbers:
                self.numbers[f"ds_{job_id}"] = 0
                tx.add_dataset(
                    Dataset(
                        id=f"ds_{job_id}",
                        owner="o",
                        created_at=self.clock(),
                        status=DatasetStatus.READY,
                    )
                )
            wanted = JobRequest(
                **{
                    "dataset_id": f"ds_{job_id}",
                    "base": "civitai:1",
                    "webhook_url": "https://example.com/hook",
                    **request,
                }
            )
            secret = Secret("whsec_" + "A" * 44)
            return record.create_job(
                tx,
                wanted,
                owner="o",
                now=self.clock(),
                job_id=job_id,
                webhook_secrets=[secret],
            )

    def report(
        self, fact: Fact, data: Mapping[str, Any] | None = None, *, job: str = "job_1"
    ) -> record.Taken:
        """One more report of the job's present attempt."""
        self.hello(job)
        attempt = self.job(job).attempt
        key = f"{job}.{attempt}"
        self.numbers[key] = self.numbers.get(key, 0) + 1
        sent = Report(
            job=job,
            attempt=attempt,
            seq=self.numbers[key],
            type=fact,
            at=self.clock().timestamp(),
            data=data or {},
        )
        with self.store.transaction() as tx:
            return record.take_reports(tx, [sent], self.clock())[0]

    def hello(self, job: str = "job_1") -> None:
        """The agent on the job's newest machine introduces itself, unless one did before."""
        rented = [item for item in self.leases(job) if item.instance_id and item.open]
        if not rented or self.job(job).lease:
            return
        token = self.provider.rentals[rented[-1].instance_id].spec.env["STOKER_TOKEN"]
        hashed, now = hashlib.sha256(token.encode()).hexdigest(), self.clock()
        with self.store.transaction() as tx:
            seen = record.knock(tx, hashed, "nonce", now, lock=True)
            record.admit(tx, seen, nonce="nonce", secret=Secret("whsec_" + "B" * 44), now=now)

    def job(self, job_id: str = "job_1") -> Job:
        with self.store.transaction() as tx:
            return tx.job(job_id)

    def leases(self, job_id: str = "job_1") -> list[Lease]:
        with self.store.transaction() as tx:
            return tx.leases_of(job_id)

    def webhooks(self, job_id: str = "job_1") -> list[str]:
        with self.store.transaction() as tx:
            return [row.type for row in tx.list_outgoing(job_id)]

    def tick(self, seconds: float = 1.0) -> None:
        """Let time pass, reconcile once, and run what it woke."""
        now = self.clock.advance(seconds)
        if self.receiver_up:
            with self.store.transaction() as tx:
                said = policy.sign_of_life(tx.beats().get(RECEIVER), now)
                tx.beat(RECEIVER, now, said)
        woken: list[tuple[str, Sequence[str]]] = []
        reconcile(self.store, lambda task, ids: woken.append((task, list(ids))), self.clock())
        for task, ids in woken:
            if task == "tend":
                self.keeper.tend(ids)
            for item in ids:
                if task == "allocate":
                    self.renter.allocate(item)
                elif task == "deallocate":
                    self.keeper.release_job(item)

    def settle(self, *, ticks: int = 200) -> None:
        """Tick until no lease is open."""
        for _ in range(ticks):
            with self.store.transaction() as tx:
                if not tx.open_leases():
                    return
            self.tick()
        raise AssertionError(f"leases stayed open: {self.leases()}")


@pytest.fixture
def world(clock: Clock) -> World:
    return World(clock, MemoryProvider(clock, [offer(1), offer(2, price=500_000)]))


class MemoryStorage:
    """The part of `infra.storage.Storage` that tasks use, on a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self._at(key))

    def put_file(self, key: str, path: Path, *, content_type: str = "") -> None:
        self.objects[key] = path.read_bytes()

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def delete_prefix(self, prefix: str) -> int:
        doomed = [key for key in self.objects if key.startswith(prefix)]
        for key in doomed:
            del self.objects[key]
        return len(doomed)

    def copy(self, source: str, target: str) -> None:
        self.objects[target] = self._at(source)

    def verify(self, key: str, *, bytes: int, sha256: str) -> None:
        body = self._at(key)
        if (len(body), hashlib.sha256(body).hexdigest()) != (bytes, sha256):
            raise StorageError(f"{key} is something else", code="weights_checksum", retryable=False)

    verify_safetensors = verify

    def _at(self, key: str) -> bytes:
        if key not in self.objects:
            raise NotFound(f"{key} is not in the store")
        return self.objects[key]


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()
