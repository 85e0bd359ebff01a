"""What a job left behind, as the API says it: log, curves, checkpoints, samples, money.

The plain functions take an open transaction and a job that the caller may see; pages use them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from gpu_agent.wire import Fact
from orchestrator import agent_api
from orchestrator.api import auth, present, schemas, streams
from orchestrator.api.jobs import DOWNLOAD_SPAN_S, visible
from orchestrator.api.problems import Refusal
from orchestrator.api.schemas import MicroUsd, Out
from orchestrator.deps import Deps
from state import brakes, explain, money, policy, series
from state.errors import NotFound
from state.events import Event
from state.explain import Waits
from state.job import Job, Status
from state.lease import Lease, LeaseStatus
from state.money import dollars
from state.series import Point
from state.store import Transaction
from tasks.reconcile import RECEIVER
from tasks.verify import attempt_key

#: Of a job's reports of one kind so many are read at a time, and so many in all.
BATCH, MOST_REPORTS = 1000, 50_000
#: Longer than any line that an agent sends.
LONGEST_LINE = 2000
SAMPLES = "samples/"


def _reports(tx: Transaction, job: Job, fact: Fact, after: int = 0) -> Iterator[Event]:
    """All reports of one kind, oldest first."""
    for _ in range(MOST_REPORTS // BATCH):
        found = tx.events(job.id, after=after, limit=BATCH, type=fact.value)
        yield from found
        if len(found) < BATCH:
            return
        after = found[-1].seq


# --- log --------------------------------------------------------------------------------------


class LogLine(Out):
    seq: int = Field(description="of the event that brought it; several lines share one")
    at: datetime = Field(description="when the server got it")
    attempt: int
    text: str


class Logs(Out):
    data: list[LogLine]
    has_more: bool
    next_after: int = Field(description="`after` of the next page")


class LogsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: Annotated[int, Field(ge=0, lt=2**53, description="`next_after` of the page before")] = 0
    limit: Annotated[int, Field(ge=1, le=5000)] = Field(
        default=1000, description="lines; those of one event are never parted, so a few more come"
    )


def logs(tx: Transaction, job: Job, *, after: int = 0, limit: int = 1000) -> Logs:
    """A page of what agent and trainer wrote, oldest first."""
    lines: list[LogLine] = []
    more = False
    for report in _reports(tx, job, Fact.LOG_LINES, after):
        if len(lines) >= limit:
            more = True
            break
        lines += _lines(report)
        after = report.seq
    return Logs(data=lines, has_more=more, next_after=after)


def _lines(report: Event) -> list[LogLine]:
    said = report.data.get("lines")
    return [
        LogLine(seq=report.seq, at=report.at, attempt=report.attempt, text=line[:LONGEST_LINE])
        for line in (said if isinstance(said, list) else ())
        if isinstance(line, str)
    ]


# --- curves -----------------------------------------------------------------------------------


class MetricName(Out):
    """A curve that the job has."""

    name: str
    points: int
    step: int = Field(description="the latest")
    value: float = Field(description="the latest")


class MetricPoint(Out):
    attempt: int
    step: int
    value: float


class Series(Out):
    """A curve. Where it was thinned, each stretch keeps its lowest and its highest value, and
    every attempt its first and last."""

    name: str
    total: int = Field(description="points that there are")
    thinned: bool
    points: list[MetricPoint]


class Metrics(Out):
    names: list[MetricName]
    series: list[Series] = Field(description="those asked for by name")


class MetricsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[list[str], Field(max_length=series.MOST_CURVES)] = Field(
        default=[], description="which curves, as `names` lists them; several may be given"
    )
    max_points: Annotated[int, Field(ge=2, le=20_000)] = Field(
        default=500, description="of each curve; two for each attempt are always kept"
    )


def metrics(
    tx: Transaction, job: Job, names: Sequence[str] = (), *, max_points: int = 500
) -> Metrics:
    """The curves' names, and the points of those asked for.

    Raises: Refusal 422 for a name that neither this job nor any trainer of ours has.
    """
    curves = series.collect(_reports(tx, job, Fact.TRAINING_PROGRESS))
    for name in names:
        if name not in curves and name not in series.KNOWN:
            known = ", ".join(sorted({*curves, *series.KNOWN}))
            fault = ("?name", f"is none of {known}")
            raise Refusal(422, "unknown_metric", f"no curve {name[:40]!r}", errors=[fault])
    return Metrics(
        names=[
            MetricName(name=name, points=len(values), step=latest[1], value=float(values[latest]))
            for name, values in sorted(curves.items())
            if (latest := max(values))
        ],
        series=[
            _series(name, series.curve(curves.get(name, {})), max_points)
            for name in dict.fromkeys(names)
        ],
    )


def _series(name: str, points: Sequence[Point], most: int) -> Series:
    kept = series.thin(points, most)
    return Series(
        name=name,
        total=len(points),
        thinned=len(kept) < len(points),
        points=[
            MetricPoint(attempt=point.attempt, step=point.step, value=point.value) for point in kept
        ],
    )


# --- checkpoints and samples ------------------------------------------------------------------


class Checkpoint(Out):
    """A whole checkpoint in storage, from which a later attempt may go on."""

    seq: int
    at: datetime
    attempt: int
    step: int | None
    best: bool = Field(description="whether its weights had the lowest validation loss so far")
    bytes: int
    files: list[schemas.FileOut]
    expired: bool = Field(description="it was deleted, a week after the job's end")


class Checkpoints(Out):
    data: list[Checkpoint]


def checkpoints(tx: Transaction, job: Job) -> Checkpoints:
    """The job's uploaded checkpoints, newest first."""
    cleared = _cleared(tx, job)
    listed = [
        Checkpoint(
            seq=event.seq,
            at=event.at,
            attempt=event.attempt,
            step=_step(event),
            best=event.data.get("best") is True,
            bytes=sum(file.bytes for file in files),
            files=[
                schemas.FileOut(name=file.name, bytes=file.bytes, sha256=file.sha256)
                for file in files
            ],
            expired=event.attempt in cleared,
        )
        for event, files in agent_api.checkpoints(tx, job)
    ]
    return Checkpoints(data=listed)


