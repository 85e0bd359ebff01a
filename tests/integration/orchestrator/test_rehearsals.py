"""Test keys: what they order is rehearsed by the real server on machines that only pretend.

Everything between the customer's request and the machine's uploads is real, but the sockets: time
is the test's, and passes a tenth of a second at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from infra.provider_memory import MemoryProvider
from infra.rehearsal import Cue, Machine, Market
from infra.rehearsal.machine import Answer
from infra.safetensors import read_weights
from state import alarms, brakes, money, policy, rehearsal
from state.errors import NotFound, ProviderError, StorageError, Unreadable
from state.events import Dataset
from state.job import Status
from state.lease import Lease, LeaseStatus
from state.memory import MemoryStore
from state.offer import Offer
from state.rehearsal import FIXTURES
from tasks.allocate import Renter, Terms
from tasks.deallocate import Keeper
from tasks.deallocate import sweep as sweep_account
from tasks.reconcile import RECEIVER, reconcile
from tasks.rehearse import MACHINES, Rehearsals
from tasks.verify import Verifier

S3 = "https://s3.test/"
TICK_S = 0.1
REAL = Offer(
    id="77",
    machine_id="4711",
    gpu_name="RTX 4090",
    num_gpus=1,
    vram_gb=24.0,
    price=400_000,
    storage_price=10_000,
    download_price=0,
    upload_price=0,
    download_mbps=800.0,
    upload_mbps=800.0,
    reliability=0.99,
    verified=True,
    cuda=12.8,
    disk_gb=500.0,
)


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.jpg", b"a photograph")
    return made.getvalue()


ZIP = zipped()


@dataclass
class Shelf:
    """An S3 in memory, as far as edge, verifier and machines go."""

    objects: dict[str, bytes] = field(default_factory=dict)

    def presign_put(self, key: str, *, bytes: int, expires_s: int) -> Any:
        return type("Upload", (), {"url": S3 + key, "headers": {"Content-Length": str(bytes)}})

    def presign_get(self, key: str, *, expires_s: int) -> str:
        return S3 + key

    def head(self, key: str) -> int | None:
        return len(self.objects[key]) if key in self.objects else None

    def copy(self, source: str, target: str) -> None:
        if source not in self.objects:
            raise NotFound(source)
        self.objects[target] = self.objects[source]

    def verify(self, key: str, *, bytes: int, sha256: str) -> None:
        body = self.objects[key]
        if (len(body), hashlib.sha256(body).hexdigest()) != (bytes, sha256):
            raise StorageError("it is something else", retryable=False)

    def verify_safetensors(self, key: str, *, bytes: int, sha256: str) -> None:
        self.verify(key, bytes=bytes, sha256=sha256)
        read_weights(io.BytesIO(self.objects[key]), bytes, lambda piece: None)


@dataclass
class Playing:
    """A machine under way, and when it goes on."""

    cue: Cue
    goes_on: Iterator[float]
    at: Any


class Theatre:
    """A whole installation, with a real market beside that of test mode."""

    def __init__(self, edge: Any, clock: Any) -> None:
        self.edge, self.clock = edge, clock
        self.store, self.shelf = edge.store, edge.storage
        self.real = MemoryProvider(clock, [REAL])
        self.playing: list[Playing] = []
        self.market = Market(store=self.store, clock=clock, play=self._play)
        terms = Terms(
            deployment="stoker", image="image", public_url="https://stoker.test", onstart="true"
        )
        self.renter = Renter(store=self.store, provider=self.real, terms=terms, clock=clock)
        self.keeper = Keeper(store=self.store, provider=self.real, clock=clock)
        self.rehearsals = Rehearsals(store=self.store, market=self.market, terms=terms, clock=clock)
        self.verifier = Verifier(store=self.store, storage=self.shelf, clock=clock)  # type: ignore[arg-type]
        self.test = edge.key("acme", kind="test")
        self.live = edge.key("acme")

    # --- the customer

    def dataset(self, owner: str = "acme~test") -> Dataset:
        found = self.edge.dataset(owner)
        digest = hashlib.sha256(ZIP).hexdigest()
        found = found.evolve(zip_bytes=len(ZIP), zip_sha256=digest)
        with self.store.transaction() as tx:
            tx.save_dataset(found)
        self.shelf.objects[found.zip_key] = ZIP
        return found

    def post(self, key: Mapping[str, str] | None = None, **body: Any) -> Any:
        dataset = body.pop("dataset_id", None) or self.dataset().id
        given = {"dataset_id": dataset, "base": "civitai:4711", "recipe": {"steps": 100}, **body}
        return self.client.post("/v1/jobs", json=given, headers=key or self.test)

    def order(self, fixture: str = rehearsal.SUCCESS, **body: Any) -> str:
        test = {"fixture": fixture, "time_scale": body.pop("time_scale", 60.0)}
        answer = self.post(test=test, **body)
        assert answer.status_code == 202, answer.text
        return str(answer.json["id"])

    @property
    def client(self) -> FlaskClient:
        return self.edge.client()

    def get(self, path: str, key: Mapping[str, str] | None = None) -> Any:
        return self.client.get(path, headers=key or self.test)

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.get(f"/v1/jobs/{job_id}").json)

    def ways(self, job_id: str) -> list[str]:
        return [step["target"] for step in self.job(job_id)["transitions"]]

    # --- what happens by itself

    def _play(self, cue: Cue) -> None:
        machine = Machine(cue, Lines(self), self.clock)
        self.playing.append(Playing(cue, machine.play(), self.clock()))

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            for item in list(self.playing):
                self._go_on(item)
            self._work()

    def until(self, job_id: str, *ends: str, seconds: float = 120.0) -> dict[str, Any]:
        """The job once it is in one of these; how long it took is `clock`'s."""
        for _ in range(round(seconds / TICK_S)):
            shown = self.edge.stored(job_id)
            if shown.status in ends:
                return self.job(job_id)
            self.pass_time(TICK_S)
        pytest.fail(f"{job_id} is {shown.status} still: {self.ways(job_id)}, {shown.progress}")

    def ended(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        return self.until(job_id, "completed", "failed", "cancelled", seconds=seconds)

    def _go_on(self, item: Playing) -> None:
        while item.at <= self.clock():
            if not self.market.is_wanted(item.cue.instance):
                self.playing.remove(item)
                return
            try:
                waits = next(item.goes_on)
            except StopIteration:
                self.market.destroy(item.cue.instance)
                self.playing.remove(item)
                return
            item.at += timedelta(seconds=waits / item.cue.part.time_scale)

    def _work(self) -> None:
        """What beat and workers do, as `tasks.app` has it."""
        now = self.clock()
        with self.store.transaction() as tx:
            tx.beat(RECEIVER, now, policy.sign_of_life(tx.beats().get(RECEIVER), now))
        reconcile(self.store, self.wake, now)
        woken, self.edge.woken[:] = list(self.edge.woken), []
        for task, subject in woken:
            self.wake(task, [subject])

    def wake(self, task: str, ids: Sequence[str]) -> None:
        for name in ids:
            match task:
                case "allocate":
                    self.renter.allocate(name)
                    self.rehearsals.allocate(name)
                case "deallocate":
                    self.keeper.release_job(name)
                    self.rehearsals.release_job(name)
                case "tend":
                    self.keeper.tend([name])
                    self.rehearsals.tend([name])
                case "verify":
                    self.verifier.verify(name)
                    self.wake("deallocate", [name])

    def leases(self, job_id: str) -> list[Lease]:
        with self.store.transaction() as tx:
            return tx.leases_of(job_id)


class Lines:
    """A machine's line to the edge and to the shelf."""

    def __init__(self, theatre: Theatre) -> None:
        self._theatre = theatre

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        assert url.startswith("https://stoker.test/agent/v1/"), url
        path = url.removeprefix("https://stoker.test")
        answer = self._theatre.client.post(path, data=body, headers=dict(headers))
        return Answer(answer.status_code, answer.data)

    def get(self, url: str) -> Answer:
        found = self._theatre.shelf.objects.get(url.removeprefix(S3))
        return Answer(404) if found is None else Answer(200, found)

    def put(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        assert headers["Content-Length"] == str(len(body))
        self._theatre.shelf.objects[url.removeprefix(S3)] = body
        return Answer(200)


@pytest.fixture
def theatre(new_edge: Any, clock: Any) -> Iterator[Theatre]:
    theatre = Theatre(new_edge(MemoryStore(), clock, storage=Shelf()), clock)
    yield theatre
    assert not theatre.real.rentals, "a real machine was rented"


# --- each fixture, end to end -----------------------------------------------------------------


def test_a_rehearsal_goes_all_the_way_in_seconds(theatre: Theatre) -> None:
    began = theatre.clock()
    job = theatre.ended(theatre.order())
    assert job["status"] == "completed"
    assert 4 < (theatre.clock() - began).total_seconds() < 12
    ways = ["pendingGpu", "pendingImages", "pendingModel", "training", "completed"]
    assert theatre.ways(job["id"]) == ways
    assert {item["name"] for item in job["result_files"]} >= {
        "lora.safetensors", "training.log", "samples/000050-0.png", "samples/000100-0.png",
    }  # fmt: skip
    assert all(item["verified"] for item in job["result_files"])
    assert job["progress"]["images"]["images"] == 4
    first, best = (job["progress"]["result"][key] for key in ("loss_first", "loss_best"))
    assert best < first / 2 + 0.05
    kinds = [
        event["type"]
        for event in theatre.get(f"/v1/jobs/{job['id']}/events?limit=1000").json["data"]
    ]
    assert {"training.sample", "training.checkpoint", "log.lines"} <= set(kinds)


def test_a_rehearsal_gives_its_machine_back_within_seconds(theatre: Theatre) -> None:
    job_id = theatre.order()
    theatre.ended(job_id)
    theatre.pass_time(4)
    assert [lease.status for lease in theatre.leases(job_id)] == [LeaseStatus.RELEASED]
    assert theatre.market.instances() == []


def test_a_slower_time_scale_takes_so_much_longer(theatre: Theatre) -> None:
    began = theatre.clock()
    theatre.ended(theatre.order(time_scale=6.0))
    assert 50 < (theatre.clock() - began).total_seconds() < 75


def test_out_of_memory_goes_on_elsewhere(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.OOM))
    assert (job["status"], job["attempt"]) == ("completed", 2)
    (stall,) = [step for step in job["transitions"] if step["target"] == "stalled"]
    assert stall["reason"]["code"] == "trainer.oom"
    one, other = theatre.leases(job["id"])
    assert one.machine_id != other.machine_id


def test_out_of_memory_on_the_only_attempt_fails(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.OOM, max_attempts=1))
    assert (job["status"], job["reason"]["code"]) == ("failed", "trainer.oom")


