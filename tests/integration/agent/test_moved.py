"""What tells work that goes on from work that does not."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

COUNTED = ("images.progress", "model.progress", "training.progress", "heartbeat")


def counts(stoker: Any) -> list[int]:
    return [report.data["moved"] for report in stoker.reports if report.type in COUNTED]


def test_a_job_that_goes_on_counts_more_and_more(stoker: Any, start: Any) -> None:
    stoker.spec["heartbeat_s"] = 0.1
    assert start().join() == 0
    told = counts(stoker)
    assert len(set(told)) > 3
    pulled = sum(map(len, (stoker.objects["dataset"], stoker.objects["base"])))
    assert max(told) > pulled


def test_a_trainer_that_is_frozen_moves_nothing_though_heartbeats_come(
    stoker: Any, start: Any, until: Any
) -> None:
    stoker.spec["heartbeat_s"] = 0.05
    start(
        """
        say("started", total=10**6, pid=os.getpid())
        for step in range(1, 10**6):
            say("progress", step=step, total=10**6)
            time.sleep(0.02)
        """
    )
    until(lambda: stoker.has("training.progress"))
    os.kill(stoker.report("training.started").data["pid"], signal.SIGSTOP)
    until(lambda: len(set(counts(stoker)[-6:])) == 1)
    still = counts(stoker)[-1]
    heard = len(counts(stoker))
    until(lambda: len(counts(stoker)) >= heard + 5)
    assert counts(stoker)[-1] == still
    os.kill(stoker.report("training.started").data["pid"], signal.SIGCONT)
    until(lambda: counts(stoker)[-1] > still)


def test_a_log_that_babbles_holds_no_heartbeat_up(stoker: Any, start: Any, until: Any) -> None:
    stoker.spec |= {"heartbeat_s": 0.2, "progress_s": 0.02}
    start(
        """
        say("started", total=1)
        while True:
            print("step?", flush=True)
            time.sleep(0.01)
        """
    )
    until(lambda: stoker.facts().count("heartbeat") >= 3)
    assert stoker.facts().count("log.lines") > stoker.facts().count("heartbeat")


def test_a_host_that_is_too_slow_is_told_of_before_the_download_is_through(
    stoker: Any, start: Any, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an hour's worth of download on the line that the sandbox pretends; its window is 20 s long
    monkeypatch.setattr("gpu_agent.pull.RATE_WINDOW_S", 1.0)
    monkeypatch.setenv("STOKER_SANDBOX", "1")
    monkeypatch.setenv("STOKER_SANDBOX_DOWNLOAD_MBPS", "2")
    stoker.offer(base=files.safetensors(tensors=2, floats=1_000_000))
    stoker.spec["min_download_mbps"] = 20.0
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("host.slow", True)
    assert not stoker.has("model.ready")


def test_the_server_learns_how_fast_the_downloads_were(stoker: Any, start: Any) -> None:
    assert start().join() == 0
    for fact in ("images.ready", "model.ready"):
        said = stoker.report(fact).data
        assert said["seconds"] >= 0
        assert said["mbps"] > 0
