"""A rented machine while it trains: what it knows of us, and what becomes of it on a cancel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings
from orchestrator.cli.stage import is_running

ENDLESS = 100_000


@pytest.fixture(scope="module")
def training(stoker: Any, until: Callable[..., Any]) -> str:
    """A job that trains on its machine."""
    recipe = {"steps": ENDLESS, "resolution": 64, "validation_every": 10}
    job_id = stoker.order(recipe=recipe)
    until(lambda: stoker.job(job_id).progress.get("checkpoint"), "a first checkpoint", 120.0)
    return str(job_id)


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
    }
    assert all(len(value) >= 12 for value in known.values())
    return {name: value.encode() for name, value in known.items()}


def test_no_secret_of_ours_is_on_a_machine_that_trains(stoker: Any, training: str) -> None:
    (instance,) = stoker.instances(training)
    processes = stoker.machine(training)
    assert len(processes) >= 3, "supervisor, agent, trainer"
    printed = stoker.services.provider.logs(instance.id)
    seen = {"what the container printed": printed.encode()}
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

    found = [
        f"{name} in {where}"
        for name, secret in _secrets(stoker.services.settings).items()
        for where, content in seen.items()
        if secret in content
    ]

    assert found == []


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


def test_logs_hold_no_secret(stoker: Any, training: str) -> None:
    logs = sorted((stoker.stage.root / "logs").glob("*.log"))
    assert {"web", "worker", "beat", "sandbox"} <= {path.stem for path in logs}
    found = [
        f"{name} in {path.name}"
        for name, secret in _secrets(stoker.services.settings).items()
        for path in logs
        if secret in path.read_bytes()
    ]
    assert found == []


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
