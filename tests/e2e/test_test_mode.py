"""Test mode over real servers: a test key, real HTTP, real storage, machines that pretend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.safetensors import read_weights
from orchestrator.cli.client import Client
from orchestrator.cli.jobs import fetch_results, photo_files, upload_dataset
from orchestrator.cli.servers import make_key


def test_a_backend_rehearses_success_and_failure_in_seconds(
    stoker: Any, customer: Any, photos: Path, tmp_path: Path, until: Any
) -> None:
    scopes = frozenset({"jobs:read", "jobs:write"})
    key = make_key(stoker.services, owner="acme", name="ci", scopes=scopes, test=True)
    client = Client(stoker.stage.url, key)
    before = {item.id for item in stoker.instances()}
    dataset = upload_dataset(client, photos, photo_files(photos))
    hook = {"url": customer.url, "secret": customer.secret}

    def order(fixture: str) -> str:
        body = {"dataset_id": dataset, "base": "hf:some/base", "test": {"fixture": fixture}}
        return str(client.post("/v1/jobs", {**body, "webhook": hook})["id"])

    jobs = {name: order(name) for name in ("test_success", "test_host_dies", "test_slow_boot")}
    ended = {name: stoker.ended(job) for name, job in jobs.items()}
    assert {name: job["status"] for name, job in ended.items()} == dict.fromkeys(jobs, "completed")
    assert {name: job["attempt"] for name, job in ended.items()} == {
        "test_success": 1, "test_host_dies": 2, "test_slow_boot": 1,
    }  # fmt: skip

    fetch_results(client, jobs["test_success"], tmp_path)
    weights = tmp_path / "lora.safetensors"
    with weights.open("rb") as stream:
        read_weights(stream, weights.stat().st_size, lambda piece: None)
    sample = next((tmp_path / "samples").iterdir())
    assert sample.read_bytes()[:4] == b"\x89PNG"

    def told() -> set[str]:
        return {item["data"]["job"] for item in customer.got if item["type"] == "job.completed"}

    until(lambda: told() == set(jobs.values()), "the customer was told of each end")
    assert not any(item["data"]["livemode"] for item in customer.got)
    until(lambda: not stoker.services.rehearsals.instances(), "pretended machines are given back")
    assert {item.id for item in stoker.instances()} <= before, "a real machine was rented"