def test_a_host_that_dies_costs_no_step_before_the_last_checkpoint(theatre: Theatre) -> None:
    began = theatre.clock()
    job = theatre.ended(theatre.order(rehearsal.HOST_DIES))
    assert (job["status"], job["attempt"]) == ("completed", 2)
    (stall,) = [step for step in job["transitions"] if step["target"] == "stalled"]
    assert stall["reason"]["code"] == "agent.silent"
    with theatre.store.transaction() as tx:
        begun = [event.data["step"] for event in tx.events(job["id"], type="training.started")]
    assert begun == [0, 50]
    assert (theatre.clock() - began).total_seconds() < 25


def test_without_offers_the_job_waits_with_the_reason_until_it_is_cancelled(
    theatre: Theatre,
) -> None:
    job_id = theatre.order(rehearsal.NO_OFFERS)
    theatre.pass_time(5)
    job = theatre.job(job_id)
    assert job["status"] == "pendingGpu"
    assert "no offer meets the needs" in job["progress"]["gpu_search"]
    answer = theatre.client.post(f"/v1/jobs/{job_id}/cancel", headers=theatre.test)
    assert answer.json["status"] == "cancelled"


def test_without_offers_the_job_fails_once_its_time_is_over(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.NO_OFFERS), seconds=100)
    assert (job["status"], job["reason"]["code"]) == ("failed", "pendingGpu.timeout")


