"""The demo, run as a user runs it, and as users mistreat it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.app import make_app
from orchestrator.cli.console import CliError
from orchestrator.cli.stage import free_port

ENDLESS = ("--steps", "100000")


@pytest.fixture(scope="module")
def killed(start_demo: Callable[..., Any], until: Callable[..., Any]) -> Any:
    """A demo that got SIGKILL while it trained."""
    demo = start_demo(*ENDLESS)
    demo.until_training()
    demo.process.kill()
    demo.process.wait()
    return demo


@pytest.fixture(scope="module")
def whole(start_demo: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """The demo as it is meant to be run; with --slow, where another was killed before."""
    if request.config.getoption("--slow"):
        request.getfixturevalue("killed")
    demo = start_demo("--once", "--json")
    code, output = demo.end()
    assert code == 0, f"{output}\n{demo.words()}"
    demo.report = json.loads(output)
    return demo


@pytest.mark.slow
def test_a_sigkill_takes_all_that_the_demo_started(killed: Any, until: Callable[..., Any]) -> None:
    assert len(killed.seen) > 10, "servers, web, worker, beat, sandbox, machine, agent, trainer"
    until(lambda: not killed.left(), "all processes are gone", 30.0)


def test_the_demo_trains_uploads_and_cleans_up(whole: Any) -> None:
    report = whole.report
    assert report["faults"] == []
    assert [report["transitions"][0]["from"], *(step["to"] for step in report["transitions"])] == [
        "pending", "pendingGpu", "pendingImages", "pendingModel", "training", "completed",
    ]  # fmt: skip
    assert report["instances_left"] == report["processes_left"] == report["files_left"] == []
    assert whole.files() == []


def test_the_demos_best_loss_is_at_least_40_per_cent_lower(whole: Any) -> None:
    loss = whole.report["loss"]
    assert loss["best"] <= 0.6 * loss["first"]


def test_the_demos_weights_load_in_diffusers_and_change_the_image(whole: Any) -> None:
    loads = whole.report["loads"]
    assert loads["loads"]
    assert loads["kohya_loads"]
    assert loads["changed"] > 0
    weights = Path(whole.report["weights"]["path"])
    assert weights.is_relative_to(whole.folder / "output")
    assert weights.stat().st_size > 10_000


def test_the_demos_webhooks_come_verified_and_in_order(whole: Any) -> None:
    webhooks = whole.report["webhooks"]
    assert webhooks["unverified"] == 0
    assert webhooks["in_order"]
    assert [kind for kind in webhooks["types"] if kind not in ("job.progress", "job.sample")] == [
        "job.pending_gpu", "job.pending_images", "job.pending_model", "job.training",
        "job.completed",
    ]  # fmt: skip


@pytest.mark.slow
def test_one_demo_at_a_time_that_commands_find_and_ctrl_c_ends_whole(
    whole: Any, start_demo: Callable[..., Any], until: Callable[..., Any]
) -> None:
    first = start_demo(*ENDLESS)
    first.until_training()

    second = start_demo("--once", "--json")
    code, output = second.end(60.0)
    error = json.loads(output)["error"]
    assert code == 1
    assert error["what"] == "a demo runs here already"
    assert str(first.process.pid) in error["why"]
    assert first.process.poll() is None, "the second must not disturb the first"

    listed = first.beside("ps", "--json")
    assert [job["status"] for job in json.loads(listed)] == ["training"]

    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal does
    code, _ = first.end(60.0)
    assert code == 130
    assert "Traceback" not in first.words()
    until(lambda: not first.left(), "all processes are gone", 5.0)
    assert first.files() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_demo_that_is_ended_while_it_starts_leaves_nothing_running(
    start_demo: Callable[..., Any], until: Callable[..., Any], number: signal.Signals
) -> None:
    demo = start_demo("--once")
    demo.until_said("tiny base model: being made")

    os.killpg(demo.process.pid, number)

    code, _ = demo.end(60.0)
    assert code == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in demo.words()
    until(lambda: not demo.left(), "all processes are gone", 30.0)


@pytest.mark.slow
def test_photographs_that_are_none_fail_the_demo_and_it_says_which(
    start_demo: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "holiday.jpg").write_text("Dear diary")
    demo = start_demo(str(tmp_path), "--once", "--json")

    code, output = demo.end()

    assert code == 1
    report = json.loads(output)
    assert report["status"] == "failed"
    assert report["reason"]["code"] == "dataset.refused"
    assert "holiday.jpg" in report["reason"]["message"]
    assert report["instances_left"] == report["processes_left"] == report["files_left"] == []


# --- refused before anything is started ---------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CliError]:
    monkeypatch.setenv("STOKER_DATA", str(tmp_path / "data"))

    def run(*args: str) -> CliError:
        port = ("--port", str(free_port()))  # the usual one may be taken, by a Stoker of yours
        result = CliRunner().invoke(make_app(), ["demo", *port, *args])
        assert isinstance(result.exception, CliError), result
        assert list((tmp_path / "data").rglob("*/*")) == [], "nothing was made"
        return result.exception

    return run


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_named_with_a_way_out(
    refused: Callable[..., CliError], listener: int
) -> None:
    error = refused("--port", str(listener))
    assert error.what == f"port {listener} is taken"
    assert "--port" in error.then


def test_a_nearly_full_disk_is_refused_before_it_is_full(
    refused: Callable[..., CliError], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**11, 10**11, 10**6))
    error = refused()
    assert error.what == "the disk is nearly full"
    assert "STOKER_DATA" in error.then


def test_an_empty_folder_is_refused(refused: Callable[..., CliError], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    error = refused(str(tmp_path / "photos"))
    assert "holds no photograph" in error.what
    assert error.code == 2


def test_a_folder_that_is_not_there_is_refused(
    refused: Callable[..., CliError], tmp_path: Path
) -> None:
    error = refused(str(tmp_path / "nowhere"))
    assert "nowhere" in error.what
    assert error.code == 2
