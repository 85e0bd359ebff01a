"""From hello to the machine given back, with a trainer of a few lines."""

from __future__ import annotations

import hashlib


def test_a_job_is_trained_uploaded_and_its_machine_given_back(stoker, start):
    agent = start()
    assert agent.join() == 0
    milestones = stoker.milestones()
    assert milestones[0] == "gpu.ready"
    assert {"images.ready", "model.ready"} < set(milestones[: milestones.index("files.positioned")])
    assert milestones[milestones.index("files.positioned") :] == [
        "files.positioned",
        "training.started",
        "training.progress",
        "training.completed",
        "weights.uploaded",
    ]
    assert stoker.destroyed.is_set()
    uploaded = stoker.report("weights.uploaded").data
    assert uploaded["loss_first"] == 0.9
    assert uploaded["loss_best"] == 0.4
    assert uploaded["best_step"] == 2
    named = {item["name"]: item for item in uploaded["files"]}
    assert stoker.uploads["lora.safetensors"] == b"result"
    assert named["lora.safetensors"] == {
        "name": "lora.safetensors",
        "bytes": 6,
        "sha256": hashlib.sha256(b"result").hexdigest(),
    }
    assert [report.seq for report in stoker.reports] == list(range(1, len(stoker.reports) + 1))


def test_a_job_that_is_over_once_its_weights_are_known_was_done(stoker, start):
    stoker.over_after = "weights.uploaded"
    assert start().join() == 0
    assert stoker.destroyed.is_set()


def test_a_job_that_is_over_before_was_not_done(stoker, start):
    stoker.over_after = "training.completed"
    assert start().join() == 1
    assert stoker.destroyed.is_set()


def test_a_job_passes_through_a_bad_hour(stoker, start, faults):
    """Every door fails several times, each in its own way; the job is done all the same."""
    stoker.faults["hello"] += ["lost", 503]
    stoker.faults["report"] += ["lost", 500, "cut", 502, 429, 404, "lost"] * 2
    stoker.faults["get"] += ["cut", 503, faults.cut_after(100), 403, faults.cut_after(50)]
    stoker.faults["files"] += [503, "cut", "lost"]
    stoker.faults["put"] += ["lost", 500, "cut"]
    assert start().join() == 0
    assert stoker.uploads["lora.safetensors"] == b"result"
    seqs = [report.seq for report in stoker.reports]
    assert seqs == list(range(1, len(seqs) + 1))
    assert stoker.repeats
