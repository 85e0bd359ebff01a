"""What we remember of a rented machine: an outcome in, a record out.

Counts fade: half of a good or bad name is gone after `HALF_LIFE` without news of its kind, so that
a machine that was mended gets its chance. What was measured is a moving mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from gpu_agent import needs
from gpu_agent.recipe import Recipe, RecipeError
from state import policy, progress
from state.events import HostRecord
from state.job import Job, JobRequest, Reason
from state.lease import Lease
from state.policy import Policy

HALF_LIFE = timedelta(days=7)
#: Its machine was not what its offer said.
LIED = "host.lied"
#: A machine that lied is left alone for so long.
LIAR_SPAN = timedelta(days=30)
#: Why a machine is shunned for a while, unless nothing else is left.
FAILED_LATELY = "failed a job lately"
#: How much the latest measurement counts in a mean.
NEWEST = 0.3


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Outcomes of a machine as they count now."""

    good: float = 0.0
    bad: float = 0.0

    @property
    def chance(self) -> float:
        """Of the next job to be finished; one good outcome is assumed beforehand."""
        return (self.good + 1) / (self.good + self.bad + 1)


def standing(host: HostRecord | None, now: datetime | None = None) -> Standing:
    if host is None:
        return Standing()
    good = host.good * _left(host.last_seen_at, now)
    return Standing(good=good, bad=host.bad * _left(host.last_failed_at, now))


def _left(since: datetime | None, now: datetime | None) -> float:
    """The share of a count that is left of what was last added to `since`."""
    if since is None or now is None:
        return 1.0
    return float(0.5 ** (max(now - since, timedelta()) / HALF_LIFE))


def shunned(host: HostRecord | None, now: datetime, rules: Policy = policy.DEFAULT) -> str | None:
    """Why no job is to rent this machine now, in words; None when one may."""
    if host is None:
        return None
    if host.blocked:
        return "blocked by an operator"
    if host.last_failed_at is None:
        return None
    ago = now - host.last_failed_at
    if host.lies and ago < LIAR_SPAN:
        return "not what it was offered as"
    name = standing(host, now)
    # One whose good name outweighs it may fail now and then.
    if name.good <= name.bad and ago < rules.host_penalty:
        return FAILED_LATELY
    return None


# --- outcomes ---------------------------------------------------------------------------------


def finished(host: HostRecord, lease: Lease, job: Job, now: datetime) -> HostRecord:
    """The machine saw a job through."""
    good = round(host.good * _left(host.last_seen_at, now)) + 1
    return dataclasses.replace(_measured(host, lease, job, now), good=good, last_seen_at=now)


def failed(host: HostRecord, lease: Lease, job: Job, reason: Reason, now: datetime) -> HostRecord:
    """A job was lost on the machine, by its fault."""
    bad = round(host.bad * _left(host.last_failed_at, now)) + 1
    return dataclasses.replace(
        _measured(host, lease, job, now),
        bad=bad,
        lies=host.lies + (reason.code == LIED),
        last_failed_at=now,
        last_reason=f"{reason.code}: {reason.message}"[:300],
    )


def outrun(host: HostRecord, lease: Lease, now: datetime) -> HostRecord:
    """Another machine was ready first: this one boots no faster than it did until now."""
    return _booting(_named(host, lease), lease, now)


def blocked(host: HostRecord, why: str) -> HostRecord:
    """An operator's word against it, until it is taken back."""
    return dataclasses.replace(host, blocked=True, blocked_why=why)


def unblocked(host: HostRecord) -> HostRecord:
    """It may be rented again at once: what it did wrong before is forgotten too."""
    return dataclasses.replace(
        host, blocked=False, blocked_why="", bad=0, lies=0, last_failed_at=None, last_reason=""
    )


def _named(host: HostRecord, lease: Lease) -> HostRecord:
    return dataclasses.replace(
        host, gpu_name=lease.gpu_name or host.gpu_name, geo=lease.geo or host.geo
    )


def _booting(host: HostRecord, lease: Lease, now: datetime) -> HostRecord:
    if lease.rented_at is None:
        return host
    if lease.ready_at is None:
        least = (now - lease.rented_at).total_seconds()
        return dataclasses.replace(host, boot_s=max(host.boot_s or 0.0, least))
    boot_s = (lease.ready_at - lease.rented_at).total_seconds()
    return dataclasses.replace(host, boot_s=_mean(host.boot_s, boot_s))


def _measured(host: HostRecord, lease: Lease, job: Job, now: datetime) -> HostRecord:
    host = _booting(_named(host, lease), lease, now)
    if job.lease != lease.id:
        return host
    speed = progress.steps_per_s(job)
    return dataclasses.replace(
        host,
        download_mbps=_mean(host.download_mbps, progress.download_mbps(job)),
        steps_per_s=_mean(host.steps_per_s, speed and speed * size_of_step(job.request)),
    )


def _mean(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return old if new is None else new
    return old + NEWEST * (new - old)


def size_of_step(request: JobRequest) -> float:
    """How many images of 512 px in SD 1.x one step is worth: by it speeds compare, whatever the
    recipe and the family."""
    try:
        recipe = Recipe.from_dict(request.recipe, request.base_family)
    except RecipeError:
        return 1.0
    images = recipe.batch_size * recipe.gradient_accumulation
    return images * (recipe.resolution / 512) ** 2 * needs.heaviness(request.base_family)


def by_urgency(hosts: Sequence[HostRecord], now: datetime) -> list[HostRecord]:
    """As an operator wants to see them: blocked and lying ones first, then by bad name, then by
    how lately they failed."""

    def key(host: HostRecord) -> tuple[bool, bool, float, float, str]:
        name = standing(host, now)
        failed_at = host.last_failed_at.timestamp() if host.last_failed_at else 0.0
        return (not host.blocked, not host.lies, -name.bad, -failed_at, host.machine_id)

    return sorted(hosts, key=key)