class Sample(Out):
    """An image that shows what the weights of a step can do."""

    seq: int
    at: datetime
    attempt: int
    step: int | None
    prompt: str
    seed: int | None = Field(description="the same seed and prompt compare steps")
    name: str
    bytes: int
    sha256: str
    url: str = Field(description="redirects to a short-lived download")
    expired: bool


class Samples(Out):
    data: list[Sample]


class SamplePath(BaseModel):
    job_id: str
    name: str


class SampleQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    attempt: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="the latest that made it, if not said"
    )


def samples(tx: Transaction, job: Job) -> Samples:
    """The job's sample images, oldest first."""
    cleared = _cleared(tx, job)
    kept = {(item.attempt, item.name) for item in tx.artefacts(job.id) if not item.expired}
    listed = []
    for event, file in _sampled(tx, job):
        name = file["name"].removeprefix(SAMPLES)
        gone = event.attempt in cleared and (event.attempt, file["name"]) not in kept
        listed.append(
            Sample(
                seq=event.seq,
                at=event.at,
                attempt=event.attempt,
                step=_step(event),
                prompt=str(event.data.get("prompt") or "")[:LONGEST_LINE],
                seed=_whole(event.data.get("seed")),
                name=name,
                bytes=file["bytes"],
                sha256=file["sha256"],
                url=f"/v1/jobs/{job.id}/samples/{quote(name)}?attempt={event.attempt}",
                expired=gone,
            )
        )
    return Samples(data=listed)