def test_a_slow_boot_gets_a_second_machine_beside_it(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.SLOW_BOOT))
    assert (job["status"], job["attempt"]) == ("completed", 1)
    slow, ready = theatre.leases(job["id"])
    assert (slow.hedge, ready.hedge) == (False, True)
    assert slow.ready_at is None
    theatre.pass_time(4)
    assert theatre.market.instances() == []


def test_weights_that_are_not_finite_are_refused_and_made_again(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.BAD_WEIGHTS))
    assert (job["status"], job["attempt"]) == ("completed", 2)
    (stall,) = [step for step in job["transitions"] if step["target"] == "stalled"]
    assert stall["reason"]["code"] == "weights.invalid"


def test_what_no_other_machine_would_mend_fails_at_once(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(rehearsal.FAILS))
    assert (job["status"], job["attempt"]) == ("failed", 1)
    assert job["reason"] == {
        "code": "training.diverged", "message": job["reason"]["message"], "retryable": False,
    }  # fmt: skip


def test_every_fixture_that_is_known_can_be_ordered(theatre: Theatre) -> None:
    for fixture in FIXTURES:
        theatre.order(fixture)


def test_orders_reach_the_machine(theatre: Theatre) -> None:
    job_id = theatre.order(time_scale=6.0)
    theatre.until(job_id, "training")
    theatre.pass_time(2)
    for verb in ("checkpoint", "sample"):
        answer = theatre.client.post(f"/v1/jobs/{job_id}/{verb}", headers=theatre.test)
        assert answer.status_code == 202
    theatre.pass_time(2)
    with theatre.store.transaction() as tx:
        kinds = {event.type for event in tx.events(job_id, limit=1000)}
    assert {"training.checkpoint", "training.sample"} <= kinds
    theatre.client.post(f"/v1/jobs/{job_id}/cancel", headers=theatre.test)
    theatre.pass_time(3)
    assert theatre.market.instances() == []


