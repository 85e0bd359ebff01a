"""Why a job stands where it stands: what it waits for, who does what next, and when.

Values in, words out. What decides is elsewhere (`policy`, `renting`, `boot`, `brakes`): this only
asks the same functions, so that it cannot say anything else than what will happen.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from state import alarms, boot, brakes, money, policy, progress, renting
from state.brakes import Book
from state.events import Dataset, DatasetStatus, Event
from state.job import Job, Status
from state.lease import Lease, LeaseStatus
from state.money import Limits
from state.policy import ALWAYS, Policy, Step


class Waits(enum.StrEnum):
    """What a job waits for."""

    #: Its dataset's uploads, or the caller's word that they are all there.
    IMAGES = "images"
    #: The dataset is being checked and zipped.
    DATASET = "dataset"
    #: A brake that holds all renting, or a limit that this rental would break.
    BRAKE = "brake"
    #: An offer that fits, or the market's answer.
    OFFER = "offer"
    #: The rented machine's boot, until its agent is heard.
    BOOT = "boot"
    #: The agent's preparations and the GPU's first answer.
    AGENT = "agent"
    #: The machine's download and unpacking of the dataset.
    DATASET_DOWNLOAD = "dataset_download"
    #: The machine's download of the base model.
    MODEL_DOWNLOAD = "model_download"
    TRAINING = "training"
    #: The machine's upload of the result.
    UPLOAD = "upload"
    #: The server reads the uploaded weights back.
    VERIFICATION = "verification"
    #: The pause before the next attempt.
    RETRY = "retry"
    #: It is over; its machine may still be on its way out.
    NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Something that is heard regularly. `at` is when it last was; None is never. `well` is
    whether that is recent enough."""

    name: str
    words: str
    at: datetime | None
    well: bool


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """Unless something happens before, at `at` comes what `words` say."""

    name: str
    words: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Action:
    """What happens next by itself: who does it, and when at the latest (None: nobody knows)."""

    words: str
    by: str
    at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Brake:
    """What holds renting. `mend` is for operators."""

    code: str
    message: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that the job holds, in words."""

    machine_id: str
    gpu: str
    status: LeaseStatus
    words: str
    since: datetime
    #: What the market last said of it.
    market: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """What the caller can do now."""

    name: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the last look at the market came to. `refused` are offers by the reason against them;
    `choice` says why the present machine was taken."""

    words: str = ""
    choice: str = ""
    at: datetime | None = None
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Around:
    """What there is beside the job and its leases. `since` is how long agents could be heard
    without a break; `latest` are the job's last events, oldest first."""

    book: Book
    limits: Limits = money.NO_LIMITS
    kill_switch: bool = False
    since: datetime = ALWAYS
    dataset: Dataset | None = None
    latest: Sequence[Event] = ()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    at: datetime
    status: Status
    attempt: int
    #: So many there are at most, but for those that interruptions cost.
    attempts: int
    waits_for: Waits
    headline: str
    next: Action | None
    signals: tuple[Signal, ...]
    #: The next one first.
    deadlines: tuple[Deadline, ...]
    search: Search
    brakes: tuple[Brake, ...]
    machines: tuple[Machine, ...]
    options: tuple[Option, ...]

    @property
    def sentences(self) -> list[str]:
        """All of it for people, the most important first."""
        return list(_sentences(self))


def explain(
    job: Job,
    leases: Sequence[Lease],
    around: Around,
    now: datetime,
    rules: Policy = policy.DEFAULT,
) -> Explanation:
    rules = policy.for_job(job, rules)
    held = [lease for lease in leases if lease.open]
    mine = [lease for lease in held if lease.attempt == job.attempt and not _going(lease)]
    found = _brakes(job, mine, around, now)
    waits = _waits(job, mine, around, found)
    deadlines = sorted(_deadlines(job, mine, around, rules), key=lambda item: item.at)
    return Explanation(
        at=now,
        status=job.status,
        attempt=job.attempt,
        attempts=job.request.max_attempts + job.interruptions,
        waits_for=waits,
        headline=_headline(job, mine, around, waits, found, now),
        next=_next(job, held, around, waits, deadlines, now, rules),
        signals=tuple(_signals(job, around, now, rules)),
        deadlines=tuple(deadlines),
        search=_search(job),
        brakes=tuple(found),
        machines=tuple(_machine(job, lease, now) for lease in held),
        options=tuple(_options(job, waits)),
    )


def _going(lease: Lease) -> bool:
    return lease.status is LeaseStatus.RELEASING


# --- what it waits for ------------------------------------------------------------------------


