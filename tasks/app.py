"""The Celery app and its tasks: each parses, calls one plain function, and is done.

Tasks carry ids and no data. A task that raises is logged and acknowledged: the row in the
database, not the message, carries the retry.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import structlog
from celery import Celery, Task
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from infra import guard, logs, telemetry
from infra.wiring import Services, services
from state import policy, usual
from state.policy import Policy
from tasks import reconcile as passes
from tasks import rounds
from tasks.allocate import Renter, Terms
from tasks.cleanup import cleanup as clean
from tasks.dataset import DatasetBuilder
from tasks.deallocate import Keeper
from tasks.deallocate import sweep as sweep_account
from tasks.life import live
from tasks.rehearse import Rehearsals
from tasks.relay import Answer, EndpointRefused, NoAnswer, Relay
from tasks.schedule import EXPIRES_S
from tasks.verify import Verifier


class Told(Task):
    """A task that is counted, and traced with its job where it has one."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        subjects: list[str] = args[0] if args else []
        job = subjects[0] if len(subjects) == 1 and subjects[0].startswith("job_") else ""
        with telemetry.task(self.name, job):
            return super().__call__(*args, **options)


app = Celery("stoker", task_cls=Told)
app.config_from_object("tasks.config")
_log = structlog.get_logger()


@setup_logging.connect
def _logging(**_: object) -> None:
    """Ours, in place of Celery's; a line for each tick would bury what matters."""
    logs.configure()
    for noisy in ("celery.app.trace", "celery.beat", "celery.worker.strategy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


_over = threading.Event()


@worker_ready.connect
def _live(**_: object) -> None:
    have = services()
    telemetry.trace_to(have.settings.otlp_endpoint, "stoker-worker")
    if have.settings.metrics_bind:
        telemetry.show(have.settings.metrics_bind)
    live(have.store, have.clock, "worker", _over)


@worker_shutting_down.connect
def _end(**_: object) -> None:
    _over.set()


def wake(task: str, ids: Sequence[str]) -> None:
    """Send the wake-up `task` for these subjects. A lost one costs latency only."""
    app.send_task(_NAMES[task], args=[list(ids)], expires=EXPIRES_S, retry=False)


_NAMES: Mapping[str, str] = {
    "allocate": "allocate_gpu",
    "deallocate": "deallocate_gpu",
    "tend": "tend_leases",
    "build": "build_dataset",
    "verify": "verify_weights",
    "relay": "relay",
    "sweep": "sweep",
    "measure": "measure",
    "cleanup": "cleanup",
}


def terms(have: Services) -> Terms:
    settings = have.settings
    return Terms(
        deployment=settings.deployment,
        image=settings.agent_image,
        public_url=settings.public_url,
        onstart=have.onstart,
        image_bytes=settings.image_bytes,
        limits=settings.limits,
        kill_switch=settings.kill_switch,
    )


def rules(have: Services) -> Policy:
    return dataclasses.replace(policy.DEFAULT, lease=timedelta(hours=have.settings.lease_hours))


@cache
def renter() -> Renter:
    have = services()
    return Renter(
        store=have.store,
        provider=have.provider,
        terms=terms(have),
        clock=have.clock,
        rules=rules(have),
    )


@cache
def keeper() -> Keeper:
    have = services()
    return Keeper(
        store=have.store,
        provider=have.provider,
        clock=have.clock,
        rules=rules(have),
        image_bytes=have.settings.image_bytes,
    )


@cache
def rehearsals() -> Rehearsals:
    have = services()
    url = have.settings.test_url or have.settings.public_url
    return Rehearsals(
        store=have.store,
        market=have.rehearsals,
        terms=dataclasses.replace(terms(have), public_url=url),
        clock=have.clock,
        rules=rules(have),
    )


@cache
def relayer() -> Relay:
    have = services()

    def post(url: str, *, headers: Mapping[str, str], body: bytes, timeout: float) -> Answer:
        try:
            with telemetry.span("webhook", server=urlsplit(url).netloc):
                answer = guard.guarded_request(
                    "POST",
                    url,
                    headers=headers,
                    body=body,
                    timeout=timeout,
                    allow_private=have.settings.private_webhooks,
                )
        except guard.GuardRefused as error:
            raise EndpointRefused(str(error)) from None
        except guard.GuardError as error:
            raise NoAnswer(str(error)) from None
        return Answer(answer.status, answer.headers)

    return Relay(store=have.store, post=post, clock=have.clock, random=random.Random())


@app.task(name="allocate_gpu")
def allocate_gpu(job_ids: list[str]) -> None:
    for job_id in job_ids:
        with structlog.contextvars.bound_contextvars(job=job_id):
            renter().allocate(job_id)
    # What is real comes first, here and below: a rehearsal can neither stop nor delay it.
    for job_id in job_ids:
        with structlog.contextvars.bound_contextvars(job=job_id):
            rehearsals().allocate(job_id)


@app.task(name="deallocate_gpu")
def deallocate_gpu(job_ids: list[str]) -> None:
    for job_id in job_ids:
        with structlog.contextvars.bound_contextvars(job=job_id):
            try:
                keeper().release_job(job_id)
            finally:
                rehearsals().release_job(job_id)


@app.task(name="tend_leases")
def tend_leases(lease_ids: list[str]) -> None:
    try:
        keeper().tend(lease_ids)
    finally:
        rehearsals().tend(lease_ids)


@app.task(name="build_dataset")
def build_dataset(dataset_ids: list[str]) -> None:
    have = services()
    builder = DatasetBuilder(store=have.store, storage=have.storage, clock=have.clock)
    for dataset_id in dataset_ids:
        moved = builder.build(dataset_id)
        if moved:
            wake("allocate", moved)
            for job_id in moved:
                wake("relay", [job_id])


@app.task(name="verify_weights")
def verify_weights(job_ids: list[str]) -> None:
    have = services()
    verifier = Verifier(store=have.store, storage=have.storage, clock=have.clock)
    for job_id in job_ids:
        with structlog.contextvars.bound_contextvars(job=job_id):
            verifier.verify(job_id)
            wake("deallocate", [job_id])
            wake("relay", [job_id])


@app.task(name="relay")
def relay(subjects: list[str]) -> None:
    """Jobs, all of whose webhooks may go; or queues by their names."""
    for subject in subjects:
        relayer().relay_all(subject, wake)


@app.task(name="reconcile")
def reconcile() -> None:
    have = services()
    for task in rounds.due(have.store, have.clock()):
        wake(task, [])
    while passes.reconcile(have.store, wake, have.clock()).jobs >= passes.BATCH:
        pass  # a full batch: there is more that is due


@app.task(name="sweep")
def sweep(_: Sequence[str] = ()) -> None:
    try:
        sweep_account(keeper(), services().settings.deployment)
    finally:
        rehearsals().sweep()


@app.task(name="measure")
def measure(_: Sequence[str] = ()) -> None:
    have = services()
    with have.store.transaction() as tx:
        usual.keep(tx, usual.measure(tx), have.clock())


@app.task(name="cleanup")
def cleanup(_: Sequence[str] = ()) -> None:
    have = services()
    clean(have.store, have.storage, have.clock, timedelta(days=have.settings.retention_days))
