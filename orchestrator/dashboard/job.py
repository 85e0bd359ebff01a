"""Job: one training, from what was asked for to what came of it."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from flask import Blueprint, Response, jsonify, render_template, request
from werkzeug.wrappers import Response as AnyResponse

from gpu_agent.recipe import Recipe, RecipeError
from gpu_agent.wire import Fact
from orchestrator.api import auth, present, reads, schemas
from orchestrator.api.jobs import DOWNLOAD_SPAN_S, MAX_TRANSITIONS, downloadable, visible
from orchestrator.api.reads import Checkpoint, Explanation, JobCost, LogLine, Sample
from orchestrator.dashboard import fleet, states
from orchestrator.deps import Deps
from state import series, usual
from state.errors import NotFound
from state.events import Artefact, Event
from state.job import Job, JobRequest
from state.store import Transaction

#: Lines of the log that a page begins with, and events to look for them in.
TAIL, TAIL_EVENTS = 300, (600, 6000, 50_000)
#: Events that a page lists, out of so many.
EVENTS, EVENTS_OF = 60, 600
#: Points of a curve on a screen.
POINTS = 2000
CURVES = ("loss", "validation_loss")
#: What comes every few seconds, and says nothing by itself.
NOISE = frozenset(
    {
        Fact.HEARTBEAT,
        Fact.LOG_LINES,
        Fact.IMAGES_PROGRESS,
        Fact.MODEL_PROGRESS,
        Fact.TRAINING_PROGRESS,
    }
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that the page shows. Two are equal when nothing happened between them."""

    job: Job
    row: fleet.Row
    transitions: tuple[Event, ...]
    attempts: tuple[schemas.Attempt, ...] = field(compare=False)
    machines: tuple[Any, ...]
    cost: JobCost = field(compare=False)
    checkpoints: tuple[Checkpoint, ...]
    samples: tuple[Sample, ...]
    files: tuple[Artefact, ...]
    deliveries: tuple[schemas.Delivery, ...]
    explained: Explanation = field(compare=False)
    #: what of `explained` is more than the passing of time
    standing: tuple[Any, ...]
    now: datetime = field(compare=False)

    @property
    def drawing(self) -> states.Drawing:
        return states.draw(self.job, self.row.stretches, self.transitions, self.now)

    @property
    def grid(self) -> Grid:
        return Grid.of(self.samples)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Samples by prompt and by when they were made, so that the same prompt stands in a row."""

    #: (attempt, step), oldest first
    columns: tuple[tuple[int, int | None], ...]
    rows: tuple[tuple[str, int | None, tuple[Sample | None, ...]], ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Grid:
        """Each prompt and seed is a row; of two images for one place the later one counts."""
        columns = tuple(dict.fromkeys((item.attempt, item.step) for item in samples))
        found = {
            (item.prompt, item.seed, item.attempt, item.step, number): item
            for item, number in zip(samples, _repeats(samples), strict=True)
        }
        rows = tuple(dict.fromkeys((key[0], key[1], key[4]) for key in found))
        return cls(
            columns=columns,
            rows=tuple(
                (
                    prompt,
                    seed,
                    tuple(
                        found.get((prompt, seed, attempt, step, number))
                        for attempt, step in columns
                    ),
                )
                for prompt, seed, number in rows
            ),
        )


def _repeats(samples: Sequence[Sample]) -> list[int]:
    """How many images of the same prompt, seed and step came before each."""
    seen: dict[tuple[Any, ...], int] = {}
    numbers = []
    for item in samples:
        place = (item.prompt, item.seed, item.attempt, item.step)
        numbers.append(seen.get(place, 0))
        seen[place] = numbers[-1] + 1
    return numbers


def look(tx: Transaction, job: Job, deps: Deps) -> Look:
    """Read everything that the page of `job` shows, but its curves, events and log."""
    now = deps.clock()
    leases = tx.leases_of(job.id)
    transitions = tuple(tx.events(job.id, limit=MAX_TRANSITIONS, type="transition"))
    tries = tx.deliveries(job.id, limit=1000)
    explained = reads.explained(tx, job, deps)
    return Look(
        job=job,
        row=fleet.row(job, leases, transitions, usual.known(tx.beats()), now),
        transitions=transitions,
        attempts=tuple(present.attempt(item, leases, now) for item in tx.list_attempts(job.id)),
        machines=tuple((item.id, item.status, item.billed, item.why) for item in leases),
        cost=reads.cost(job, leases, now),
        checkpoints=tuple(reads.checkpoints(tx, job).data),
        samples=tuple(reads.samples(tx, job).data),
        # the weights first, for they are what somebody came for
        files=tuple(sorted(tx.artefacts(job.id), key=lambda file: "/" in file.name)),
        deliveries=tuple(present.delivery(item, tries) for item in tx.list_outgoing(job.id)),
        explained=explained,
        standing=_standing(explained),
        now=now,
    )


def _standing(told: Explanation) -> tuple[Any, ...]:
    return (
        told.waits_for,
        told.next.words if told.next else "",
        tuple(item.name for item in told.deadlines),
        tuple((item.name, item.well) for item in told.signals),
        tuple(item.code for item in told.brakes),
        tuple(told.search.refused.items()),
    )


def tail(tx: Transaction, job: Job) -> list[LogLine]:
    """The last lines of the log."""
    lines: list[LogLine] = []
    for back in TAIL_EVENTS:
        after = max(0, job.seq - back)
        lines = reads.logs(tx, job, after=after, limit=5000).data
        if len(lines) >= TAIL or after == 0:
            break
    return lines[-TAIL:]


def told(tx: Transaction, job: Job) -> list[Event]:
    """The latest events worth a line, newest first."""
    found = tx.events(job.id, after=max(0, job.seq - EVENTS_OF), limit=EVENTS_OF)
    return [event for event in reversed(found) if event.type not in NOISE][:EVENTS]


def curve(tx: Transaction, job: Job) -> dict[str, Any]:
    """What the page's script draws: points as [attempt, step, value], and checkpoints."""
    found = reads.metrics(tx, job, CURVES, max_points=POINTS)
    return {
        **{
            one.name: [[point.attempt, point.step, point.value] for point in one.points]
            for one in found.series
        },
        "checkpoints": [
            [item.attempt, item.step, item.best]
            for item in reversed(reads.checkpoints(tx, job).data)
            if item.step is not None
        ],
    }