def _waits(job: Job, mine: Sequence[Lease], around: Around, found: Sequence[Brake]) -> Waits:
    match job.status:
        case Status.PENDING:
            built = around.dataset is not None and around.dataset.status is not DatasetStatus.OPEN
            return Waits.DATASET if built else Waits.IMAGES
        case Status.PENDING_GPU if job.last_heard_at is not None:
            return Waits.AGENT
        case Status.PENDING_GPU if mine:
            return Waits.BOOT
        case Status.PENDING_GPU:
            return Waits.BRAKE if found else Waits.OFFER
        case Status.PENDING_IMAGES:
            return Waits.DATASET_DOWNLOAD
        case Status.PENDING_MODEL:
            return Waits.MODEL_DOWNLOAD
        case Status.TRAINING if policy.to_verify(job):
            return Waits.VERIFICATION
        case Status.TRAINING:
            return Waits.UPLOAD if progress.uploading(job) else Waits.TRAINING
        case Status.STALLED:
            return Waits.RETRY
        case _:
            return Waits.NOTHING


def _headline(
    job: Job,
    mine: Sequence[Lease],
    around: Around,
    waits: Waits,
    found: Sequence[Brake],
    now: datetime,
) -> str:
    _, where = progress.place(job)
    match waits:
        case Waits.IMAGES:
            return "Its photographs are not all there: the dataset is still open for uploads."
        case Waits.DATASET:
            return "Its photographs are being checked and packed."
        case Waits.BRAKE:
            return f"Renting is held: {found[0].message}."
        case Waits.OFFER:
            said = job.progress.get("gpu_search")
            return f"No GPU yet: {said}." if said else "A GPU is about to be looked for."
        case Waits.BOOT:
            return _booting(mine[-1], now)
        case Waits.AGENT:
            return "The machine is up, and its agent is getting ready."
        case Waits.DATASET_DOWNLOAD:
            return f"The machine fetches the photographs: {where}{_rate(job, 'images')}."
        case Waits.MODEL_DOWNLOAD:
            return f"The machine fetches the base model: {where}{_rate(job, 'model')}."
        case Waits.TRAINING:
            return f"It trains: {where}{_pace(job)}{_doing(around.latest)}."
        case Waits.UPLOAD:
            return "The training is done; the machine uploads the result."
        case Waits.VERIFICATION:
            return "The result is uploaded; the server reads it back before it counts."
        case Waits.RETRY:
            return _stalled(job)
        case Waits.NOTHING:
            return _ended(job)


def _booting(lease: Lease, now: datetime) -> str:
    if lease.status is LeaseStatus.INTENDED:
        return f"A {lease.gpu_name} is being rented."
    if lease.status is LeaseStatus.UNKNOWN:
        return "The market gave no clear answer to the order; its list will tell what came of it."
    took = policy.words(now - (lease.rented_at or lease.created_at))
    usual = f", where {lease.boot_s:.0f} s were expected" if lease.boot_s else ""
    said = f"; the market says: {lease.note}" if lease.note else ""
    return f"The {lease.gpu_name} on machine {lease.machine_id} boots for {took}{usual}{said}."


def _rate(job: Job, key: str) -> str:
    rate = progress.number(job.progress.get(key, {}).get("mbps"))
    return f" at {rate:.0f} Mbit/s" if rate else ""


def _pace(job: Job) -> str:
    said = job.progress.get("training", {})
    speed, left = progress.steps_per_s(job), progress.number(said.get("eta_s"))
    words = f" at {speed:.2g} steps/s" if speed else ""
    return words + (f", {policy.words(timedelta(seconds=left))} to go" if left else "")


def _doing(latest: Sequence[Event]) -> str:
    """What the last heartbeat says that the trainer does between its steps."""
    if not latest or latest[-1].type != "heartbeat":
        return ""
    doing = latest[-1].data.get("doing")
    return f" ({doing[:40]})" if isinstance(doing, str) and doing.isprintable() else ""


def _stalled(job: Job) -> str:
    where = f"in {job.stalled_from} " if job.stalled_from else ""
    why = f"{job.reason.code}: {job.reason.message}" if job.reason else "no reason is known"
    return f"It stalled {where}at attempt {job.attempt} ({why})."


def _ended(job: Job) -> str:
    match job.status:
        case Status.COMPLETED:
            return "It is completed; its weights can be downloaded."
        case Status.CANCELLED:
            return "It was cancelled."
        case _:
            why = f": {job.reason.code}: {job.reason.message}" if job.reason else ""
            return f"It failed at attempt {job.attempt} of {job.request.max_attempts}{why}."


# --- who does what next -----------------------------------------------------------------------


