"""`/v1/instances`: what is rented now, and why each machine is kept or destroyed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from pydantic import Field

from orchestrator.api import present
from orchestrator.api.schemas import MicroUsd, Out
from orchestrator.deps import Deps
from state import alarms, brakes, money, renting
from state.job import Job
from state.lease import Lease, LeaseStatus
from state.store import Transaction

Verdict = Literal["renting", "unclear", "booting", "kept", "releasing"]


class Instance(Out):
    """A machine that costs money, or may."""

    lease: str
    instance_id: str | None = Field(description="the market's; null until it gave one")
    machine_id: str
    gpu: str
    geo: str
    job: str
    attempt: int
    owner: str
    status: str = Field(description="of the lease")
    verdict: Verdict
    why: str = Field(description="why it is kept, or why it goes")
    note: str = Field(description="what the market last said of its boot")
    hedge: bool = Field(description="rented beside a machine that is slow to boot")
    interruptible: bool
    created_at: datetime
    expires_at: datetime = Field(description="after this anybody may destroy it")
    age_s: float
    price_per_hour: MicroUsd
    cost: MicroUsd = Field(description="so far")
    display: str = Field(description="cost, for people")


class Stranger(Out):
    """An instance of the account that no lease of ours is for."""

    instance: str
    label: str
    machine: str
    age_s: int
    price: MicroUsd = Field(description="per hour")
    verdict: Literal["foreign", "suspect", "destroyed"]
    why: str


class LastSweep(Out):
    """The last comparison of the account with our leases."""

    at: datetime | None = Field(description="when the account's list was last read; null: never")
    age_s: float | None
    stale: bool = Field(description="so long ago that instances may run unseen")
    seen: int = Field(description="instances of the account")
    ours: int = Field(description="those with our label")
    foreign: int
    doubtful: bool = Field(description="the list shows none of our machines; not believed yet")
    error: str = Field(description="why the list cannot be read now, if so")
    strangers: list[Stranger] = Field(description="orphans and others'; the first of them")


class Instances(Out):
    data: list[Instance] = Field(description="those that go first, then the dearest")
    burn_per_hour: MicroUsd = Field(description="of all that are not being released")
    cost: MicroUsd = Field(description="of all of them so far")
    rehearsed: int = Field(description="machines of test keys' jobs, which only pretend; not here")
    sweep: LastSweep


def standing(tx: Transaction, now: datetime) -> Instances:
    """Every open lease, and what the last sweep saw."""
    opened, beats = tx.open_leases(), tx.beats()
    rehearsed = len(tx.open_rehearsals())
    jobs = tx.jobs({lease.job for lease in opened})
    listed = [_instance(lease, jobs.get(lease.job), now) for lease in opened]
    listed.sort(key=lambda item: (item.verdict != "releasing", -item.price_per_hour, item.lease))
    return Instances(
        data=listed,
        burn_per_hour=money.burn(opened),
        cost=sum(item.cost for item in listed),
        rehearsed=rehearsed,
        sweep=last_sweep(beats, now),
    )


def _instance(lease: Lease, job: Job | None, now: datetime) -> Instance:
    cost = money.spent(lease, now)
    verdict, why = judged(lease, job, now)
    return Instance(
        lease=lease.id,
        instance_id=lease.instance_id,
        machine_id=lease.machine_id,
        gpu=lease.gpu_name,
        geo=lease.geo,
        job=lease.job,
        attempt=lease.attempt,
        owner=job.owner if job else "",
        status=lease.status,
        verdict=verdict,
        why=why,
        note=lease.note,
        hedge=lease.hedge,
        interruptible=bool(lease.bid),
        created_at=lease.created_at,
        expires_at=lease.expires_at,
        age_s=max(0.0, (now - lease.created_at).total_seconds()),
        price_per_hour=lease.price,
        cost=cost,
        display=money.dollars(cost),
    )


def judged(lease: Lease, job: Job | None, now: datetime) -> tuple[Verdict, str]:
    """What becomes of an open lease, and why."""
    doomed = renting.wants_release(lease, job, now)
    if lease.status is LeaseStatus.RELEASING or doomed:
        asked = f"; asked for {lease.tries} times" if lease.tries > 1 else ""
        return "releasing", f"{doomed or lease.why}{asked}"
    if lease.status is LeaseStatus.INTENDED:
        return "renting", lease.why
    if lease.status is LeaseStatus.UNKNOWN:
        return "unclear", f"{lease.why}; the account's list will tell"
    if lease.ready_at is None:
        return "booting", "its agent has not said hello yet"
    return "kept", f"{lease.why}: {job.status}" if job else lease.why


def last_sweep(beats: brakes.Beats, now: datetime) -> LastSweep:
    at, said = beats.get(brakes.SWEEP, (None, {}))
    unread = brakes.unreadable_since(beats)
    error = beats[brakes.UNREADABLE][1].get("error", "") if unread else ""
    return LastSweep(
        at=at,
        age_s=None if at is None else max(0.0, (now - at).total_seconds()),
        stale=at is None or now - at > alarms.UNSWEPT,
        seen=said.get("seen", 0),
        ours=said.get("ours", 0),
        foreign=said.get("foreign", 0),
        doubtful=bool(said.get("doubts")),
        error=error,
        strangers=[_stranger(item) for item in said.get("strangers", ())],
    )


def _stranger(item: Mapping[str, Any]) -> Stranger:
    return Stranger(**{name: item[name] for name in Stranger.model_fields})


def register(api: APIBlueprint, deps: Deps) -> None:
    """Put the route into `api`."""

    @api.get("/instances", operation_id="list_instances", responses={"200": Instances})
    def list_instances() -> Response:
        """Every machine that costs money, or may; and what the last sweep saw"""
        with deps.store.transaction() as tx:
            return present.answer(standing(tx, deps.clock()))
