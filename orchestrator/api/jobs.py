"""`/v1/jobs`: order a training, watch it, change its course, fetch what it made."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from flask import Response, request
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag

from gpu_agent import needs, wire
from gpu_agent.recipe import Recipe, RecipeError
from orchestrator.api import auth, idempotency, present, schemas, streams
from orchestrator.api import datasets as datasets_api
from orchestrator.api.auth import Caller
from orchestrator.api.bases import fault_of_base, fault_of_url
from orchestrator.api.estimates import Estimate, EstimateIn, Estimates
from orchestrator.api.ids import new_id, plausible
from orchestrator.api.keys import is_test
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import ranking, record
from state.errors import Conflict, NotFound
from state.events import Artefact, Dataset, DatasetStatus, Secret
from state.job import GpuNeeds, Job, JobRequest
from state.rehearsal import Rehearsal
from state.store import Transaction
from tasks.estimate import Photographs

#: How long a download link lasts.
DOWNLOAD_SPAN_S = 900
#: A long poll looks again after so many seconds.
POLL_S = 0.5
#: Long polls that may hold a thread of this process at once; one more is answered at once.
LONG_POLLS = 8
#: More transitions than any policy lets a job make.
MAX_TRANSITIONS = 1000


def visible(tx: Transaction, job_id: str, caller: Caller) -> Job:
    """Raises: NotFound, also for what belongs to somebody else."""
    if plausible(job_id):
        job = tx.job(job_id)
        if caller.sees(job.owner):
            return job
    raise NotFound(f"no job {job_id[:64]!r}")


# --- ordering a training ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked order: the request, the webhook's secret, and what is to be rehearsed."""

    request: JobRequest
    secret: Secret | None
    rehearsal: Rehearsal | None = None


def check(
    body: schemas.JobIn | EstimateIn, *, private_bases: bool, private_webhooks: bool
) -> Order:
    """Raises: Refusal 422 with every fault that can be seen without asking anybody."""
    faults: list[tuple[str, str]] = []
    recipe: dict[str, Any] = {}
    gpu = GpuNeeds(**{**body.gpu.model_dump(), "gpu_names": tuple(body.gpu.gpu_names)})
    try:
        checked = Recipe.from_dict(body.recipe, body.base_family)
        recipe, gpu = checked.to_dict(), _enough(gpu, checked, body.base_family)
        if fault := _fault_of_names(gpu):
            faults.append(("/gpu/gpu_names", fault))
    except RecipeError as error:
        faults += [
            ("/recipe/" + key.replace("~", "~0").replace("/", "~1"), why)
            for key, why in error.faults.items()
        ]
    if fault := fault_of_base(body.base, private=private_bases):
        faults.append(("/base", fault))
    if body.webhook and (fault := fault_of_url(body.webhook.url, plain_http=private_webhooks)):
        faults.append(("/webhook/url", fault))
    if faults:
        raise Refusal(422, "invalid", "the job cannot be ordered; see errors", errors=faults)
    return Order(
        request=JobRequest(
            dataset_id=body.dataset_id or "",
            base=body.base,
            method=body.method,
            base_family=body.base_family,
            recipe=recipe,
            gpu=gpu,
            max_cost=body.max_cost,
            max_attempts=body.max_attempts,
            interruptible=body.interruptible,
            hedge=body.hedge,
            webhook_url=body.webhook.url if body.webhook else None,
            metadata=dict(body.metadata),
        ),
        secret=_secret(body.webhook),
        rehearsal=Rehearsal(**body.test.model_dump()) if body.test else None,
    )


def request_for(order: Order, caller: Caller) -> JobRequest:
    """What `caller` orders: whatever a test key orders is a rehearsal, and nothing else is.

    Raises: Refusal 422.
    """
    if caller.test:
        return replace(order.request, rehearsal=order.rehearsal or Rehearsal())
    if order.rehearsal is not None:
        fault = ("/test", "needs a test key (stk_test_…); this one is live, and spends money")
        raise Refusal(422, "invalid", "only a test key orders a test", errors=[fault])
    return order.request


def _enough(gpu: GpuNeeds, recipe: Recipe, family: str) -> GpuNeeds:
    """The needs, with no less memory and disk than the training takes."""
    return replace(
        gpu,
        min_vram_gb=max(gpu.min_vram_gb, needs.least(recipe, family)),
        disk_gb=max(gpu.disk_gb, needs.disk(family)),
    )


