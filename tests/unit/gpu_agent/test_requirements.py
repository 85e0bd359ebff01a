"""What is there is kept; what is missing is installed by the versions that were tried."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path

import pytest

from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.methods.lora import Lora
from gpu_agent.methods.requirements import constraints, install, missing

REPOSITORY = Path(__file__).parents[3]


def image(**versions):
    return lambda name: versions.get(name)


@pytest.mark.parametrize(
    ("requirement", "version", "satisfied"),
    [
        ("torch>=2.6", "2.13.0+cpu", True),
        ("torch>=2.6", "2.6.0a0+git1234", True),
        ("torch>=2.6", "2.5.1", False),
        ("transformers>=5,<6", "5.23.0", True),
        ("transformers>=5,<6", "6.0.0", False),
        ("transformers>=5,<6", "4.57", False),
        ("diffusers==0.42.1", "0.42.1", True),
        ("diffusers==0.42.1", "0.42.10", False),
        ("numpy>=2", "2", True),
        ("numpy>=2.0.0", "2", True),
        ("numpy", "1.0", True),
        ("numpy>=2", None, False),
        ("numpy>=2", "unknown", False),
    ],
)
def test_a_version_is_compared_as_numbers(requirement, version, satisfied):
    name = requirement.partition(">")[0].partition("=")[0]
    assert (missing([requirement], image(**{name: version})) == []) is satisfied


def test_what_is_satisfied_installs_nothing(tmp_path):
    done = install(
        ["torch>=2.6"],
        work=tmp_path,
        halt=Halt(),
        on_text=print,
        moved=print,
        python=["/no/such/python"],
        version_of=image(torch="2.13.0"),
    )
    assert done == []


def test_the_images_torch_is_pinned_to_its_very_build():
    lines = constraints(image(torch="2.13.0+cu126", torchvision="0.28.0+cu126")).splitlines()
    assert "torch==2.13.0+cu126" in lines
    assert "torchvision==0.28.0+cu126" in lines
    assert not any(line.startswith("torchaudio") for line in lines)


def test_the_constraints_name_no_torch_and_only_exact_versions():
    lines = (REPOSITORY / "gpu_agent" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert not any(line.startswith(("torch", "triton", "nvidia")) for line in pins)


def test_every_requirement_has_a_tried_version_that_satisfies_it():
    tried = dict(
        line.split("==")
        for line in (REPOSITORY / "gpu_agent" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert missing(Lora.requirements, image(**tried, torch="2.13.0")) == []


def test_the_trainers_requirements_are_those_of_the_extra():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert sorted(Lora.requirements) == sorted(project["project"]["optional-dependencies"]["train"])


@pytest.fixture
def pip(tmp_path):
    """A python whose pip writes down its arguments and ends as told."""

    def make(script):
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
        path.chmod(0o755)
        return [str(path)]

    make.calls = tmp_path / "calls"
    return make


def run(tmp_path, python, halt=None, moved=lambda amount: None):
    said = []
    install(
        ["accelerate>=1.15", "torch>=2.6"],
        work=tmp_path,
        halt=halt or Halt(),
        on_text=said.append,
        moved=moved,
        python=python,
        version_of=image(torch="2.13.0+cu126"),
    )
    return said


def test_only_what_is_missing_is_installed_under_the_constraints(tmp_path, pip):
    assert run(tmp_path, pip("echo Successfully installed")) == ["pip: Successfully installed"]
    assert pip.calls.read_text().split() == [
        "-m", "pip", "install", "-c", str(tmp_path / "constraints.txt"), "accelerate>=1.15",
    ]  # fmt: skip
    assert "torch==2.13.0+cu126" in (tmp_path / "constraints.txt").read_text()


def test_an_installation_that_works_in_silence_is_seen_to_move(tmp_path, pip):
    moves = []
    run(tmp_path, pip("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"), moved=moves.append)
    assert moves


def test_an_installation_that_hangs_moves_nothing(tmp_path, pip):
    moves, halt = [], Halt()
    threading.Timer(1.0, halt.call, ["enough"]).start()
    with pytest.raises(Halted):
        run(tmp_path, pip("exec sleep 60"), halt=halt, moved=moves.append)
    assert len(moves) <= 1, "its start may count"


def test_an_installation_is_tried_twice_and_then_told(tmp_path, pip):
    with pytest.raises(Fault, match="no matching distribution") as caught:
        run(tmp_path, pip("echo ERROR: no matching distribution; exit 1"))
    assert (caught.value.code, caught.value.retryable) == ("install.failed", True)
    assert len(pip.calls.read_text().splitlines()) == 2


def test_an_installation_ends_when_the_work_does(tmp_path, pip):
    halt = Halt()
    halt.call("cancel")
    with pytest.raises(Halted):
        run(tmp_path, pip("sleep 600"), halt)
