"""Bytes that agents and servers in the field speak. These files are never edited, only added."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gpu_agent.wire import (
    Download,
    Fact,
    JobSpec,
    Order,
    Report,
    SignatureError,
    answer_to_bytes,
    orders_from_bytes,
    sign,
    verify,
)

GOLDEN = Path(__file__).parent / "golden"
#: `whsec_` and the base64 of the bytes 0 to 31: for tests alone.
SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

REPORTS = {
    "report-gpu-ready": Report(
        job="job_01k6", attempt=1, seq=1, type=Fact.GPU_READY, at=1795348800.25,
        data={"device": "cuda", "gpu": "NVIDIA GeForce RTX 4090", "gpus": 1, "vram_mib": 24564},
    ),
    "report-progress": Report(
        job="job_01k6", attempt=2, seq=17, type=Fact.TRAINING_PROGRESS, at=1795348900.5,
        data={
            "step": 30, "total": 200, "loss": 0.0875, "lr": 0.0001, "steps_per_s": 4.5,
            "eta_s": 37.8, "points": [[29, 0.09, 0.0001], [30, 0.0875, 0.0001]],
        },
    ),
    "report-error": Report(
        job="job_01k6", attempt=2, seq=18, type=Fact.ERROR, at=1795348901.0,
        data={
            "code": "trainer.oom", "message": "zu wenig Speicher \u2013 \u4e0d\u591f",
            "retryable": True, "log_tail": ["CUDA out of memory"],
        },
    ),
    "report-uploaded": Report(
        job="job_01k6", attempt=2, seq=40, type=Fact.WEIGHTS_UPLOADED, at=1795349000.0,
        data={
            "files": [{"name": "lora.safetensors", "bytes": 3_226_184, "sha256": "ab" * 32}],
            "best_step": 150, "loss_first": 1.0125, "loss_best": 0.4375, "label": "validation",
        },
    ),
}  # fmt: skip

SPEC = JobSpec(
    job="job_01k6",
    attempt=2,
    dataset=Download(
        url="https://s3/d?X-Amz-Signature=0", name="dataset.zip", bytes=52428800, sha256="cd" * 32
    ),
    base=Download(url="https://cdn/m", name="base.safetensors", bytes=2132696762, sha256=""),
    base_family="sd1",
    method="lora",
    recipe={"steps": 200, "rank": 16, "trigger": "sks dog"},
    secret=SECRET,
    report_url="https://stoker.example.com/agent/v1/jobs/job_01k6/attempts/2/reports",
    files_url="https://stoker.example.com/agent/v1/jobs/job_01k6/attempts/2/files",
    lease_ends_at=1795392000.0,
    resume=(
        Download(
            url="https://s3/c", name="checkpoints/100-a1b2c3/state", bytes=9, sha256="ef" * 32
        ),
    ),
)


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_written_as_ever(name):
    assert REPORTS[name].to_bytes() == golden(name)


@pytest.mark.parametrize("name", REPORTS)
def test_reports_of_old_agents_are_understood(name):
    assert Report.from_bytes(golden(name)) == REPORTS[name]


def test_the_job_spec_is_written_as_ever():
    assert SPEC.to_bytes() == golden("job-spec")


def test_a_job_that_wants_a_fast_machine_is_written_as_ever():
    picky = dataclasses.replace(SPEC, min_download_mbps=25.0)
    assert picky.to_bytes() == golden("job-spec-fast")
    assert JobSpec.from_bytes(golden("job-spec-fast")) == picky


def test_the_job_spec_of_an_old_server_is_understood():
    assert JobSpec.from_bytes(golden("job-spec")) == SPEC


def test_a_newer_writer_may_say_more():
    spec = {**json.loads(golden("job-spec")), "colour": "blue"}
    spec["dataset"]["etag"] = "x"
    assert JobSpec.from_bytes(json.dumps(spec).encode()) == SPEC
    report = {**json.loads(golden("report-progress")), "mood": "good"}
    assert Report.from_bytes(json.dumps(report).encode()) == REPORTS["report-progress"]


def test_answers_are_written_and_read_as_ever():
    assert answer_to_bytes([]) == golden("answer-none")
    assert answer_to_bytes([Order.CHECKPOINT_NOW, Order.CANCEL]) == golden("answer-orders")
    assert orders_from_bytes(golden("answer-none")) == []
    assert orders_from_bytes(golden("answer-orders")) == [Order.CHECKPOINT_NOW, Order.CANCEL]


@pytest.mark.parametrize("name", REPORTS)
def test_signatures_are_made_as_ever(name):
    report = REPORTS[name]
    headers = sign(
        report.to_bytes(), secrets=[SECRET], webhook_id=report.webhook_id, at=1795348999.9
    )
    assert headers == json.loads(golden("signatures"))[name]


@pytest.mark.parametrize("name", REPORTS)
def test_old_signatures_are_accepted_in_their_time_only(name):
    headers = json.loads(golden("signatures"))[name]
    body = golden(name)
    for now in (1795348999.0, 1795348999.0 + 300, 1795348999.0 - 300):
        assert verify(body, headers, secrets=[SECRET], now=now) == REPORTS[name].webhook_id
    for now in (1795348999.0 + 301, 1795348999.0 - 301):
        with pytest.raises(SignatureError, match="300 s"):
            verify(body, headers, secrets=[SECRET], now=now)


def test_every_fact_and_order_keeps_its_spelling():
    spelled = json.loads(golden("vocabulary"))
    assert set(spelled["facts"]) <= {str(fact) for fact in Fact}
    assert set(spelled["orders"]) <= {str(order) for order in Order}


@pytest.mark.parametrize("name", ["job-spec", "report-progress", "answer-orders"])
def test_the_page_shows_these_very_bytes(name):
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    assert golden(name).decode() in page
    assert json.loads(golden("signatures"))["report-progress"]["webhook-signature"] in page


def test_the_page_knows_every_fact_and_order():
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    assert [word for word in (*Fact, *Order) if f"`{word}`" not in page] == []