def test_a_cap_that_pays_for_nothing_ends_the_job(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order(max_cost=1))
    assert (job["status"], job["reason"]["code"]) == ("failed", "budget.job")


@pytest.mark.parametrize("time_scale", [1, 600])
def test_the_usual_cap_pays_at_every_time_scale(theatre: Theatre, time_scale: float) -> None:
    job_id = theatre.order(time_scale=time_scale)
    theatre.until(job_id, "training", "completed", seconds=400)


def test_a_machine_whose_process_died_is_given_up_for_another(theatre: Theatre) -> None:
    """A worker that is restarted takes the machines along that it played."""
    job_id = theatre.order()
    theatre.until(job_id, "training")
    theatre.playing.clear()
    job = theatre.ended(job_id)
    assert (job["status"], job["attempt"]) == ("completed", 2)


def test_a_machine_that_died_while_it_booted_is_found_by_the_sweep(theatre: Theatre) -> None:
    job_id = theatre.order(time_scale=1, hedge=False)
    theatre.pass_time(2)
    theatre.playing.clear()
    theatre.pass_time(25)
    assert theatre.rehearsals.sweep() == [theatre.leases(job_id)[0].id]
    theatre.pass_time(3)
    assert len(theatre.leases(job_id)) == 2


def test_no_more_machines_are_played_than_the_cap(theatre: Theatre) -> None:
    dataset = theatre.dataset().id
    jobs = [theatre.order(dataset_id=dataset) for _ in range(MACHINES + 2)]
    most = 0
    for _ in range(20):
        theatre.pass_time(0.2)
        most = max(most, len(theatre.playing))
    assert most == MACHINES
    waiting = [item for item in map(theatre.edge.stored, jobs) if item.status is Status.PENDING_GPU]
    assert any("machines at the same time" in item.progress["gpu_search"] for item in waiting)
    assert [theatre.ended(job)["status"] for job in jobs] == ["completed"] * len(jobs)


