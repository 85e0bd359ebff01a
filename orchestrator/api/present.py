"""Values of `state` as the public interface shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from flask import Response

from orchestrator.api import schemas
from state import money
from state.events import Artefact, Attempt, Dataset, Delivery, Event, Outgoing
from state.job import Job, Status
from state.lease import Lease

#: What of a job's progress is kept for our own decisions.
INTERNAL = ("relayed", "outlook", "gpu_wait", "quoted")


#: Under which kind of report a machine says how far its downloads are, by status.
PULLED = {Status.PENDING_IMAGES: "images", Status.PENDING_MODEL: "model"}


def dataset(value: Dataset) -> dict[str, Any]:
    built = value.zip_bytes > 0
    return {
        "id": value.id,
        "status": value.status,
        "created_at": value.created_at,
        "files": [
            schemas.FileOut(name=item["name"], bytes=item["bytes"], sha256=item["sha256"])
            for item in value.files
        ],
        "report": dict(value.report),
        "zip": schemas.FileOut(name="dataset.zip", bytes=value.zip_bytes, sha256=value.zip_sha256)
        if built
        else None,
    }


def _progress(job: Job) -> dict[str, Any]:
    """How far it is, in a few numbers; and the latest of each kind of report."""
    said = {key: item for key, item in job.progress.items() if key not in INTERNAL}
    training, pulled = said.get("training", {}), said.get(PULLED.get(job.status, ""), {})
    now = {key: training.get(key) for key in ("step", "total", "loss", "eta_s")}
    now |= {key: pulled.get(key) for key in ("bytes", "bytes_total")}
    known = {key: number for key, item in now.items() if (number := _number(item)) is not None}
    return {**said, **known}


def _number(value: object) -> int | float | None:
    """Hosts may say anything."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cost(job: Job, leases: Sequence[Lease], now: datetime) -> schemas.Cost:
    machines = [_machine(lease, now) for lease in leases if lease.rented_at]
    so_far = sum(machine.counts for machine in machines)
    opened = [lease for lease in leases if lease.open]
    return schemas.Cost(
        quoted=quoted(job),
        quoted_display=money.dollars(expected) if (expected := quoted(job)) is not None else None,
        quoted_per_hour=opened[-1].price if opened else None,
        so_far=so_far,
        cap=job.request.max_cost,
        display=f"${so_far / 1_000_000:.4f}",
        cap_display=money.dollars(job.request.max_cost),
        machines=machines,
    )


def _machine(lease: Lease, now: datetime) -> schemas.LeaseCost:
    count, counts = money.cost(lease, now), money.spent(lease, now)
    return schemas.LeaseCost(
        attempt=lease.attempt,
        machine_id=lease.machine_id,
        gpu=count.gpu,
        disk=count.disk,
        bandwidth=count.bandwidth,
        billed=lease.billed,
        counts=counts,
        by="market" if lease.billed is not None and counts == lease.billed else "count",
    )


def _host(job: Job, leases: Sequence[Lease]) -> schemas.Host | None:
    mine = [lease for lease in leases if lease.attempt == job.attempt and lease.machine_id]
    if not mine:
        return None
    last = mine[-1]
    return schemas.Host(machine_id=last.machine_id, gpu=last.gpu_name, geo=last.geo)


def _rehearsal(job: Job) -> schemas.Rehearsal | None:
    part = job.request.rehearsal
    return schemas.Rehearsal(**asdict(part)) if part else None


def job_summary(job: Job, leases: Sequence[Lease], now: datetime) -> dict[str, Any]:
    return {
        "id": job.id,
        "livemode": job.request.rehearsal is None,
        "test": _rehearsal(job),
        "status": job.status,
        "stalled_from": job.stalled_from,
        "reason": schemas.Reason(**job.reason.to_dict()) if job.reason else None,
        "retry_at": job.retry_at,
        "attempt": job.attempt,
        "dataset_id": job.request.dataset_id,
        "base": job.request.base,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "entered_at": job.entered_at,
        "deadline_at": job.deadline_at,
        "moved_at": job.moved_at,
        "progress": _progress(job),
        "host": _host(job, leases),
        "cost": _cost(job, leases, now),
        "metadata": dict(job.request.metadata),
    }