def _fault_of_names(gpu: GpuNeeds) -> str | None:
    """None where at least one of the GPUs that are asked for may have the memory."""
    known = [ranking.GPU_MEMORY.get(name, gpu.min_vram_gb) for name in gpu.gpu_names]
    if not known or max(known) >= gpu.min_vram_gb:
        return None
    return (
        f"have at most {max(known):g} GB, and the training takes {gpu.min_vram_gb:g} GB; "
        "name a larger GPU, or let the recipe say a smaller resolution or base_precision nf4"
    )


def _secret(webhook: schemas.WebhookIn | None) -> Secret | None:
    if webhook is None:
        return None
    if webhook.secret is None:
        return Secret(wire.new_secret())
    try:
        wire.secret_key(webhook.secret)
    except wire.WireError as error:
        fault = ("/webhook/secret", str(error))
        raise Refusal(422, "invalid", "the webhook's secret is no use", errors=[fault]) from None
    return Secret(webhook.secret)


def own_dataset(tx: Transaction, dataset_id: str, caller: Caller) -> Dataset:
    """Raises: Refusal 422."""
    try:
        found = datasets_api.visible(tx, dataset_id, caller)
        if is_test(found.owner) is not caller.test:
            raise NotFound(f"dataset {dataset_id} is of the other mode")
    except NotFound:
        fault = ("/dataset_id", "there is no such dataset")
        raise Refusal(
            422, "unknown_dataset", f"no dataset {dataset_id!r}", errors=[fault]
        ) from None
    return found


def estimated(
    deps: Deps, estimates: Estimates, caller: Caller, body: schemas.JobIn | EstimateIn
) -> Estimate:
    """What an order would cost and take: checked as the order itself, and nothing is kept.

    Raises: Refusal 422; 503 where the market cannot be asked. Conflict, as for the order.
    """
    settings = deps.settings
    order = check(
        body,
        private_bases=settings.private_bases,
        private_webhooks=settings.private_webhooks,
    )
    request = request_for(order, caller)
    photographs = Photographs()
    if isinstance(body, EstimateIn):
        photographs = Photographs(count=body.images, bytes=body.bytes)
    if body.dataset_id is not None:
        with deps.store.transaction() as tx:
            dataset = own_dataset(tx, body.dataset_id, caller)
        if dataset.status is DatasetStatus.REFUSED:
            raise Conflict(f"dataset {dataset.id} has no usable image; see its report")
        announced = sum(int(item["bytes"]) for item in dataset.files)
        photographs = Photographs(bytes=dataset.zip_bytes or announced)
    return estimates.of(request, photographs)


class Orders:
    """Takes orders, each once."""

    def __init__(self, deps: Deps, waker: Waker) -> None:
        self._deps, self._waker = deps, waker

    def take(
        self, order: Order, caller: Caller, key: str | None, body: object
    ) -> tuple[schemas.NewJob, bool]:
        """The new job, and whether this is the stored answer of an earlier request."""
        now, wanted = self._deps.clock(), request_for(order, caller)
        with self._deps.store.transaction() as tx:
            if key is not None:
                stored = idempotency.begin(tx, caller.owner, key, body, now)
                if stored is not None:
                    return self._again(tx, stored), True
            own_dataset(tx, wanted.dataset_id, caller)
            job = record.create_job(
                tx,
                wanted,
                owner=caller.owner,
                now=now,
                job_id=new_id("job", now),
                webhook_secrets=[order.secret] if order.secret else [],
            )
            shown = describe(tx, job, self._deps)
            if key is not None:
                tx.finish_idempotent(caller.owner, key, {"job": shown.model_dump(mode="json")})
        self._waker(job.id, record.wakes(job))
        return _with_secret(shown, order.secret), False

    def _again(self, tx: Transaction, stored: Mapping[str, Any]) -> schemas.NewJob:
        # The secret is no part of what is stored: it lies encrypted beside its job.
        shown = schemas.Job.model_validate_json(json.dumps(stored["job"]))
        secrets = tx.webhook_secrets(shown.id)
        return _with_secret(shown, secrets[-1] if secrets else None)


def _with_secret(job: schemas.Job, secret: Secret | None) -> schemas.NewJob:
    return schemas.NewJob(
        **{name: getattr(job, name) for name in schemas.Job.model_fields},
        webhook_secret=secret.reveal() if secret else None,
    )


# --- watching it ------------------------------------------------------------------------------


def describe(tx: Transaction, job: Job, deps: Deps) -> schemas.Job:
    transitions = tx.events(job.id, limit=MAX_TRANSITIONS, type="transition")
    return schemas.Job(
        **present.job(job, tx.leases_of(job.id), transitions, tx.artefacts(job.id), deps.clock())
    )


