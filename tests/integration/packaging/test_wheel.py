"""What `pip install stoker` brings: everything the server needs, and nothing of the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
import requests

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("orchestrator", "tasks", "infra", "state", "gpu_agent")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*PACKAGES, "tests"):
        skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(REPOSITORY / name, copy / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An empty environment with the wheel in it; its dependencies are borrowed from ours."""
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install"]
    subprocess.run(
        [*pip, "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)],
        check=True,
        capture_output=True,
    )
    # as text, not by addsitedir: the .pth of our own editable install must not be read
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home


@pytest.fixture
def ran(installed, tmp_path):
    """Runs a program of the environment, away from the checkout and with nothing set."""

    def run(program, *arguments):
        return subprocess.run(
            [installed / "bin" / program, *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def test_the_wheel_holds_every_module_and_every_file_beside_them(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here <= names
    assert "infra/migrations/env.py" in names
    assert "infra/docker/onstart.sh.tmpl" in names
    assert any(name.startswith("infra/migrations/versions/0001") for name in names)
    assert any(name.startswith("gpu_agent/lora/configs/") for name in names)


def test_the_wheel_holds_no_test_and_no_secret(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if Path(name).name.startswith((".env", ".stoker"))]


def test_the_installed_command_line_runs(ran):
    helped = ran("stoker", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "doctor" in helped.stdout


def test_the_installed_doctor_names_what_is_missing(ran):
    said = ran("stoker", "doctor")
    assert said.returncode == 3, said.stderr
    lines = {line.split()[1]: line for line in said.stdout.splitlines()}
    assert "DATABASE_URL is not set" in lines["database"]
    assert "VAST_API_KEY is not set" in lines["vast"]
    assert all("; mend: " in line for line in lines.values() if line.startswith("✘"))


def test_the_installed_server_finds_what_it_serves(ran):
    """The web application's module, the migrations, and the agent that machines fetch."""
    said = ran(
        "python",
        "-c",
        "import orchestrator.wsgi, infra.migrations as m, infra.agent_bundle as a\n"
        "print(orchestrator.__file__, m.newest(), len(a.build_bundle().bytes) > 10_000,"
        " len(a.onstart_script('https://x.test', '0' * 64)) > 500)",
    )
    assert said.returncode == 0, said.stderr
    where, revision, *rest = said.stdout.split()
    assert not where.startswith(str(REPOSITORY))
    assert revision
    assert rest == ["True", "True"]


@pytest.mark.slow
def test_the_installed_server_serves(installed, tmp_path):
    """Web, worker and beat from the wheel alone, with servers of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nowhere = {"VAST_API_KEY": "none", "VAST_URL": "http://127.0.0.1:9"}
    with subprocess.Popen(
        [installed / "bin" / "stoker", "up", "--bind", f"127.0.0.1:{port}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **nowhere},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            parts = _ready(port, process)
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert set(parts) == {"database", "redis", "s3", "worker", "beat"}
    assert process.returncode == 0


def _ready(port, process):
    """The parts of `/readyz` once all are well."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
            if answer.status_code == 200:
                return answer.json()["parts"]
        time.sleep(0.1)
    raise AssertionError("the installed server did not get ready")


@pytest.mark.parametrize("package", ["orchestrator", "tasks", "infra", "state"])
def test_the_server_never_imports_torch(ran, package):
    code = (
        f"import importlib, pkgutil, sys, {package}\n"
        f"for found in pkgutil.walk_packages({package}.__path__, '{package}.'):\n"
        "    if not found.name.endswith('__main__') and 'migrations.' not in found.name:\n"
        "        importlib.import_module(found.name)\n"
        "heavy = {'torch', 'diffusers', 'peft', 'transformers', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    said = ran("python", "-c", code)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == "[]"