def job(
    value: Job,
    leases: Sequence[Lease],
    transitions: Iterable[Event],
    artefacts: Iterable[Artefact],
    now: datetime,
) -> dict[str, Any]:
    request = value.request
    return {
        **job_summary(value, leases, now),
        "method": request.method,
        "base_family": request.base_family,
        "recipe": dict(request.recipe),
        "gpu": {**asdict(request.gpu), "gpu_names": list(request.gpu.gpu_names)},
        "max_attempts": request.max_attempts,
        "interruptible": request.interruptible,
        "interruptions": value.interruptions,
        "hedge": request.hedge,
        "webhook_url": request.webhook_url,
        "transitions": [transition(item) for item in transitions],
        "result_files": [artefact(item) for item in artefacts],
    }


def transition(event: Event) -> schemas.Transition:
    data = event.data
    return schemas.Transition(
        seq=event.seq,
        at=event.at,
        attempt=event.attempt,
        source=data["from"],
        target=data["to"],
        cause=data["cause"],
        reason=data.get("reason"),
    )


def artefact(value: Artefact) -> schemas.ResultFile:
    return schemas.ResultFile(
        name=value.name,
        bytes=value.bytes,
        sha256=value.sha256,
        attempt=value.attempt,
        verified=value.verified,
        expired=value.expired,
        created_at=value.created_at,
        url=f"/v1/jobs/{value.job}/artifacts/{value.name}",
    )


def event(value: Event) -> schemas.Event:
    return schemas.Event(
        seq=value.seq,
        type=value.type,
        attempt=value.attempt,
        at=value.at,
        data=dict(value.data),
    )


def attempt(value: Attempt, leases: Iterable[Lease], now: datetime) -> schemas.Attempt:
    return schemas.Attempt(
        number=value.number,
        created_at=value.created_at,
        hello_at=value.hello_at,
        leases=[_lease(item, now) for item in leases if item.attempt == value.number],
    )


def _lease(value: Lease, now: datetime) -> schemas.Lease:
    return schemas.Lease(
        status=value.status,
        machine_id=value.machine_id,
        gpu=value.gpu_name,
        geo=value.geo,
        price_per_hour=value.price,
        created_at=value.created_at,
        rented_at=value.rented_at,
        ready_at=value.ready_at,
        released_at=value.released_at,
        expires_at=value.expires_at,
        cost=money.spent(value, now),
        why=value.why,
    )


def delivery(value: Outgoing, tries: Iterable[Delivery]) -> schemas.Delivery:
    return schemas.Delivery(
        id=value.id,
        job=None if value.job == value.endpoint else value.job,
        endpoint=value.endpoint or None,
        seq=value.seq,
        type=value.type,
        status=value.status,
        created_at=value.created_at,
        due_at=value.due_at,
        ended_at=value.ended_at,
        tries=[
            schemas.Try(
                tried_at=item.tried_at,
                answer=item.answer,
                took_ms=item.took_ms,
                error=item.error,
            )
            for item in tries
            if item.outgoing == value.id
        ],
    )


def redirect(url: str) -> Response:
    """To a signed URL, which goes out as it is, and is kept by nobody."""
    response = Response(status=302, headers={"Location": url, "Cache-Control": "no-store"})
    response.autocorrect_location_header = False
    return response


def quoted(job: Job) -> int | None:
    """Micro-USD that the whole job was expected to cost when its machine was rented."""
    found = job.progress.get("quoted")
    return found if type(found) is int else None


def answer(
    value: schemas.Out, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`value` as the JSON body of an answer."""
    response = Response(value.model_dump_json(), status=status, mimetype="application/json")
    response.headers.update(headers or {})
    return response