def sample_key(tx: Transaction, job: Job, name: str, attempt: int | None = None) -> str:
    """Where a sample image lies in storage. Raises: Refusal 410 expired; NotFound."""
    full = SAMPLES + name
    made = [
        event.attempt
        for event, file in _sampled(tx, job)
        if file["name"] == full and attempt in (None, event.attempt)
    ]
    if not made:
        raise NotFound(f"job {job.id} has no sample {name[:200]!r}")
    for item in tx.artefacts(job.id):
        # the copy among the results lives longer than what an attempt uploaded
        if item.name == full and item.attempt == made[-1] and item.verified and not item.expired:
            return item.key
    if made[-1] in _cleared(tx, job):
        raise Refusal(410, "expired", f"{name} was deleted after its time of keeping")
    return attempt_key(job.id, made[-1], full)


def _sampled(tx: Transaction, job: Job) -> Iterator[tuple[Event, dict[str, Any]]]:
    """Reports of samples, each with its file; what a host says badly is left out."""
    for event in _reports(tx, job, Fact.TRAINING_SAMPLE):
        try:
            name, size, sha256 = agent_api.uploaded(event.data)
        except Refusal:
            continue
        if name.startswith(SAMPLES):
            yield event, {"name": name, "bytes": size, "sha256": sha256}


def _cleared(tx: Transaction, job: Job) -> set[int]:
    """Attempts whose uploads were deleted."""
    return {attempt.number for attempt in tx.list_attempts(job.id) if attempt.cleared}


def _step(event: Event) -> int | None:
    return _whole(event.data.get("step"))


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


# --- money ------------------------------------------------------------------------------------


class Counted(Out):
    """Our own count, by what the market bills apart."""

    gpu: MicroUsd
    disk: MicroUsd
    bandwidth: MicroUsd
    total: MicroUsd


class MachineCost(Out):
    attempt: int
    status: LeaseStatus
    machine_id: str
    gpu: str
    price_per_hour: MicroUsd = Field(description="GPU and disk, as it was offered")
    rented_at: datetime | None
    released_at: datetime | None
    counted: Counted
    billed: MicroUsd | None = Field(description="what the market charged, once it said so")
    settled: bool = Field(description="`billed` is final")
    counts: MicroUsd = Field(description="what so_far takes of it")
    at_most: MicroUsd | None = Field(description="what it may still come to; null once it is gone")
    display: str


class JobCost(Out):
    quoted: MicroUsd | None = Field(
        description="what the whole job was expected to cost when its present machine was rented"
    )
    so_far: MicroUsd
    left: MicroUsd = Field(description="of the cap")
    cap: MicroUsd
    per_hour: MicroUsd = Field(description="of all machines that it holds now")
    currency: str = "USD"
    display: dict[str, str] = Field(description="quoted, so_far, left and cap, for people")
    machines: list[MachineCost]


def cost(job: Job, leases: Sequence[Lease], now: datetime) -> JobCost:
    """The receipt, machine by machine."""
    machines = [_machine_cost(lease, now) for lease in leases if lease.rented_at]
    so_far = sum(machine.counts for machine in machines)
    quoted, cap = present.quoted(job), job.request.max_cost
    left = max(0, cap - so_far)
    figures = {"quoted": quoted, "so_far": so_far, "left": left, "cap": cap}
    return JobCost(
        quoted=quoted,
        so_far=so_far,
        left=left,
        cap=cap,
        per_hour=money.burn(leases),
        display={name: dollars(value) for name, value in figures.items() if value is not None},
        machines=machines,
    )


def _machine_cost(lease: Lease, now: datetime) -> MachineCost:
    count, counts = money.cost(lease, now), money.spent(lease, now)
    return MachineCost(
        attempt=lease.attempt,
        status=lease.status,
        machine_id=lease.machine_id,
        gpu=lease.gpu_name,
        price_per_hour=lease.price,
        rented_at=lease.rented_at,
        released_at=lease.released_at,
        counted=Counted(
            gpu=count.gpu, disk=count.disk, bandwidth=count.bandwidth, total=count.total
        ),
        billed=lease.billed,
        settled=lease.billed is not None and lease.released_at is not None and not lease.due_at,
        counts=counts,
        at_most=max(counts, money.worst(lease)) if lease.open else None,
        display=dollars(counts),
    )