def etag(job: schemas.Job) -> str:
    """Changes with everything but the ticking cost, which alone is no news; hence a weak one."""
    text = job.model_dump_json(exclude={"cost": {"so_far", "display", "machines"}})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Watch:
    """Shows a job, at once or when it changes."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._slots = threading.BoundedSemaphore(LONG_POLLS)

    def show(
        self, job_id: str, caller: Caller, wait_s: int, known: Callable[[str], bool]
    ) -> tuple[schemas.Job, str]:
        """The job and its ETag; with `wait_s`, not before the ETag is another one.

        `known` says of an ETag whether the caller has it already.
        """
        shown, tag = self._look(job_id, caller)
        if wait_s == 0 or not self._slots.acquire(blocking=False):
            return shown, tag
        try:
            begun_with, until = tag, self._deps.clock() + timedelta(seconds=wait_s)
            named = bool(request.if_none_match)
            while (known(tag) if named else tag == begun_with) and self._deps.clock() < until:
                self._deps.pause(POLL_S)
                shown, tag = self._look(job_id, caller)
        finally:
            self._slots.release()
        return shown, tag

    def _look(self, job_id: str, caller: Caller) -> tuple[schemas.Job, str]:
        with self._deps.store.transaction() as tx:
            shown = describe(tx, visible(tx, job_id, caller), self._deps)
        return shown, etag(shown)


def page(deps: Deps, caller: Caller, query: schemas.JobsQuery) -> schemas.Jobs:
    """One page of jobs, newest first. Raises: Refusal 422 for a cursor that is not ours."""
    if query.cursor is not None and not plausible(query.cursor):
        fault = ("/cursor", "is not a cursor of ours")
        raise Refusal(422, "invalid", "the cursor is not understood", errors=[fault])
    now = deps.clock()
    with deps.store.transaction() as tx:
        found = tx.list_jobs(
            owner=None if caller.operator else caller.owner,
            statuses=query.status or (),
            metadata=query.metadata() or None,
            before=query.cursor,
            limit=query.limit + 1,
        )
        more = len(found) > query.limit
        shown = [
            schemas.JobSummary(**present.job_summary(job, tx.leases_of(job.id), now))
            for job in found[: query.limit]
        ]
    return schemas.Jobs(
        data=shown, has_more=more, next_cursor=shown[-1].id if more and shown else None
    )


def events_of(tx: Transaction, job: Job, *, after: int, limit: int) -> schemas.Events:
    """A page of what happened to a job, oldest first."""
    found = tx.events(job.id, after=after, limit=limit + 1)
    shown = [present.event(item) for item in found[:limit]]
    return schemas.Events(
        data=shown, has_more=len(found) > limit, next_after=shown[-1].seq if shown else after
    )


def downloadable(tx: Transaction, job: Job, name: str) -> Artefact:
    """Raises: Refusal 409 not ready, 410 expired; NotFound."""
    found = [item for item in tx.artefacts(job.id) if item.name == name]
    if found and found[0].expired:
        raise Refusal(410, "expired", f"{name} was deleted after its time of keeping")
    if found and found[0].verified:
        return found[0]
    if not job.terminal:
        raise Refusal(
            409, "not_ready", f"{name} is not there; the job is {job.status}", retryable=True
        )
    raise NotFound(f"job {job.id} has no file {name[:200]!r}")


# --- routes -----------------------------------------------------------------------------------


def jobs(deps: Deps, waker: Waker, estimates: Estimates) -> APIBlueprint:
    api = APIBlueprint(
        "jobs",
        __name__,
        url_prefix="/v1/jobs",
        abp_tags=[Tag(name="jobs")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))
    orders, watch = Orders(deps, waker), Watch(deps)

    def change(job_id: str, move: Callable[[Transaction, str], Job]) -> Response:
        with deps.store.transaction() as tx:
            job = move(tx, visible(tx, job_id, auth.caller()).id)
            shown = describe(tx, job, deps)
        waker(job.id, record.wakes(job))
        return present.answer(shown, 202)

    @api.post("", operation_id="create_job", responses={"202": schemas.NewJob, "200": Estimate})
    def create(
        header: schemas.JobHeader, query: schemas.DryRunQuery, body: schemas.JobIn
    ) -> Response:
        """Order a training; it begins as soon as its dataset is ready"""
        if query.dry_run:
            return present.answer(estimated(deps, estimates, auth.caller(), body))
        order = check(
            body,
            private_bases=deps.settings.private_bases,
            private_webhooks=deps.settings.private_webhooks,
        )
        shown, replayed = orders.take(
            order, auth.caller(), header.idempotency_key, request.get_json()
        )
        headers = {"Location": f"/v1/jobs/{shown.id}", "Cache-Control": "no-store"}
        if replayed:
            headers["Idempotent-Replayed"] = "true"
        return present.answer(shown, 202, headers)

    @api.post("/estimate", operation_id="estimate_job", responses={"200": Estimate})
    def estimate(body: EstimateIn) -> Response:
        """What a training would cost and take; nothing is ordered, nothing spent"""
        return present.answer(estimated(deps, estimates, auth.caller(), body))

    @api.get("", operation_id="list_jobs", responses={"200": schemas.Jobs})
    def index(query: schemas.JobsQuery) -> Response:
        """Jobs, newest first"""
        return present.answer(page(deps, auth.caller(), query))

    @api.get("/<job_id>", operation_id="get_job", responses={"200": schemas.Job, "304": None})
    def show(path: schemas.JobPath, query: schemas.WaitQuery) -> Response:
        """One job; with `wait`, the answer comes when it changes"""
        shown, tag = watch.show(
            path.job_id, auth.caller(), query.wait, request.if_none_match.contains_weak
        )
        response = present.answer(shown)
        response.set_etag(tag, weak=True)
        response.make_conditional(request)
        return response

    @api.post("/<job_id>/cancel", operation_id="cancel_job", responses={"202": schemas.Job})
    def cancel(path: schemas.JobPath) -> Response:
        """Cancel it; its machine is given back"""
        return change(path.job_id, lambda tx, job: record.cancel(tx, job, deps.clock()))

    @api.post("/<job_id>/retry", operation_id="retry_job", responses={"202": schemas.Job})
    def retry(path: schemas.JobPath) -> Response:
        """Start the next attempt of a stalled job now"""
        return change(path.job_id, lambda tx, job: record.retry(tx, job, deps.clock()))

    @api.post("/<job_id>/checkpoint", operation_id="checkpoint_job", responses={"202": schemas.Job})
    def checkpoint(path: schemas.JobPath) -> Response:
        """Have a checkpoint written soon"""
        what = wire.Order.CHECKPOINT_NOW
        return change(path.job_id, lambda tx, job: record.order(tx, job, what, deps.clock()))

    @api.post("/<job_id>/sample", operation_id="sample_job", responses={"202": schemas.Job})
    def sample(path: schemas.JobPath) -> Response:
        """Have sample images made soon"""
        what = wire.Order.SAMPLE_NOW
        return change(path.job_id, lambda tx, job: record.order(tx, job, what, deps.clock()))

    @api.get("/<job_id>/events", operation_id="list_events", responses={"200": schemas.Events})
    def events(path: schemas.JobPath, query: schemas.EventsQuery) -> Response:
        """All that happened to it, oldest first; as `text/event-stream`, also what happens yet"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            if streams.wanted():
                return streams.follow(job, events_of, query.after)
            return present.answer(events_of(tx, job, after=query.after, limit=query.limit))

    @api.get(
        "/<job_id>/artifacts", operation_id="list_artifacts", responses={"200": schemas.Artefacts}
    )
    def artefacts(path: schemas.JobPath) -> Response:
        """The files it made, with sizes and SHA-256"""
        with deps.store.transaction() as tx:
            found = tx.artefacts(visible(tx, path.job_id, auth.caller()).id)
        return present.answer(schemas.Artefacts(data=[present.artefact(item) for item in found]))

    @api.get(
        "/<job_id>/artifacts/<path:name>",
        operation_id="get_artifact",
        responses={"302": {"description": "to a download that lasts minutes"}},
    )
    def artefact(path: schemas.ArtefactPath) -> Response:
        """Download one file"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            found = downloadable(tx, job, path.name)
        return present.redirect(deps.storage.presign_get(found.key, expires_s=DOWNLOAD_SPAN_S))

    @api.get(
        "/<job_id>/attempts", operation_id="list_attempts", responses={"200": schemas.Attempts}
    )
    def attempts(path: schemas.JobPath) -> Response:
        """Its attempts and the machines they had"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            found, leases = tx.list_attempts(job.id), tx.leases_of(job.id)
        shown = [present.attempt(item, leases, deps.clock()) for item in found]
        return present.answer(schemas.Attempts(data=shown))

    @api.get(
        "/<job_id>/deliveries",
        operation_id="list_deliveries",
        responses={"200": schemas.Deliveries},
    )
    def deliveries(path: schemas.JobPath) -> Response:
        """The webhooks it owes you, and each try at sending them"""
        with deps.store.transaction() as tx:
            job = visible(tx, path.job_id, auth.caller())
            owed, tries = tx.list_outgoing(job.id), tx.deliveries(job.id, limit=1000)
        shown = [present.delivery(item, tries) for item in owed]
        return present.answer(schemas.Deliveries(data=shown))

    return api
