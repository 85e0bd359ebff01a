"""The market's list turns into rubbish for minutes: nothing is lost, nothing rented blindly."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from gpu_agent.wire import Fact, Report
from infra.sandbox.faults import Fault
from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state import alarms, money, policy, record
from state.events import Dataset, DatasetStatus, Secret
from state.job import GpuNeeds, Job, JobRequest, Status
from state.lease import Lease, LeaseStatus
from state.memory import MemoryStore
from state.money import Limits
from tasks.allocate import Renter, Terms
from tasks.deallocate import Keeper, sweep
from tasks.reconcile import RECEIVER, reconcile

KEY = "sandbox-account-key"
LIMITS = Limits(rentals_per_minute=8, failures=5, runway=timedelta(hours=1))
EMPTY = {"success": True, "instances_found": 0, "total_instances": 0, "instances": []}
NEEDS = GpuNeeds(min_vram_gb=1, max_price=5_000_000, verified_only=False, min_download_mbps=1)


@dataclass
class Deployment:
    """A Stoker in memory on a sandbox behind its socket. Agents are played here."""

    clock: Any
    sandbox: Sandbox
    store: MemoryStore = field(default_factory=MemoryStore)
    sweeps: Any = field(default_factory=lambda: itertools.cycle(range(6)))
    seq: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.provider = VastProvider(KEY, self.sandbox.url, spacing=0, timeout=10)
        terms = Terms(
            deployment="test", image="i", public_url="http://s", onstart="sleep 99", limits=LIMITS
        )
        self.renter = Renter(
            store=self.store, provider=self.provider, terms=terms, clock=self.clock
        )
        self.keeper = Keeper(store=self.store, provider=self.provider, clock=self.clock)

    def order(self, job_id: str) -> None:
        now = self.clock()
        request = JobRequest(dataset_id=f"ds_{job_id}", base="civitai:1", gpu=NEEDS, hedge=False)
        ready = Dataset(
            id=request.dataset_id, owner="o", created_at=now, status=DatasetStatus.READY
        )
        with self.store.transaction() as tx:
            tx.add_dataset(ready)
            record.create_job(tx, request, owner="o", now=now, job_id=job_id)

    def tick(self, seconds: float = 5.0) -> None:
        now = self.clock.advance(seconds)
        self.sandbox.market.tick()
        with self.store.transaction() as tx:
            for name in (RECEIVER, "worker"):
                tx.beat(name, now, policy.sign_of_life(tx.beats().get(name), now))
        for lease in self.leases():
            self.speak(lease)
        woken: list[tuple[str, Sequence[str]]] = []
        reconcile(self.store, lambda task, ids: woken.append((task, ids)), now)
        for task, ids in woken:
            if task == "tend":
                self.keeper.tend(ids)
            for item in ids if task in ("allocate", "deallocate") else ():
                act = self.renter.allocate if task == "allocate" else self.keeper.release_job
                act(item)
        if next(self.sweeps) == 0:
            sweep(self.keeper, "test")

    def speak(self, lease: Lease) -> None:
        """The agent says hello once its machine runs, and later that it lives and works."""
        contract = self.sandbox.market.contracts.get(int(lease.instance_id or 0))
        if contract is None or contract.actual != "running":
            return
        if not self.job(lease.job).lease:
            now, token = self.clock(), contract.env["STOKER_TOKEN"]
            with self.store.transaction() as tx:
                hashed = hashlib.sha256(token.encode()).hexdigest()
                seen = record.knock(tx, hashed, "nonce", now, lock=True)
                record.admit(tx, seen, nonce="nonce", secret=Secret("whsec_x"), now=now)
        step = next(self.seq)
        if self.job(lease.job).status is Status.TRAINING:
            self.report(lease.job, Fact.TRAINING_PROGRESS, {"step": step, "moved": step})
        else:
            self.report(lease.job, Fact.HEARTBEAT, {"moved": step})

    def report(self, job_id: str, fact: Fact, data: Any) -> None:
        now, number = self.clock(), next(self.seq)
        sent = Report(job=job_id, attempt=1, seq=number, type=fact, at=now.timestamp(), data=data)
        with self.store.transaction() as tx:
            record.take_reports(tx, [sent], now)

    def job(self, job_id: str) -> Job:
        with self.store.transaction() as tx:
            return tx.job(job_id)

    def leases(self) -> list[Lease]:
        with self.store.transaction() as tx:
            return tx.open_leases()

    def codes(self) -> set[str]:
        with self.store.transaction() as tx:
            return {item.code for item in alarms.standing(tx, LIMITS, self.clock())}

    def made(self) -> int:
        return len(self.sandbox.market.contracts) + len(self.sandbox.market.ended)


@contextlib.contextmanager
def deployed(clock: Any, **options: Any) -> Iterator[Deployment]:
    clock_s = options.pop("clock_s", lambda: clock().timestamp())
    with running_sandbox(account_key=KEY, clock=clock_s, **({"boot_s": 60} | options)) as sandbox:
        yield Deployment(clock, sandbox)


@pytest.mark.parametrize(
    "trouble",
    [
        Fault(op="list", kind="deprecated", times=0),
        Fault(op="list", kind="empty", times=0),
        Fault(op="list", kind="html", times=0),
        Fault(op="list", kind="half_page", times=0),
        Fault(op="list", kind="answer", body={"success": False, "msg": "no"}, times=0),
        Fault(op="list", kind="answer", body={**EMPTY, "next_token": None}, times=0),
    ],
    ids=["410", "nothing", "html", "half a page", "success false", "an empty list"],
)
def test_a_list_that_cannot_be_trusted_costs_nothing_and_loses_nothing(
    clock: Any, trouble: Fault
) -> None:
    with deployed(clock) as stoker:
        for number in range(4):
            stoker.order(f"job_{number}")
        for _ in range(30):
            stoker.tick()
        before = {lease.id for lease in stoker.leases() if lease.status is LeaseStatus.RENTED}
        assert len(before) == 4
        assert stoker.codes() == set()

        stoker.sandbox.faults.plan.append(trouble)
        alarm = "list.doubtful" if trouble.body and trouble.body["success"] else "list.unreadable"
        began, alarmed_at, made = stoker.clock(), None, []
        for tick in range(120):
            if tick % 6 == 0:
                stoker.order(f"late_{tick}")
            stoker.tick()
            made.append((stoker.clock() - began, stoker.made()))
            if alarmed_at is None and alarm in stoker.codes():
                alarmed_at = stoker.clock()
        assert alarmed_at is not None
        assert alarmed_at - began <= timedelta(seconds=60)
        blind = [count for since, count in made if since >= timedelta(seconds=95)]
        assert len(set(blind)) == 1, "something was rented on an account that we cannot see"
        assert blind[0] - 4 <= LIMITS.rentals_per_minute
        assert stoker.sandbox.market.ended == [], "something was destroyed"
        assert before <= {item.id for item in stoker.leases() if item.status is LeaseStatus.RENTED}

        stoker.sandbox.faults.plan.clear()
        for _ in range(40):
            stoker.tick()
        assert not stoker.codes() & {"list.unreadable", "list.doubtful"}
        assert stoker.made() > blind[0], "nothing is rented after the healing"
        with stoker.store.transaction() as tx:
            for job in tx.list_jobs(limit=999):
                record.cancel(tx, job.id, stoker.clock())
        for _ in range(60):
            stoker.tick()
        assert stoker.leases() == []
        assert stoker.sandbox.market.contracts == {}


@pytest.mark.parametrize("time_scale", [1.0, 60.0])
def test_the_receipt_is_the_markets_bill_within_one_per_cent(clock: Any, time_scale: float) -> None:
    began: datetime = clock()

    def real() -> float:
        return began.timestamp() + (clock() - began).total_seconds() / time_scale

    with deployed(clock, clock_s=real, time_scale=time_scale) as stoker:
        stoker.order("job")
        while not stoker.job("job").lease:
            stoker.tick()
        (lease,) = stoker.leases()
        number, market = int(lease.instance_id or 0), stoker.sandbox.market
        bill = market.contracts[number].charges
        stoker.report("job", Fact.GPU_READY, {})
        stoker.report("job", Fact.IMAGES_READY, {"bytes": 300_000_000})
        stoker.report("job", Fact.MODEL_READY, {"bytes": 2_100_000_000})
        market.charge(number, "bwd", 2.4)
        stoker.report("job", Fact.FILES_POSITIONED, {})
        files = [{"name": "lora.safetensors", "bytes": 150_000_000, "sha256": "0" * 64}]
        for _ in range(500):
            stoker.tick()
        assert stoker.job("job").status is Status.TRAINING
        for fact in (Fact.TRAINING_CHECKPOINT, Fact.WEIGHTS_UPLOADED):
            stoker.report("job", fact, {"files": files})
            market.charge(number, "bwu", 0.15)
        with stoker.store.transaction() as tx:
            record.verified(tx, "job", 1, stoker.clock())
        while stoker.leases():
            stoker.tick()
        market.settle()
        assert stoker.job("job").status is Status.COMPLETED
        with stoker.store.transaction() as tx:
            (counted,) = tx.leases_of("job")
        truth = round(sum(bill.values()) * 1_000_000)
        parts = money.cost(counted, stoker.clock())
        assert counted.billed is None
        assert counted.cost == pytest.approx(truth, rel=0.01)
        assert parts.bandwidth == pytest.approx((bill["bwd"] + bill["bwu"]) * 1e6, rel=0.01)
        for _ in range(70):
            stoker.tick()
        with stoker.store.transaction() as tx:
            (billed,) = tx.leases_of("job")
            spent = tx.spend_of("job")
        assert billed.billed == pytest.approx(truth, rel=0.001)
        assert spent == max(billed.billed or 0, counted.cost)
        for _ in range(24):
            stoker.tick(3700)
        with stoker.store.transaction() as tx:
            (final,) = tx.leases_of("job")
            assert (final.due_at, tx.spend_of("job")) == (None, final.billed)
