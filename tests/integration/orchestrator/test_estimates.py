"""Asking what a training would cost, as a customer asks."""

from __future__ import annotations

import dataclasses

import pytest

from infra.provider_memory import Fault, MemoryProvider
from infra.settings import SettingsError
from orchestrator.api.estimates import Estimate
from orchestrator.app import create_app
from state import brakes
from state.errors import Throttled, Unreadable
from state.events import DatasetStatus
from state.memory import MemoryStore
from state.offer import Offer


@pytest.fixture
def store():
    return MemoryStore()


def offer(number, **changes):
    fields = {
        "id": str(number),
        "machine_id": f"m{number}",
        "gpu_name": "RTX 4090",
        "num_gpus": 1,
        "vram_gb": 24.0,
        "price": 400_000 + number,
        "storage_price": 10_000,
        "download_price": 0,
        "upload_price": 0,
        "download_mbps": 800.0,
        "upload_mbps": 800.0,
        "reliability": 0.99,
        "verified": True,
        "cuda": 12.8,
        "disk_gb": 100.0,
    }
    return Offer(**{**fields, **changes})


@pytest.fixture
def market(edge):
    return MemoryProvider(edge.clock, [offer(number) for number in range(1, 9)])


@pytest.fixture
def client(edge, market):
    edge.deps = dataclasses.replace(edge.deps, market=lambda: market)
    edge.app = create_app(edge.deps)
    return edge.client()


@pytest.fixture
def live(edge):
    """Headers of a key that spends money."""
    return edge.key("alice")


def kept(edge):
    with edge.store.transaction() as tx:
        return tx.list_jobs(), tx.open_leases()


def test_an_estimate_without_photographs(edge, client, live):
    answer = client.post("/v1/jobs/estimate", json={"base": "civitai:1"}, headers=live)
    assert answer.status_code == 200, answer.text
    found = answer.json
    Estimate.model_validate(found)
    price, time = found["price"], found["time"]
    assert price["low"] <= price["likely"] <= price["high"] <= 5_000_000
    assert price["display"].startswith("$0.")
    assert time["low_s"] <= time["likely_s"] <= time["high_s"]
    assert found["candidates"][0]["expected_cost"] == price["likely"]
    assert len(found["candidates"]) == 5
    assert found["offers_fit"] == 8
    assert found["cap"]["suffices"]
    assert found["memory"]["least_gb"] > 1
    assert found["no_offer"] is None
    assert any("photographs" in words for words in found["assumed"])
    assert found["sentences"][0].startswith("It is expected to cost")
    assert kept(edge) == ([], [])


def test_a_dry_run_is_an_order_that_orders_nothing(edge, client, live):
    body = {"base": "civitai:1", "dataset_id": edge.dataset().id, "recipe": {"steps": 50}}
    headers = {**live, "Idempotency-Key": "k1"}
    dry = client.post("/v1/jobs?dry_run=true", json=body, headers=headers)
    assert dry.status_code == 200, dry.text
    Estimate.model_validate(dry.json)
    assert not any("photographs" in words for words in dry.json["assumed"])
    assert kept(edge) == ([], [])
    # nor does it use up the key
    real = client.post("/v1/jobs", json=body, headers=headers)
    assert real.status_code == 202
    assert "Idempotent-Replayed" not in real.headers
    again = client.post("/v1/jobs?dry_run=false", json=body, headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize(
    ("more", "pointer"),
    [
        ({"recipe": {"stepz": 1}}, "/recipe/stepz"),
        ({"base": "nonsense"}, "/base"),
        ({"gpu": {"gpu_names": ["RTX 3060"], "min_vram_gb": 40}}, "/gpu/gpu_names"),
        ({"webhook": {"url": "ftp://x"}}, "/webhook/url"),
        ({"max_cost": 0}, "/max_cost"),
        ({"dataset_id": "ds_unknown"}, "/dataset_id"),
    ],
)
def test_what_an_order_refuses_an_estimate_refuses_alike(
    edge, client, live, problem, more, pointer
):
    body = {"base": "civitai:1", "dataset_id": edge.dataset().id, **more}
    for path in ("/v1/jobs/estimate", "/v1/jobs?dry_run=true", "/v1/jobs"):
        refused = problem(client.post(path, json=body, headers=live), 422)
        assert pointer in [fault["pointer"] for fault in refused["errors"]], path


def test_photographs_that_are_no_use_are_refused_as_by_the_order(edge, client, live, problem):
    refused = edge.dataset(status=DatasetStatus.REFUSED)
    body = {"base": "civitai:1", "dataset_id": refused.id}
    for path in ("/v1/jobs/estimate", "/v1/jobs?dry_run=true", "/v1/jobs"):
        problem(client.post(path, json=body, headers=live), 409, "conflict")
    body["dataset_id"] = edge.dataset("bob").id
    problem(client.post("/v1/jobs/estimate", json=body, headers=live), 422, "unknown_dataset")


def test_what_is_no_estimates_field_is_refused(client, live, problem):
    for more in ({"imagez": 3}, {"images": 0}, {"bytes": -1}):
        body = {"base": "civitai:1", **more}
        problem(client.post("/v1/jobs/estimate", json=body, headers=live), 422)
    problem(client.post("/v1/jobs?dry=1", json={"base": "civitai:1"}, headers=live), 422)


@pytest.mark.parametrize(
    ("error", "pause"), [(Unreadable("garbage"), "10"), (Throttled("wait", retry_after=42), "42")]
)
def test_a_market_that_cannot_be_read_is_a_503(client, market, live, problem, error, pause):
    market.faults = lambda verb: Fault(error=error)
    answer = client.post("/v1/jobs/estimate", json={"base": "civitai:1"}, headers=live)
    problem(answer, 503, "market_unavailable")
    assert answer.headers["Retry-After"] == pause


def test_a_server_without_a_market_says_so(edge, live, problem):
    def none():
        raise SettingsError("VAST_API_KEY is not set; Vast.ai shows it under Account")

    edge.app = create_app(dataclasses.replace(edge.deps, market=none))
    answer = edge.client().post("/v1/jobs/estimate", json={"base": "civitai:1"}, headers=live)
    assert "VAST_API_KEY" in problem(answer, 503, "market_unset")["detail"]


def test_what_would_hold_it_and_what_no_offer_meets_is_said(edge, client, live):
    with edge.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="a drill", now=edge.clock())
    body = {"base": "civitai:1", "gpu": {"max_price": 100_000}}
    found = client.post("/v1/jobs/estimate", json=body, headers=live).json
    assert (found["price"], found["time"], found["candidates"]) == (None, None, [])
    assert found["offers_refused"] == {"for their price": 8}
    assert "no offer meets the needs" in found["no_offer"]
    assert [item["code"] for item in found["brakes"]] == ["kill_switch.on"]


def test_it_needs_a_key_that_may_order(edge, client, problem):
    body = {"base": "civitai:1"}
    problem(client.post("/v1/jobs/estimate", json=body), 401)
    reader = edge.key("alice", "jobs:read")
    problem(client.post("/v1/jobs/estimate", json=body, headers=reader), 403)
