"""A rented machine while it trains: what it knows of us, and what becomes of it on a cancel.

All of it is watched on one job, in the order written here; it trains until the last but one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from psycopg import sql

from gpu_agent import wire
from infra import schema
from infra.settings import Settings
from orchestrator.cli.stage import is_running

ENDLESS = 100_000


@pytest.fixture(scope="module")
def listener(new_customer: type[Any]) -> Iterator[Any]:
    """Where the job's webhooks go."""
    with new_customer() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def training(stoker: Any, listener: Any, until: Callable[..., Any]) -> str:
    """A job that trains on its machine."""
    recipe = {"steps": ENDLESS, "resolution": 64, "validation_every": 10}
    job_id = stoker.order(receiver=listener, recipe=recipe)
    until(lambda: stoker.job(job_id).progress.get("checkpoint"), "a first checkpoint", 120.0)
    return str(job_id)


@dataclass(frozen=True)
class Stolen:
    """What a host can copy while the job trains on it."""

    token: str
    secret: str
    dataset_url: str


def _ask(stoker: Any, path: str, secret: str, body: bytes, webhook_id: str) -> requests.Response:
    """As the agent does, or whoever has its secret."""
    headers = wire.sign(body, secrets=[secret], webhook_id=webhook_id, at=time.time())
    return requests.post(f"{stoker.stage.url}{path}", data=body, headers=headers, timeout=20)


def _paths(job_id: str) -> tuple[str, str]:
    address = f"/agent/v1/jobs/{job_id}/attempts/1"
    return f"{address}/reports", f"{address}/files"


@pytest.fixture(scope="module")
def stolen(stoker: Any, training: str) -> Stolen:
    environments = [
        Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in stoker.machine(training)
    ]
    token = next(
        item.removeprefix(b"STOKER_TOKEN=").decode()
        for environment in environments
        for item in environment
        if item.startswith(b"STOKER_TOKEN=")
    )
    with stoker.services.store.transaction() as tx:
        secret = tx.attempt(training, 1).secret.reveal()
    answer = _ask(stoker, _paths(training)[1], secret, b'{"get": ["dataset"]}', "x")
    assert answer.status_code == 200, "the thief can do what the agent can"
    return Stolen(token, secret, answer.json()["get"]["dataset"]["url"])


def _secrets(settings: Settings) -> dict[str, bytes]:
    """What must never be on somebody else's machine."""
    password = settings.database_url.reveal().split("://")[1].split(":")[1].split("@")[0]
    broker = settings.redis_url.reveal().split("://:")[1].split("@")[0]
    known = {
        "the Vast account's key": settings.vast_api_key.reveal(),
        "Civitai's key": settings.civitai_api_key.reveal(),
        "the S3 secret": settings.s3_secret_key.reveal(),
        "the database's password": password,
        "Redis' password": broker,
        "the key for secrets at rest": settings.secret_keys[0].reveal(),
        "Hugging Face's key": settings.huggingface_token.reveal(),
        "the secret of Vast's notifications": settings.vast_webhook_secret.reveal(),
    }
    assert all(len(value) >= 12 for value in known.values())
    return {name: value.encode() for name, value in known.items()}