def news(reports: Sequence[Event]) -> dict[str, Any]:
    """The points in new reports, as `curve` has them."""
    curves = series.read(reports)
    return {
        name: [[point.attempt, point.step, point.value] for point in curves.get(name, [])]
        for name in CURVES
    }


# --- what was asked for -----------------------------------------------------------------------


def order_of(wanted: JobRequest) -> dict[str, Any]:
    """`wanted` as the body of `POST /v1/jobs`; its webhook gets a secret of its own."""
    order: dict[str, Any] = {
        "dataset_id": wanted.dataset_id,
        "base": wanted.base,
        "method": wanted.method,
        "base_family": wanted.base_family,
        "recipe": dict(wanted.recipe),
        "gpu": {**asdict(wanted.gpu), "gpu_names": list(wanted.gpu.gpu_names)},
        "max_cost": wanted.max_cost,
        "max_attempts": wanted.max_attempts,
        "interruptible": wanted.interruptible,
        "hedge": wanted.hedge,
        "metadata": dict(wanted.metadata),
    }
    if wanted.webhook_url:
        order["webhook"] = {"url": wanted.webhook_url}
    return order


def curl_of(wanted: JobRequest, public_url: str) -> str:
    """The same order as a command."""
    body = json.dumps(order_of(wanted), indent=1, ensure_ascii=False)
    return (
        f"curl {shlex.quote(public_url + '/v1/jobs')} \\\n"
        '  -H "Authorization: Bearer $STOKER_API_KEY" \\\n'
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def recipe_of(wanted: JobRequest) -> list[tuple[str, Any, bool]]:
    """Each key of the recipe, its value, and whether it is the family's own."""
    usual_values: Mapping[str, Any] = {}
    with contextlib.suppress(RecipeError):  # an old job of a family that is no more
        usual_values = Recipe.from_dict({}, wanted.base_family).to_dict()
    return [
        (key, value, usual_values.get(key) == value) for key, value in sorted(wanted.recipe.items())
    ]


# --- the page ---------------------------------------------------------------------------------


def fragments(tx: Transaction, before: Look | None, after: Look) -> str:
    """What changed between two looks, as parts to be swapped out of band; all of it, for who
    had none."""
    job = after.job
    html: list[str] = []

    def part(name: str, **values: Any) -> None:
        html.append(render_template(f"job_{name}.html", look=after, job=job, oob=True, **values))

    if before is None or _status(before) != _status(after):
        part("status")
        part("facts")
    if job.terminal:
        html.append('<section id="job-explain" hx-swap-oob="delete"></section>')
    elif before is None or before.standing != after.standing or before.job.seq != job.seq:
        part("explain")
    if before is None or before.row.stretches != after.row.stretches:
        part("states")
    for name in ("checkpoints", "samples", "files", "deliveries"):
        if before is None or getattr(before, name) != getattr(after, name):
            part(name)
    if before is None or before.machines != after.machines:
        part("attempts")
    if before is None:
        part("log", lines=tail(tx, job))
        part("curve", points=None)
    else:
        since = before.job.seq
        lines = reads.logs(tx, job, after=since, limit=5000).data
        if lines:
            part("lines", lines=lines[-TAIL:])
        points = tx.events(job.id, after=since, limit=1000, type=Fact.TRAINING_PROGRESS.value)
        if points:
            part("curve", points=json.dumps(news(points)))
    events = told(tx, job)
    if before is None or (events and events[0].seq > before.job.seq):
        part("events", events=events)
    return "".join(html)


def _status(seen: Look) -> tuple[Any, ...]:
    return seen.row, seen.job.orders, seen.job.deadline_at


def register(pages: Blueprint, deps: Deps) -> None:
    """Put the page's views into `pages`."""

    @pages.get("/jobs/<job_id>")
    def job(job_id: str) -> str:
        with deps.store.transaction() as tx:
            found = visible(tx, job_id, auth.caller())
            seen = look(tx, found, deps)
            lines, events = tail(tx, found), told(tx, found)
            report = _dataset(tx, found)
        return render_template(
            "job.html",
            look=seen,
            job=found,
            lines=lines,
            events=events,
            report=report,
            recipe=recipe_of(found.request),
            curl=curl_of(found.request, deps.settings.public_url),
        )

    @pages.get("/jobs/<job_id>/curve")
    def job_curve(job_id: str) -> Response:
        with deps.store.transaction() as tx:
            return jsonify(curve(tx, visible(tx, job_id, auth.caller())))

    @pages.get("/jobs/<job_id>/log")
    def job_log(job_id: str) -> Response:
        with deps.store.transaction() as tx:
            found = visible(tx, job_id, auth.caller())
            lines = reads.logs(tx, found, limit=100_000).data
        text = "".join(f"{line.at:%Y-%m-%dT%H:%M:%SZ} {line.text}\n" for line in lines)
        return Response(text, mimetype="text/plain")

    @pages.get("/jobs/<job_id>/files/<path:name>")
    def job_file(job_id: str, name: str) -> AnyResponse:
        with deps.store.transaction() as tx:
            found = downloadable(tx, visible(tx, job_id, auth.caller()), name)
        return present.redirect(deps.storage.presign_get(found.key, expires_s=DOWNLOAD_SPAN_S))

    @pages.get("/jobs/<job_id>/samples/<path:name>")
    def job_sample(job_id: str, name: str) -> AnyResponse:
        attempt = request.args.get("attempt", type=int)
        with deps.store.transaction() as tx:
            key = reads.sample_key(tx, visible(tx, job_id, auth.caller()), name, attempt)
        return present.redirect(deps.storage.presign_get(key, expires_s=DOWNLOAD_SPAN_S))


def _dataset(tx: Transaction, job: Job) -> Mapping[str, Any]:
    """What was found in the photographs; nothing, when they were deleted already."""
    try:
        return tx.dataset(job.request.dataset_id).report
    except NotFound:
        return {}