# --- who sees what ----------------------------------------------------------------------------


def test_jobs_and_webhooks_say_their_mode(theatre: Theatre) -> None:
    hook = {"url": "https://example.com/hook"}
    made = theatre.post(webhook=hook).json
    assert (made["livemode"], made["test"]) == (
        False,
        {"fixture": "test_success", "time_scale": 60.0},
    )
    dataset = theatre.dataset("acme").id
    real = theatre.post(theatre.live, dataset_id=dataset, webhook=hook).json
    assert (real["livemode"], real["test"]) == (True, None)
    with theatre.store.transaction() as tx:
        modes = [tx.list_outgoing(job["id"])[0].payload["data"]["livemode"] for job in (made, real)]
        tx.save_job(tx.job(real["id"]).evolve(due_at=None))  # nobody rents for it here
    assert modes == [False, True]
    assert theatre.get("/v1/jobs").json["data"][0]["livemode"] is False


def test_neither_mode_sees_the_other(theatre: Theatre) -> None:
    job_id, dataset = theatre.order(), theatre.dataset().id
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", f"/v1/datasets/{dataset}"):
        assert theatre.get(path).status_code == 200
        for key in (theatre.live, theatre.edge.key("other", kind="test")):
            assert theatre.get(path, key).status_code == 404
    assert theatre.get("/v1/jobs", theatre.live).json["data"] == []
    assert theatre.client.post(f"/v1/jobs/{job_id}/cancel", headers=theatre.live).status_code == 404
    operator = theatre.edge.key("operations", "operator")
    assert theatre.get(f"/v1/jobs/{job_id}", operator).json["livemode"] is False


def test_a_dataset_is_of_one_mode(theatre: Theatre, problem: Any) -> None:
    rehearsed, real = theatre.dataset().id, theatre.dataset("acme").id
    operator = theatre.edge.key("operations", "operator")
    for key, dataset in ((theatre.live, rehearsed), (theatre.test, real), (operator, rehearsed)):
        problem(theatre.post(key, dataset_id=dataset), 422, "unknown_dataset")


def test_a_live_key_orders_no_test(theatre: Theatre, problem: Any) -> None:
    dataset = theatre.dataset("acme").id
    answer = theatre.post(theatre.live, dataset_id=dataset, test={"fixture": "test_oom"})
    (fault,) = problem(answer, 422)["errors"]
    assert fault["pointer"] == "/test"
    assert theatre.get("/v1/jobs", theatre.live).json["data"] == []


NO_TESTS: tuple[Any, ...] = (
    {"fixture": "test_ooom"}, {"fixture": None}, {"time_scale": 0.5}, {"time_scale": 601},
    {"time_scale": "60"}, {"time_scale": float("nan")}, {"speed": 2}, "test_oom", 7,
)  # fmt: skip


def test_a_test_that_is_none_is_refused(theatre: Theatre, problem: Any) -> None:
    for test in NO_TESTS:
        assert theatre.post(test=test).status_code in (400, 422), test
    said = problem(theatre.post(test={"fixture": "test_ooom"}), 422)
    assert all(name in json.dumps(said) for name in FIXTURES)


def test_a_test_key_is_never_an_operators(theatre: Theatre) -> None:
    key = theatre.edge.key("operations", "operator", "jobs:read", kind="test")
    assert theatre.get("/v1/hosts", key).status_code == 403
    assert theatre.get("/v1/jobs", key).status_code == 200


