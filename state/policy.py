"""What to do when: deadlines, stalls, retries.

Values in, decisions out: nothing here reads a clock, a database or a market.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gpu_agent.wire import Fact
from state.job import Job, Reason, Status
from state.machine import Move

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers that an operator may turn.

    Attributes:
        deadlines: how long a job may stay in each state.
        silence: an agent unheard for so long has stalled (it reports at least every 10 s).
        retry_delays: pause before the second, third … attempt; the last one repeats.
        offer_pause: before looking for offers again when there was none.
        settle: how long a create call without an answer may take to show in the list.
        progress_pause: at most one `job.progress` webhook in this time.
        token: how long a new machine may take to say hello.
        machines: how many machines an attempt may try before the job stalls: one that fails
            before its agent said hello costs time, but nothing of the job's.
        hedge_least, hedge_factor: a second machine is rented when a boot takes longer than this,
            and longer than so many times what is expected of the first.
        interruptions: after so many a job rents on demand only.
    """

    deadlines: Mapping[Status, timedelta] = field(
        default_factory=lambda: {
            Status.PENDING: timedelta(hours=24),
            Status.PENDING_GPU: timedelta(minutes=20),
            Status.PENDING_IMAGES: timedelta(minutes=30),
            Status.PENDING_MODEL: timedelta(minutes=60),
            Status.TRAINING: timedelta(hours=12),
        }
    )
    silence: timedelta = timedelta(seconds=45)
    retry_delays: tuple[timedelta, ...] = (timedelta(seconds=5), timedelta(minutes=1))
    offer_pause: timedelta = timedelta(seconds=15)
    settle: timedelta = timedelta(seconds=60)
    lease: timedelta = timedelta(hours=12)
    progress_pause: timedelta = timedelta(seconds=5)
    host_penalty: timedelta = timedelta(hours=24)
    token: timedelta = timedelta(minutes=30)
    machines: int = 4
    hedge_least: timedelta = timedelta(seconds=60)
    hedge_factor: float = 1.5
    interruptions: int = 2


DEFAULT = Policy()
#: Processes give a sign of life at least so often; a longer gap is a break.
LIFE_GAP = timedelta(seconds=20)
#: `since` for those who know of no time at which nobody listened.
ALWAYS = datetime.min.replace(tzinfo=UTC)


# --- the next step of a job -------------------------------------------------------------------


class Step(enum.Enum):
    """What a job that is due needs now."""

    WAIT = "wait"
    ALLOCATE = "allocate"
    VERIFY = "verify"
    STALL = "stall"
    RETRY = "retry"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`at` is when to look again; `reason` comes with `STALL`."""

    step: Step
    at: datetime | None = None
    reason: Reason | None = None


def decide(
    job: Job, now: datetime, policy: Policy = DEFAULT, *, since: datetime = ALWAYS
) -> Decision:
    """The one step that `job` needs at `now`.

    `since` is how long agents could be heard without a break: an agent that spoke to a server
    that was down has not been silent.
    """
    if job.terminal:
        return Decision(step=Step.WAIT)
    if job.status is Status.STALLED:
        if job.retry_at is not None and now >= job.retry_at:
            return Decision(step=Step.RETRY)
        return Decision(step=Step.WAIT, at=job.retry_at)
    if job.deadline_at is not None and now >= job.deadline_at:
        return Decision(step=Step.STALL, reason=_overdue(job, policy))
    silent_at = silent_from(job, policy, since)
    if silent_at is not None and now >= silent_at:
        message = f"the agent was not heard for {_words(policy.silence)}"
        return Decision(step=Step.STALL, reason=Reason(code="agent.silent", message=message))
    if job.status is Status.PENDING_GPU and job.last_heard_at is None:
        return Decision(step=Step.ALLOCATE)
    if to_verify(job):
        return Decision(step=Step.VERIFY)
    return Decision(step=Step.WAIT, at=next_look(job, policy, since))


def to_verify(job: Job) -> bool:
    """Whether uploaded weights wait for the server to read them back."""
    return (
        job.status is Status.TRAINING
        and Fact.WEIGHTS_UPLOADED in job.known
        and Move.WEIGHTS_VERIFIED not in job.known
    )


def silent_from(job: Job, policy: Policy = DEFAULT, since: datetime = ALWAYS) -> datetime | None:
    """When the agent counts as silent; never while the server itself verifies its upload."""
    if not job.active or job.last_heard_at is None or to_verify(job):
        return None
    return max(job.last_heard_at, since) + policy.silence


def listening_since(heard: tuple[datetime, Mapping[str, Any]] | None, now: datetime) -> datetime:
    """Since when reports could come in without a break, by the receivers' latest sign of life.

    Without a fresh one nobody listens, and silence means nothing: the answer is `now`.
    """
    if heard is None or now - heard[0] > LIFE_GAP:
        return now
    return datetime.fromisoformat(heard[1]["since"])


def sign_of_life(
    heard: tuple[datetime, Mapping[str, Any]] | None, now: datetime
) -> Mapping[str, Any]:
    """What a process that lives at `now` writes beside the time: since when, without a break."""
    return {"since": min(now, listening_since(heard, now)).isoformat()}


def next_look(job: Job, policy: Policy = DEFAULT, since: datetime = ALWAYS) -> datetime | None:
    """When somebody must look at `job` again if nothing is heard of it."""
    if job.terminal:
        return None
    if job.status is Status.STALLED:
        return job.retry_at
    silent_at = silent_from(job, policy, since)
    times = [at for at in (job.deadline_at, silent_at) if at is not None]
    return min(times, default=None)


def _overdue(job: Job, policy: Policy) -> Reason:
    allowed = _words(policy.deadlines[job.status])
    explained = job.progress.get("gpu_search")
    why = f": {explained}" if job.status is Status.PENDING_GPU and explained else ""
    return Reason(
        code=f"{job.status}.timeout",
        message=f"still {job.status} after {allowed}{why}",
        # A dataset that never came cannot be helped by another machine.
        retryable=job.status is not Status.PENDING,
    )


def _words(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"


def retry_at(job: Job, reason: Reason, now: datetime, policy: Policy = DEFAULT) -> datetime | None:
    """When the next attempt comes after `reason`; None when there will be none."""
    tries = job.attempt - job.interruptions
    if not reason.retryable or not job.dataset_ready or tries >= job.request.max_attempts:
        return None
    delays = policy.retry_delays
    return now + delays[min(job.attempt, len(delays)) - 1]
