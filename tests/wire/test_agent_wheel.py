"""The agent is a program of its own: its wheel installs and runs where the server is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CLEAN = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling itself: the environment is there, and nothing is fetched for an isolated one
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY / "gpu_agent",
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_all_of_the_agent_and_nothing_of_the_server(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if not name.startswith("stoker_gpu_agent-")}
    assert all(name.startswith("gpu_agent/") for name in modules)
    here = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "gpu_agent").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "pyproject.toml"
    }
    assert modules == here


def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    python = tmp_path / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution found for requests" in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    run = subprocess.run(
        [tmp_path / "bin" / "stoker-gpu-agent"],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "STOKER_URL is not set" in run.stderr.replace("'", "")
    loaded = subprocess.run(
        [python, "-c", "import sys, gpu_agent.__main__; print(sorted(sys.modules))"],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("torch", "flask", "celery", "sqlalchemy", "boto3", "state", "infra"):
        assert f"'{name}'" not in loaded