def test_the_same_idempotency_key_is_another_in_the_other_mode(theatre: Theatre) -> None:
    real = theatre.dataset("acme").id
    named = {"Idempotency-Key": "one"}
    one = theatre.post({**theatre.test, **named})
    other = theatre.post({**theatre.live, **named}, dataset_id=real)
    assert (one.status_code, other.status_code) == (202, 202)
    assert one.json["id"] != other.json["id"]
    with theatre.store.transaction() as tx:
        tx.save_job(tx.job(other.json["id"]).evolve(due_at=None))


def test_any_base_that_is_well_formed_will_do(theatre: Theatre) -> None:
    theatre.edge.base_error = StorageError("no model's site may be asked")
    assert theatre.ended(theatre.order(base="hf:nobody/nothing"))["status"] == "completed"


# --- what is real never meets what is rehearsed -------------------------------------------------


def test_the_real_renter_rents_for_no_rehearsal(theatre: Theatre) -> None:
    job_id = theatre.order()
    assert theatre.renter.allocate(job_id) is None
    assert theatre.leases(job_id) == []


def test_a_rehearsals_renter_rents_for_nothing_real(theatre: Theatre) -> None:
    job = theatre.edge.job("acme")
    assert theatre.rehearsals.allocate(job.id) is None
    terms = Terms(deployment="test:60:stoker", image="i", public_url="https://u", onstart="")
    renter = Renter(store=theatre.store, provider=theatre.market, terms=terms, clock=theatre.clock)
    assert renter.allocate(job.id) is None
    assert theatre.leases(job.id) == []


def test_the_real_keeper_leaves_rehearsals_alone(theatre: Theatre) -> None:
    job_id = theatre.order()
    theatre.until(job_id, "training")
    (lease,) = theatre.leases(job_id)
    theatre.real.create(REAL, _spec(lease.label))  # the worst: a real one with such a label
    theatre.client.post(f"/v1/jobs/{job_id}/cancel", headers=theatre.test)
    theatre.keeper.release_job(job_id)
    theatre.keeper.tend([lease.id])
    swept = [sweep_account(theatre.keeper, "stoker") for _ in range(4)][-1]
    assert (swept.destroyed, swept.suspects) == ((), ())
    assert [item.label for item in theatre.real.running()] == [lease.label]
    assert theatre.leases(job_id)[0].status is LeaseStatus.RELEASING
    theatre.real.rentals.clear()


def _spec(label: str) -> Any:
    from infra.provider import LaunchSpec

    return LaunchSpec(label=label, image="image", disk_gb=40, onstart="true")


def test_a_rehearsals_keeper_leaves_what_is_real_alone(theatre: Theatre) -> None:
    job = theatre.edge.job("acme")
    lease = theatre.renter.allocate(job.id)
    assert lease is not None
    theatre.client.post(f"/v1/jobs/{job.id}/cancel", headers=theatre.live)
    theatre.rehearsals.keeper.tend([lease.id])
    theatre.rehearsals.tend([lease.id])
    theatre.rehearsals.release_job(job.id)
    theatre.rehearsals.sweep()
    assert len(theatre.real.running()) == 1
    theatre.keeper.release_job(job.id)
    assert theatre.real.running() == []
    theatre.real.rentals.clear()


def test_the_market_of_tests_refuses_what_bears_no_mark(theatre: Theatre) -> None:
    offer = theatre.market.offers(theatre.edge.job("acme").request.gpu)[0]
    for given, label in ((REAL, "test:60:stoker/j/1-a"), (offer, "stoker/j/1-a")):
        with pytest.raises(ProviderError):
            theatre.market.create(given, _spec(label))
    with pytest.raises(ProviderError):
        theatre.market.destroy("12345678")


