"""What to do when: deadlines, stalls, retries.

Values in, decisions out: nothing here reads a clock, a database or a market.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from gpu_agent.wire import Fact
from state import progress
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
        hedge_least: a second machine is rented when a boot takes longer than this, and longer than
            what is expected of the first.
        interruptions: after so many a job rents on demand only.
        frozen: an agent that is heard but gets nothing done for so long has stalled, by state.
        slow_steps: a training is frozen only after so many times the length of one of its steps.
        slip_factor, slip_grace: a training whose end comes to lie later than so many times the
            shortest length that it was ever believed to have, and a grace, will not end well.
        boot_stuck: a boot of which the market says the same for so long is stuck.
        boot_retrying: the same for a download of the image that is tried again and again.
        last_resort: a job that found nothing for so long takes machines that failed others.
        lost: how long a host may be out of the market's sight before its agent was heard.
        pace: for how fast a time these numbers are; see `for_job`.
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
    hedge_least: timedelta = timedelta(seconds=45)
    interruptions: int = 2
    frozen: Mapping[Status, timedelta] = field(
        default_factory=lambda: {
            # Once the agent is there: drivers may take long to wake.
            Status.PENDING_GPU: timedelta(minutes=3),
            Status.PENDING_IMAGES: timedelta(seconds=50),
            Status.PENDING_MODEL: timedelta(seconds=50),
            Status.TRAINING: timedelta(seconds=50),
        }
    )
    slow_steps: float = 10.0
    slip_factor: float = 2.0
    slip_grace: timedelta = timedelta(minutes=10)
    boot_stuck: timedelta = timedelta(minutes=5)
    boot_retrying: timedelta = timedelta(minutes=2)
    last_resort: timedelta = timedelta(minutes=5)
    lost: timedelta = timedelta(minutes=2)
    pace: float = 1.0


DEFAULT = Policy()
#: However fast a rehearsal's time: never less than a loaded server and its line may take.
LEAST_SILENCE, LEAST_FROZEN = timedelta(seconds=6), timedelta(seconds=8)
LEAST_STATE, LEAST_BOOT = timedelta(seconds=15), timedelta(seconds=2)
LEAST_PAUSE, LEAST_NEWS = timedelta(seconds=1), timedelta(seconds=0.5)


def for_job(job: Job, rules: Policy = DEFAULT) -> Policy:
    """The numbers that hold for `job`: in a rehearsal all that is waited for passes faster too,
    save the dataset, which people upload."""
    rehearsal = job.request.rehearsal
    if rehearsal is None or rules.pace == rehearsal.time_scale:
        return rules
    pace = rehearsal.time_scale

    def sooner(span: timedelta, least: timedelta) -> timedelta:
        return min(span, max(span / pace, least))

    return replace(
        rules,
        pace=pace,
        deadlines={
            status: span if status is Status.PENDING else sooner(span, LEAST_STATE)
            for status, span in rules.deadlines.items()
        },
        silence=sooner(rules.silence, LEAST_SILENCE),
        retry_delays=tuple(sooner(span, LEAST_PAUSE) for span in rules.retry_delays),
        offer_pause=sooner(rules.offer_pause, LEAST_PAUSE),
        progress_pause=sooner(rules.progress_pause, LEAST_NEWS),
        hedge_least=sooner(rules.hedge_least, LEAST_BOOT),
        frozen={status: sooner(span, LEAST_FROZEN) for status, span in rules.frozen.items()},
    )


#: Processes give a sign of life at least so often; a longer gap is a break.
LIFE_GAP = timedelta(seconds=20)
#: After a break agents try again at most so much later: their longest pause, and a fifth of it.
LONGEST_PAUSE = timedelta(seconds=75)
#: An agent reports at least so often, with some slack for the line.
HEARD_EVERY = timedelta(seconds=15)
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
    policy = for_job(job, policy)
    if job.status is Status.STALLED:
        if job.retry_at is not None and now >= job.retry_at:
            return Decision(step=Step.RETRY)
        return Decision(step=Step.WAIT, at=job.retry_at)
    if job.deadline_at is not None and now >= job.deadline_at:
        return Decision(step=Step.STALL, reason=_overdue(job, policy))
    silent_at = silent_from(job, policy, since)
    if silent_at is not None and now >= silent_at:
        return Decision(step=Step.STALL, reason=_silent(job, now))
    frozen_at = frozen_from(job, policy, since)
    if frozen_at is not None and now >= frozen_at:
        return Decision(step=Step.STALL, reason=_frozen(job, now))
    if slowing(job, policy):
        return Decision(step=Step.STALL, reason=_slowing(job))
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
    policy = for_job(job, policy)
    if since <= job.last_heard_at:
        return job.last_heard_at + policy.silence
    # Whoever met a closed door comes back later the longer it was closed.
    return since + policy.silence + min(2 * (since - job.last_heard_at), LONGEST_PAUSE)


def frozen_from(job: Job, policy: Policy = DEFAULT, since: datetime = ALWAYS) -> datetime | None:
    """When the job counts as frozen; None while its agent is not heard either (its silence
    decides then: it may only be the line that is cut), or while nothing is expected of it."""
    limit = frozen_after(job, policy)
    if limit is None or job.last_heard_at is None or job.moved_at is None or to_verify(job):
        return None
    at = max(job.moved_at, since) + limit
    return at if job.last_heard_at >= at - HEARD_EVERY else None


def frozen_after(job: Job, policy: Policy = DEFAULT) -> timedelta | None:
    """How long the job may stand still in its present state; None for as long as it likes."""
    limit = for_job(job, policy).frozen.get(job.status)
    step_s = progress.step_s(job)
    if limit is None or job.status is not Status.TRAINING or step_s is None:
        return limit
    if progress.uploading(job):
        return limit
    # A host that names an absurd step still meets the state's own deadline.
    return max(limit, timedelta(seconds=min(policy.slow_steps * step_s, 86_400.0)))


def slowing(job: Job, policy: Policy = DEFAULT) -> bool:
    """Whether the end of a training has moved too far away. On the last try slow is better than
    failed."""
    outlook = job.progress.get("outlook")
    if job.status is not Status.TRAINING or not outlook or progress.uploading(job):
        return False
    began = job.entered_at.timestamp()
    latest = began + policy.slip_factor * (outlook["best"] - began)
    return not last_try(job) and outlook["finish"] > latest + policy.slip_grace.total_seconds()


def last_try(job: Job) -> bool:
    """Whether a stall would be the end; what higher bids ended does not count as a try."""
    return job.attempt - job.interruptions >= job.request.max_attempts


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
    overdue = (silent_from(job, policy, since), frozen_from(job, policy, since))
    times = [at for at in (job.deadline_at, *overdue) if at is not None]
    return min(times, default=None)


def _overdue(job: Job, policy: Policy) -> Reason:
    allowed = words(policy.deadlines[job.status])
    explained = job.progress.get("gpu_search")
    why = f": {explained}" if job.status is Status.PENDING_GPU and explained else ""
    return Reason(
        code=f"{job.status}.timeout",
        message=f"still {job.status} after {allowed}{why}",
        # A dataset that never came cannot be helped by another machine.
        retryable=job.status is not Status.PENDING,
    )


def _silent(job: Job, now: datetime) -> Reason:
    unheard = words(now - (job.last_heard_at or now))
    _, where = progress.place(job)
    return Reason(code="agent.silent", message=f"the agent was not heard for {unheard}, at {where}")


def _frozen(job: Job, now: datetime) -> Reason:
    what, where = progress.place(job)
    stood = words(now - (job.moved_at or now))
    return Reason(code=f"{job.status}.frozen", message=f"no {what} for {stood} at {where}")


def _slowing(job: Job) -> Reason:
    outlook, began = job.progress["outlook"], job.entered_at.timestamp()
    _, where = progress.place(job)
    lasts, believed = (timedelta(seconds=outlook[key] - began) for key in ("finish", "best"))
    message = f"at {where} training looks like {words(lasts)}, once like {words(believed)}"
    return Reason(code="training.slowing", message=message)


def words(span: timedelta) -> str:
    """A time for people."""
    seconds = int(span.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"


def retry_at(job: Job, reason: Reason, now: datetime, policy: Policy = DEFAULT) -> datetime | None:
    """When the next attempt comes after `reason`; None when there will be none."""
    if not reason.retryable or not job.dataset_ready or last_try(job):
        return None
    delays = for_job(job, policy).retry_delays
    return now + delays[min(job.attempt, len(delays)) - 1]