def _next(
    job: Job,
    held: Sequence[Lease],
    around: Around,
    waits: Waits,
    deadlines: Sequence[Deadline],
    now: datetime,
    rules: Policy,
) -> Action | None:
    if job.terminal:
        return Action(words="its machine is destroyed", by="worker", at=now) if held else None
    step = policy.decide(job, now, rules, since=around.since).step
    if step is Step.STALL:
        return Action(words="the job is stalled", by="reconcile", at=now)
    match waits:
        case Waits.IMAGES:
            return Action(words="the dataset is sealed", by="caller")
        case Waits.DATASET:
            return Action(words="the dataset's zip is built", by="worker")
        case Waits.BRAKE | Waits.OFFER:
            return Action(words="the market is searched again", by="worker", at=job.due_at or now)
        case Waits.RETRY if job.retry_at is not None:
            words = f"attempt {job.attempt + 1} begins, on another machine"
            return Action(words=words, by="reconcile", at=max(job.retry_at, now))
        case Waits.VERIFICATION:
            return Action(words="the weights are read back", by="worker", at=job.due_at or now)
        case _ if deadlines and deadlines[0].name == "hedge":
            words = "a second machine is rented, unless the first is heard before"
            return Action(words=words, by="worker", at=max(deadlines[0].at, now))
        case _ if job.orders:
            words = f"the agent gets its order ({', '.join(job.orders)}) with its next report"
            return Action(words=words, by="agent")
        case _:
            return Action(words="the machine reports", by="agent")


def _deadlines(
    job: Job, mine: Sequence[Lease], around: Around, rules: Policy
) -> Iterator[Deadline]:
    if job.terminal:
        return
    if job.status is Status.STALLED:
        if job.retry_at is not None:
            words = f"attempt {job.attempt + 1} begins"
            yield Deadline(name="retry", words=words, at=job.retry_at)
        return
    then = "the job fails" if policy.last_try(job) else "this attempt ends, and another follows"
    if job.status is Status.PENDING:
        then = "the job fails"
    if job.deadline_at is not None:
        words = f"it must have left {job.status}, else {then}"
        yield Deadline(name="state", words=words, at=job.deadline_at)
    silent = policy.silent_from(job, rules, around.since)
    if silent is not None:
        yield Deadline(name="silence", words=f"the agent must be heard, else {then}", at=silent)
    frozen = policy.frozen_from(job, rules, around.since)
    if frozen is not None:
        what, _ = progress.place(job)
        yield Deadline(name="frozen", words=f"the next {what} must come, else {then}", at=frozen)
    yield from _of_machines(job, mine, around, rules)


def _of_machines(
    job: Job, mine: Sequence[Lease], around: Around, rules: Policy
) -> Iterator[Deadline]:
    booting = job.status is Status.PENDING_GPU and job.last_heard_at is None
    for lease in mine:
        hedge = renting.hedged_from(job, lease, rules) if booting and len(mine) == 1 else None
        if hedge is not None:
            yield Deadline(name="hedge", words="a second machine is rented beside it", at=hedge)
        stuck = boot.stuck_from(lease, rules, around.since) if booting else None
        if stuck is not None:
            words = f"machine {lease.machine_id} must get on with its boot, else it is given up"
            yield Deadline(name="boot", words=words, at=stuck)
        ends = f"the lease of machine {lease.machine_id} ends: the job's cap, or the longest lease"
        yield Deadline(name="lease", words=ends, at=lease.expires_at)


# --- what was heard ---------------------------------------------------------------------------


def _signals(job: Job, around: Around, now: datetime, rules: Policy) -> Iterator[Signal]:
    def beat(name: str, key: str, words: str, limit: timedelta) -> Signal:
        at = around.book.beats[key][0] if key in around.book.beats else None
        return Signal(name=name, words=words, at=at, well=at is not None and now - at <= limit)

    if job.active and job.last_heard_at is not None:
        silent = policy.silent_from(job, rules, around.since)
        heard = silent is None or now < silent
        yield Signal(name="agent", words="the agent was heard", at=job.last_heard_at, well=heard)
        limit = policy.frozen_after(job, rules)
        moved = job.moved_at is not None and (limit is None or now - job.moved_at < limit)
        yield Signal(name="moved", words="its work went forward", at=job.moved_at, well=moved)
    if job.terminal:
        return
    yield beat("receiver", "receiver", "reports could come in", policy.LIFE_GAP)
    if job.request.rehearsal is None:
        # A rehearsal's market has no list that anybody sweeps.
        yield beat("market", brakes.SWEEP, "the market's list was read", alarms.UNSWEPT)
    yield beat("reconcile", "reconcile", "due work was looked for", alarms.UNHEARD)
    yield beat("worker", "worker", "a worker was heard", alarms.UNHEARD)


def _search(job: Job) -> Search:
    wait: Mapping[str, Any] = job.progress.get("gpu_wait") or {}
    return Search(
        words=str(job.progress.get("gpu_search") or ""),
        choice=str(job.progress.get("gpu_choice") or ""),
        at=datetime.fromisoformat(wait["at"]) if wait.get("at") else None,
        refused=dict(wait.get("refused") or {}),
    )