def test_a_market_of_tests_that_cannot_be_read_stops_nothing_real(theatre: Theatre) -> None:
    rehearsed = theatre.order()
    theatre.until(rehearsed, "training")
    with theatre.store.transaction() as tx:
        tx.beat("rehearsals", theatre.clock(), {"instances": {"test-1": "garbage"}})
    with pytest.raises(Unreadable):
        theatre.market.instances()
    theatre.playing.clear()
    real = theatre.edge.job("acme")
    theatre.wake("allocate", [real.id])
    assert len(theatre.real.running()) == 1
    theatre.client.post(f"/v1/jobs/{real.id}/cancel", headers=theatre.live)
    theatre.wake("deallocate", [real.id])
    assert theatre.real.running() == []
    assert theatre.rehearsals.sweep() == []
    # nobody takes the unreadable list for an empty one
    theatre.client.post(f"/v1/jobs/{rehearsed}/cancel", headers=theatre.test)
    theatre.pass_time(5)
    assert theatre.leases(rehearsed)[0].status is LeaseStatus.RELEASING
    theatre.real.rentals.clear()


def test_a_real_market_that_is_down_stops_no_rehearsal(theatre: Theatre) -> None:
    from infra.provider_memory import Fault

    theatre.real.faults = lambda verb: Fault(error=Unreadable("the market is down"))
    assert sweep_account(theatre.keeper, "stoker").unreadable
    theatre.clock.advance(120)
    assert sweep_account(theatre.keeper, "stoker").unreadable
    with theatre.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="prices doubled", now=theatre.clock())
    job_id = theatre.order()
    assert theatre.ended(job_id)["status"] == "completed"
    theatre.pass_time(4)
    assert theatre.market.instances() == []


# --- money ------------------------------------------------------------------------------------

LIMITS = money.Limits(
    per_hour=1, per_day=1, total=1, machines=1, rate=1, rentals_per_minute=1, failures=1,
    runway=timedelta(hours=1),
)  # fmt: skip


def test_a_rehearsal_counts_nowhere_in_the_money(theatre: Theatre) -> None:
    """Neither while it runs nor afterwards, though it fails on two machines."""
    now = theatre.clock()
    job_id = theatre.order(rehearsal.OOM)
    theatre.until(job_id, "training")

    def untouched() -> None:
        with theatre.store.transaction() as tx:
            book = brakes.read(tx, LIMITS, theatre.clock())
            assert (list(book.leases), book.spent_ever) == ([], 0)
            assert brakes.stopped(book, LIMITS, theatre.clock()) is None
            assert (tx.open_leases(), tx.leases_since(now), tx.reserved()) == ([], [], 0)
            assert tx.spend_since(now - timedelta(days=1)) == 0
            assert tx.hosts() == []
            codes = {item.code for item in alarms.standing(tx, LIMITS, theatre.clock())}
        assert codes <= {"worker.stale", "beat.stale", "sweep.stale"}

    untouched()
    theatre.ended(job_id)
    theatre.pass_time(4)
    untouched()


def test_a_rehearsal_shows_what_it_would_have_cost(theatre: Theatre) -> None:
    job = theatre.ended(theatre.order())
    theatre.pass_time(4)
    cost = theatre.job(job["id"])["cost"]
    (machine,) = cost["machines"]
    (lease,) = theatre.leases(job["id"])
    assert lease.rented_at is not None
    assert lease.released_at is not None
    held = (lease.released_at - lease.rented_at).total_seconds()
    # six minutes and more of a machine, of which few seconds passed
    hours = 60 * held / 3600
    assert cost["so_far"] == pytest.approx(lease.price * hours, rel=0.2)
    assert machine["by"] == "count"
    assert theatre.job(job["id"])["cost"]["cap"] == 5_000_000


def test_a_rehearsal_is_asked_no_invoice_for(theatre: Theatre) -> None:
    job_id = theatre.order()
    theatre.ended(job_id)
    theatre.pass_time(4)
    assert theatre.leases(job_id)[0].due_at is None