# --- why it stands where it stands ------------------------------------------------------------


class Signal(Out):
    """Something that is heard regularly."""

    name: str
    words: str
    at: datetime | None = Field(description="when it last was; null for never")
    age_s: float | None
    well: bool = Field(description="recent enough")


class Deadline(Out):
    """Unless something happens before."""

    name: str
    words: str
    at: datetime
    in_s: float


class NextAction(Out):
    words: str
    by: str = Field(description="worker, reconcile, agent or caller")
    at: datetime | None = Field(description="at the latest; null where nobody knows")
    in_s: float | None


class Searched(Out):
    """What the last look at the market came to."""

    words: str
    choice: str = Field(description="why the present machine was taken, and not the next best")
    at: datetime | None
    refused: dict[str, int] = Field(description="offers, by the reason against them")


class Brake(Out):
    code: str
    message: str
    mend: str = Field(description="for operators")


class HeldMachine(Out):
    machine_id: str
    gpu: str
    status: LeaseStatus
    words: str
    since: datetime
    market: str = Field(description="what the market last said of it")


class Option(Out):
    name: str
    words: str
    method: str
    path: str


class Explanation(Out):
    """What a job waits for, who does what next and when, what was heard, what you can do."""

    job: str
    at: datetime
    status: Status
    attempt: int
    waits_for: Waits
    headline: str
    sentences: list[str] = Field(description="all of this for people, the most important first")
    next: NextAction | None
    signals: list[Signal]
    deadlines: list[Deadline] = Field(description="the next one first")
    search: Searched
    brakes: list[Brake] = Field(description="what holds renting")
    machines: list[HeldMachine]
    options: list[Option]


#: Where the caller does what an explanation names.
_WHERE = {
    "seal": ("POST", "/v1/datasets/{dataset}/seal"),
    "reorder": ("POST", "/v1/jobs"),
    "checkpoint": ("POST", "/v1/jobs/{job}/checkpoint"),
    "sample": ("POST", "/v1/jobs/{job}/sample"),
    "retry": ("POST", "/v1/jobs/{job}/retry"),
    "cancel": ("POST", "/v1/jobs/{job}/cancel"),
    "download": ("GET", "/v1/jobs/{job}/artifacts"),
    "logs": ("GET", "/v1/jobs/{job}/logs"),
}
#: Of the newest events so many are looked at.
LATEST = 20


def explained(tx: Transaction, job: Job, deps: Deps) -> Explanation:
    """Why the job stands where it stands."""
    now, settings = deps.clock(), deps.settings
    rehearsed = job.request.rehearsal is not None
    book = _rehearsal(tx) if rehearsed else brakes.read(tx, settings.limits, now)
    try:
        dataset = tx.dataset(job.request.dataset_id)
    except NotFound:
        dataset = None
    around = explain.Around(
        book=book,
        limits=settings.limits,
        kill_switch=settings.kill_switch and not rehearsed,
        since=policy.listening_since(book.beats.get(RECEIVER), now),
        dataset=dataset,
        latest=tx.events(job.id, after=max(0, job.seq - LATEST), limit=LATEST),
    )
    return _explanation(job, explain.explain(job, tx.leases_of(job.id), around, now))


def _rehearsal(tx: Transaction) -> brakes.Book:
    """Of a market that pretends: nobody's money, no operator's word, but the same processes."""
    beats = tx.beats()
    served = {name: beats[name] for name in (RECEIVER, "worker", "reconcile") if name in beats}
    return brakes.Book(leases=(), beats=served)