def _brakes(job: Job, mine: Sequence[Lease], around: Around, now: datetime) -> list[Brake]:
    """What holds renting for this job, now or when it was last tried."""
    rents = job.status is Status.PENDING_GPU and job.last_heard_at is None and not mine
    if not (rents or job.status in (Status.PENDING, Status.STALLED)):
        return []
    reason = brakes.stopped(around.book, around.limits, now, kill_switch=around.kill_switch)
    if reason is not None:
        return [_brake(reason.code, reason.message)]
    wait: Mapping[str, Any] = job.progress.get("gpu_wait") or {}
    code = str(wait.get("code") or "")
    # Brakes that hold everybody were looked at afresh; what this rental would break was not.
    if rents and wait.get("hold") and code not in brakes.HOLD_ALL:
        return [_brake(code, str(job.progress.get("gpu_search") or code))]
    return []


def _brake(code: str, message: str) -> Brake:
    # Of a job that waits and of an account that is empty one and the same thing is said.
    alarm = "credit.gone" if code == brakes.CREDIT_GONE else code
    return Brake(code=code, message=message, mend=alarms.MENDS.get(alarm, ""))


def _machine(job: Job, lease: Lease, now: datetime) -> Machine:
    since = lease.rented_at or lease.created_at
    age = policy.words(now - since)
    if _going(lease):
        words = f"being given back: {lease.why}"
    elif lease.id == job.lease:
        words = f"has the job; rented for {age} at {money.dollars(lease.price)}/h"
    elif lease.status is LeaseStatus.RENTED:
        beside = ", beside one that was slow" if lease.hedge else ""
        words = f"boots for {age} at {money.dollars(lease.price)}/h{beside}"
    else:
        words = lease.why
    return Machine(
        machine_id=lease.machine_id,
        gpu=lease.gpu_name,
        status=lease.status,
        words=words,
        since=since,
        market=lease.note,
    )


# --- what the caller can do -------------------------------------------------------------------


def _options(job: Job, waits: Waits) -> Iterator[Option]:
    if waits is Waits.IMAGES:
        yield Option(name="seal", words="say that all photographs are there (seal the dataset)")
    if waits is Waits.OFFER:
        words = "order anew with wider needs: more GPUs, a higher price, a smaller reliability"
        yield Option(name="reorder", words=words)
    if waits is Waits.TRAINING:
        yield Option(name="checkpoint", words="have a checkpoint written now")
        yield Option(name="sample", words="have sample images made now")
    if job.status is Status.STALLED:
        yield Option(name="retry", words="begin the next attempt now")
    if not job.terminal:
        yield Option(name="cancel", words="cancel it; its machine is given back")
    elif job.status is Status.COMPLETED:
        yield Option(name="download", words="download the weights")
    else:
        code = job.reason.code if job.reason else ""
        more = ", with a higher cap" if code == money.JOB else ""
        yield Option(name="reorder", words=f"order the same again{more}")
        yield Option(name="logs", words="read its log")


# --- in words ---------------------------------------------------------------------------------


def _sentences(what: Explanation) -> Iterator[str]:
    yield what.headline
    if what.attempt > 1 and what.waits_for is not Waits.NOTHING:
        yield f"This is attempt {what.attempt} of {what.attempts}."
    for machine in what.machines:
        yield f"Machine {machine.machine_id} ({machine.gpu}) {machine.words}."
    if what.next is not None:
        when = f" {_when(what.next.at, what.at)}" if what.next.at else ""
        yield f"Next: {what.next.words}{when} ({what.next.by})."
    told = what.next.at if what.next else None
    for deadline in [item for item in what.deadlines if item.at != told][:3]:
        yield f"{_when(deadline.at, what.at).capitalize()}: {deadline.words}."
    for brake in what.brakes:
        if brake.mend:
            yield f"{brake.code}: {brake.mend}."
    if what.search.refused:
        counted = sorted(what.search.refused.items(), key=lambda item: (-item[1], item[0]))
        words = ", ".join(f"{number} {reason}" for reason, number in counted)
        yield f"Offers refused at the last look: {words}."
    for signal in what.signals:
        if not signal.well:
            if signal.at is None:
                yield f"Not well: it never happened yet that {signal.words}."
            else:
                yield f"Not well: {signal.words} {policy.words(what.at - signal.at)} ago."
    if what.options:
        yield "You can: " + "; ".join(option.words for option in what.options) + "."


def _when(at: datetime, now: datetime) -> str:
    if at <= now:
        return "now"
    return f"in {policy.words(at - now)}"
