"""What must hold when chaos is over, as functions of what was written down. Each gives the faults
that it found, in words; none is what is wanted. The numbers are the invariants' of docs/chaos.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gpu_agent.wire import Report
from state.events import Event, Outgoing
from state.job import Job, Status
from state.lease import Lease
from state.machine import ADVANCE, TABLE, Move


@dataclass(frozen=True, kw_only=True)
class Rental:
    """One instance, as the market's own ledger has it."""

    id: str
    label: str
    began: datetime
    ended: datetime

    @property
    def job(self) -> str:
        """`<deployment>/<job>/<attempt>-<nonce>` names it."""
        return self.label.split("/")[1]


def lost_reports(acknowledged: Iterable[Report], events: Iterable[Event]) -> list[str]:
    """I8: a report that was answered with 2xx is in the history exactly once, as it was sent."""
    kept: dict[str, list[Event]] = {}
    for event in events:
        if event.webhook_id is not None:
            kept.setdefault(event.webhook_id, []).append(event)
    faults = []
    for report in acknowledged:
        found = kept.get(report.webhook_id, [])
        said = (report.job, report.attempt, report.seq, str(report.type), dict(report.data))
        if len(found) != 1:
            faults.append(f"{report.webhook_id} ({report.type}) is there {len(found)} times")
        elif said != _told(found[0]):
            faults.append(f"{report.webhook_id} was not kept as it was sent")
    return faults


def _told(event: Event) -> tuple[str, int, int | None, str, dict[str, Any]]:
    return event.job, event.attempt, event.agent_seq, event.type, dict(event.data)


def illegal_steps(job: Job, events: Sequence[Event]) -> list[str]:
    """I10: the history counts without gaps, and its transitions are a path of the table that
    ends where the job is."""
    faults = []
    if [event.seq for event in events] != list(range(1, job.seq + 1)):
        faults.append(f"{job.id}: its events do not count from 1 to {job.seq}")
    status = Status.PENDING
    for event in events:
        if event.type != "transition":
            continue
        source, target, cause = (event.data[key] for key in ("from", "to", "cause"))
        if source != status:
            faults.append(f"{job.id}: {source} → {target}, but it was {status}")
        if not any(
            (row.source, row.target) == (source, target)
            and (row.trigger == cause or (row.trigger == ADVANCE and cause not in _BY_NAME))
            for row in TABLE
        ):
            faults.append(f"{job.id}: {source} → {target} by {cause} is not in the table")
        status = Status(target)
    if status is not job.status:
        faults.append(f"{job.id} is {job.status}, its history says {status}")
    return faults


#: Moves that are a trigger of their own; whatever else causes a step only advances.
_BY_NAME = frozenset({Move.STALL, Move.RETRY, Move.FAIL, Move.CANCEL})


def unheard_webhooks(
    job: Job, owed: Sequence[Outgoing], heard: Sequence[Mapping[str, Any]]
) -> list[str]:
    """I12: whatever the job owes its customer was heard, once each, in order of `seq`."""
    faults = []
    if [row.seq for row in owed] != list(range(1, job.owed + 1)):
        faults.append(f"{job.id}: its outbox does not count from 1 to {job.owed}")
    if [dict(row.payload) for row in owed] != [dict(payload) for payload in heard]:
        seqs = [payload["data"]["seq"] for payload in heard]
        faults.append(f"{job.id} owes {len(owed)} webhooks, its customer heard {seqs}")
    return faults


def unowned_instances(rentals: Iterable[Rental], leases: Iterable[Lease]) -> list[str]:
    """I1: every instance that ever was has a lease from before it, and I5: all were closed."""
    faults = []
    by_label = {lease.label: lease for lease in leases}
    for rental in rentals:
        lease = by_label.get(rental.label)
        if lease is None:
            faults.append(f"instance {rental.id} ({rental.label}) has no lease")
        elif lease.created_at > rental.began:
            faults.append(f"instance {rental.id} is older than its lease")
    faults += [f"lease {lease.id} is {lease.status}" for lease in by_label.values() if lease.open]
    return faults


def outlived(rentals: Iterable[Rental], jobs: Mapping[str, Job]) -> dict[str, float]:
    """I2, I4: for how many seconds each instance went on after its job had ended."""
    spans = {}
    for rental in rentals:
        job = jobs.get(rental.job)
        ended = job.finished_at if job is not None else rental.began
        spans[rental.id] = (rental.ended - ended).total_seconds() if ended else float("inf")
    return spans


def crowds(rentals: Sequence[Rental]) -> Counter[str]:
    """I3: how many instances each job ever had."""
    return Counter(rental.job for rental in rentals)