def _explanation(job: Job, found: explain.Explanation) -> Explanation:
    def until(at: datetime | None) -> float | None:
        return None if at is None else round(max(0.0, (at - found.at).total_seconds()), 1)

    places = {"job": job.id, "dataset": job.request.dataset_id}
    step, search = found.next, found.search
    return Explanation(
        job=job.id,
        at=found.at,
        status=found.status,
        attempt=found.attempt,
        waits_for=found.waits_for,
        headline=found.headline,
        sentences=found.sentences,
        next=NextAction(words=step.words, by=step.by, at=step.at, in_s=until(step.at))
        if step
        else None,
        signals=[
            Signal(
                name=item.name,
                words=item.words,
                at=item.at,
                age_s=round((found.at - item.at).total_seconds(), 1) if item.at else None,
                well=item.well,
            )
            for item in found.signals
        ],
        deadlines=[
            Deadline(name=item.name, words=item.words, at=item.at, in_s=until(item.at) or 0.0)
            for item in found.deadlines
        ],
        search=Searched(
            words=search.words, choice=search.choice, at=search.at, refused=dict(search.refused)
        ),
        brakes=[Brake(**vars(item)) for item in found.brakes],
        machines=[HeldMachine(**vars(item)) for item in found.machines],
        options=[
            Option(
                name=item.name,
                words=item.words,
                method=_WHERE[item.name][0],
                path=_WHERE[item.name][1].format(**places),
            )
            for item in found.options
        ],
    )


# --- routes -----------------------------------------------------------------------------------


def reads(deps: Deps) -> APIBlueprint:
    api = APIBlueprint(
        "reads",
        __name__,
        url_prefix="/v1/jobs",
        abp_tags=[Tag(name="jobs")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))

    @api.get("/<job_id>/logs", operation_id="list_logs", responses={"200": Logs})
    def list_logs(path: schemas.JobPath, query: LogsQuery) -> Response:
        """What its agent and trainer wrote; as `text/event-stream`, also what comes"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            if streams.wanted():
                return streams.follow(job, logs, query.after, event="log")
            return present.answer(logs(tx, job, after=query.after, limit=query.limit))

    @api.get("/<job_id>/metrics", operation_id="get_metrics", responses={"200": Metrics})
    def get_metrics(path: schemas.JobPath, query: MetricsQuery) -> Response:
        """Its curves: loss, learning rate, validation loss, steps per second"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            found = metrics(tx, job, query.name, max_points=query.max_points)
        return present.answer(found)

    @api.get(
        "/<job_id>/checkpoints", operation_id="list_checkpoints", responses={"200": Checkpoints}
    )
    def list_checkpoints(path: schemas.JobPath) -> Response:
        """Its checkpoints, newest first"""
        with deps.store.transaction() as tx:
            found = checkpoints(tx, visible(tx, path.job_id, auth.caller()))
        return present.answer(found)

    @api.get("/<job_id>/samples", operation_id="list_samples", responses={"200": Samples})
    def list_samples(path: schemas.JobPath) -> Response:
        """Its sample images, with prompt, step and seed"""
        with deps.store.transaction() as tx:
            found = samples(tx, visible(tx, path.job_id, auth.caller()))
        return present.answer(found)

    @api.get(
        "/<job_id>/samples/<path:name>",
        operation_id="get_sample",
        responses={"302": {"description": "to an image that can be had for minutes"}},
    )
    def get_sample(path: SamplePath, query: SampleQuery) -> Response:
        """One sample image"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            key = sample_key(tx, job, path.name, query.attempt)
        return present.redirect(deps.storage.presign_get(key, expires_s=DOWNLOAD_SPAN_S))

    @api.get("/<job_id>/cost", operation_id="get_cost", responses={"200": JobCost})
    def get_cost(path: schemas.JobPath) -> Response:
        """What it cost so far, machine by machine, and what it may cost"""
        now = deps.clock()
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            found = cost(job, tx.leases_of(job.id), now)
        return present.answer(found)

    @api.get("/<job_id>/explain", operation_id="explain_job", responses={"200": Explanation})
    def explain_job(path: schemas.JobPath) -> Response:
        """What it waits for, what was last heard, what comes next and when"""
        with deps.store.transaction() as tx:
            found = explained(tx, visible(tx, path.job_id, auth.caller()), deps)
        return present.answer(found)

    return api