def test_no_secret_of_ours_is_on_a_machine_that_trains(
    stoker: Any, training: str, listener: Any
) -> None:
    (instance,) = stoker.instances(training)
    processes = stoker.machine(training)
    assert len(processes) >= 3, "supervisor, agent, trainer"
    printed = stoker.services.provider.logs(instance.id)
    seen = {
        "what the container printed": printed.encode(),
        "what it was created with": _created_with(stoker.services.settings, instance.id),
    }
    assert b"STOKER_TOKEN" in seen["what it was created with"]
    for pid in processes:
        for part in ("environ", "cmdline"):
            with contextlib.suppress(OSError):
                seen[f"{part} of {pid}"] = Path(f"/proc/{pid}/{part}").read_bytes()
    assert any(b"STOKER_TOKEN=" in content for content in seen.values()), "the search can find"
    files = [path for path in stoker.machine_folder(instance).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in [*files, *(stoker.stage.root / "sandbox" / "logs").glob("*")]:
        with contextlib.suppress(OSError):
            seen[str(path)] = path.read_bytes()

    secrets = _secrets(stoker.services.settings)
    secrets["the customer's webhook secret"] = listener.secret.encode()
    assert _found(secrets, seen) == []


def _created_with(settings: Settings, instance_id: str) -> bytes:
    """What Vast, its page and the host are shown of the create call: environment, start script."""
    url = f"{settings.vast_url}/api/v0/instances/{instance_id}/?owner=me&api_key="
    row = requests.get(url + settings.vast_api_key.reveal(), timeout=20).json()["instances"]
    return json.dumps(
        [row[key] for key in ("extra_env", "onstart", "image_args", "label")]
    ).encode()


def _found(secrets: dict[str, bytes], seen: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {where}"
        for name, secret in secrets.items()
        for where, content in seen.items()
        if secret in content
    ]


def test_the_agents_own_secrets_are_not_in_its_trainers_environment(
    stoker: Any, training: str
) -> None:
    """Only the processes that boot the machine were given them."""
    trainers = [
        pid
        for pid in stoker.machine(training)
        if b"gpu_agent.lora" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert trainers
    for pid in trainers:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"STOKER_TOKEN=" not in environment
        assert b"CONTAINER_API_KEY=" not in environment


def test_logs_hold_no_secret(stoker: Any, training: str, listener: Any, stolen: Stolen) -> None:
    logs = sorted((stoker.stage.root / "logs").glob("*.log"))
    assert {"web", "worker", "beat", "sandbox"} <= {path.stem for path in logs}
    secrets = _secrets(stoker.services.settings) | _the_jobs_own(stolen, listener)
    assert _found(secrets, {path.name: path.read_bytes() for path in logs}) == []


def _the_jobs_own(stolen: Stolen, listener: Any) -> dict[str, bytes]:
    """What the machine or the customer has, and nobody else is to have."""
    return {
        "the machine's token": stolen.token.encode(),
        "the attempt's secret": stolen.secret.encode(),
        "the customer's webhook secret": listener.secret.encode(),
        "a presigned address": stolen.dataset_url.partition("Signature=")[2][:64].encode(),
    }


def test_no_row_of_the_database_shows_a_secret(
    stoker: Any, training: str, listener: Any, stolen: Stolen
) -> None:
    """Events, webhooks owed, deliveries, attempts …: all rows of all tables, as text."""
    seen: dict[str, bytes] = {}
    with psycopg.connect(stoker.services.settings.database_url.reveal()) as connection:
        for table in schema.metadata.sorted_tables:
            every = sql.SQL("SELECT t::text FROM {} t").format(sql.Identifier(table.name))
            seen[table.name] = "\n".join(text for (text,) in connection.execute(every)).encode()
    assert all(training.encode() in seen[name] for name in ("events", "outgoing", "attempts"))
    secrets = _secrets(stoker.services.settings) | _the_jobs_own(stolen, listener)
    assert _found(secrets, seen) == []


def test_what_customers_are_told_holds_no_secret(
    stoker: Any, training: str, listener: Any, stolen: Stolen
) -> None:
    assert listener.has("job.training")
    seen = {
        "its webhooks": json.dumps(listener.got).encode(),
        "the job": json.dumps(stoker.show(training)).encode(),
        "its events": json.dumps(
            stoker.client.get(f"/v1/jobs/{training}/events?limit=1000")
        ).encode(),
    }
    secrets = _secrets(stoker.services.settings) | _the_jobs_own(stolen, listener)
    assert _found(secrets, seen) == []


def test_an_address_opens_its_own_object_and_only_to_be_read(stolen: Stolen) -> None:
    """That a secret signs for no other job is held where two jobs cost nothing to make."""
    url, own = stolen.dataset_url, "datasets/"
    assert requests.get(url, timeout=20).status_code == 200
    for other in ("jobs/", "bases/", "datasets/ds_other/"):
        assert requests.get(url.replace(own, other, 1), timeout=20).status_code == 403
    assert requests.put(url, data=b"x", timeout=20).status_code == 403
    assert requests.delete(url, timeout=20).status_code == 403


def test_a_cancel_ends_the_training_and_gives_the_machine_back(
    stoker: Any, training: str, until: Callable[..., Any]
) -> None:
    processes = stoker.machine(training)
    (instance,) = stoker.instances(training)

    stoker.client.post(f"/v1/jobs/{training}/cancel")

    assert stoker.ended(training)["status"] == "cancelled"
    stoker.given_back(training)
    until(lambda: not any(is_running(pid) for pid in processes), "agent and trainer are gone")
    assert not stoker.machine_folder(instance).exists()
    assert len(stoker.leases(training)) == 1


def test_after_the_end_what_was_stolen_is_worth_nothing(
    stoker: Any, training: str, stolen: Stolen
) -> None:
    assert stoker.job(training).terminal
    before, events = stoker.job(training), len(_events(stoker, training))
    reports, files = _paths(training)
    report = wire.Report(
        job=training, attempt=1, seq=10**6, type=wire.Fact.WEIGHTS_UPLOADED, at=time.time()
    )
    body = report.to_bytes()
    assert _ask(stoker, reports, stolen.secret, body, report.webhook_id).status_code == 410
    assert _ask(stoker, files, stolen.secret, b'{"get": ["dataset"]}', "x").status_code == 410
    hello = {"token": stolen.token, "nonce": "somebody-elses", "version": wire.VERSION}
    answer = requests.post(f"{stoker.stage.url}/agent/v1/hello", json=hello, timeout=20)
    assert answer.status_code in (401, 410)
    assert (stoker.job(training), len(_events(stoker, training))) == (before, events)


def _events(stoker: Any, job_id: str) -> list[Any]:
    with stoker.services.store.transaction() as tx:
        return list(tx.events(job_id, limit=100_000))
