"""The launcher's parts that decide and explain; set-up itself is tried by every CI run."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("stoker_launcher", str(ROOT / "stoker"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


def test_an_old_python_can_read_the_launcher() -> None:
    ast.parse((ROOT / "stoker").read_text(), feature_version=(3, 8))


def test_launcher_needs_the_standard_library_alone() -> None:
    tree = ast.parse((ROOT / "stoker").read_text())
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names <= sys.stdlib_module_names


def test_launcher_can_be_executed() -> None:
    assert os.access(ROOT / "stoker", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_old_python_gives_way_to_a_newer_one_beside_it(launcher: ModuleType) -> None:
    beside = {"python3.12": "/a/python3.12", "python3.11": "/b/python3.11"}
    assert launcher.find_python((3, 11), beside.get, lambda path: True) is None
    assert launcher.find_python((3, 8), beside.get, lambda path: True) == "/b/python3.11"
    works = "/a/python3.12".__eq__  # the other is a shim that leads nowhere
    assert launcher.find_python((3, 8), beside.get, works) == "/a/python3.12"


def test_old_python_alone_says_so_in_three_lines(launcher: ModuleType) -> None:
    with pytest.raises(launcher.SetupError) as caught:
        launcher.find_python((3, 8), lambda name: None, lambda path: True)
    what, why, hint = caught.value.lines
    assert "3.8" in what
    assert "3.11" in what
    assert why.strip().startswith("why:")
    assert hint.strip().startswith("next:")


def test_set_up_is_done_again_only_when_what_it_is_made_from_changed(
    launcher: ModuleType, tmp_path: Path
) -> None:
    project, pins = tmp_path / "pyproject.toml", tmp_path / "constraints.txt"
    python, done = tmp_path / "python", tmp_path / "done"
    project.write_text("a")
    pins.write_text("b")

    def wanted() -> Any:
        return launcher.fingerprint([project, pins], "3.11")

    assert not launcher.is_installed(python, done, wanted())
    done.write_text(wanted())
    assert not launcher.is_installed(python, done, wanted())
    python.touch()
    assert launcher.is_installed(python, done, wanted())
    assert wanted() != launcher.fingerprint([project, pins], "3.12")
    pins.write_text("c")
    assert not launcher.is_installed(python, done, wanted())


REPORT = {
    "install": [
        {
            "metadata": {"name": "torch", "version": "2.13.0+cpu"},
            "download_info": {
                "url": "https://index.example/torch-2.13.0%2Bcpu-cp311.whl",
                "archive_info": {"hashes": {"sha256": "ab"}},
            },
        },
        {
            "metadata": {"name": "typing_extensions", "version": "4.16.0"},
            "download_info": {"url": "https://index.example/typing_extensions-4.16.0-py3.whl"},
        },
        {
            "metadata": {"name": "stoker", "version": "0.1.0"},
            "download_info": {"url": "file:///here", "dir_info": {}},
        },
    ]
}


def test_size_of_the_download_is_said_beforehand(launcher: ModuleType) -> None:
    sizes = {"torch": 192_000_000, "typin": 44_000}
    packages = launcher.with_sizes(
        launcher.read_report(REPORT), lambda url: sizes[url.rpartition("/")[2][:5]]
    )
    assert launcher.describe(packages) == (
        "2 packages, 192 MB to download; the largest is torch 2.13.0+cpu with 192 MB"
    )
    assert launcher.describe([]) == "nothing to download"


def test_index_that_does_not_answer_does_not_hold_up_the_set_up(launcher: ModuleType) -> None:
    gate = threading.Event()
    began = time.monotonic()
    packages = launcher.with_sizes(
        launcher.read_report(REPORT), lambda url: gate.wait(60) and None, patience_s=0.05
    )
    assert launcher.describe(packages) == "2 packages, 0 B to download (and 2 of unknown size)"
    assert time.monotonic() - began < 30
    gate.set()


def test_sizes_of_local_files_are_read_and_missing_ones_are_unknown(
    launcher: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "a b.whl").write_bytes(b"12345")
    assert launcher.size_of((tmp_path / "a b.whl").as_uri()) == 5
    assert launcher.size_of((tmp_path / "none.whl").as_uri()) is None
    assert launcher.size_of("http://127.0.0.1:9/x.whl") is None
    assert launcher.size_of("garbage") is None


def test_what_is_installed_already_is_not_counted(launcher: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0+cpu.dist-info").mkdir()
    (tmp_path / "Typing.Extensions-4.15.0.dist-info").mkdir()
    left = launcher.missing(launcher.read_report(REPORT), tmp_path)
    assert [package.name for package in left] == ["typing_extensions"]
    (tmp_path / "Typing.Extensions-4.16.0.dist-info").mkdir()
    assert launcher.missing(launcher.read_report(REPORT), tmp_path) == []


def test_lock_of_uv_is_understood(launcher: ModuleType) -> None:
    lock = {
        "packages": [
            {"name": "a", "version": "1", "wheels": [{"url": "https://x/a.whl", "size": 10}]},
            {"name": "b", "version": "2", "sdist": {"url": "https://x/b.tar.gz", "size": 7}},
            {"name": "stoker", "directory": {"path": "."}},
        ]
    }
    assert [(p.name, p.bytes) for p in launcher.read_lock(lock)] == [("a", 10), ("b", 7)]


def test_cuda_is_noticed(launcher: ModuleType) -> None:
    cuda = launcher.Package("nvidia-cublas-cu12", "12.6", "https://x/y.whl")
    assert launcher.is_cuda_build([cuda])
    assert not launcher.is_cuda_build(launcher.read_report(REPORT))


def test_page_of_links_names_files_by_hash(launcher: ModuleType) -> None:
    page = launcher.links_page(launcher.read_report(REPORT))
    assert (
        '<a href="https://index.example/torch-2.13.0%2Bcpu-cp311.whl#sha256=ab">'
        "torch-2.13.0+cpu-cp311.whl</a>" in page
    )


def test_too_small_a_disk_is_said_before_the_download(launcher: ModuleType) -> None:
    packages = [launcher.Package("torch", "1", "https://x/y.whl", bytes=400_000_000)]
    launcher.check_disk(packages, 10_000_000_000)
    with pytest.raises(launcher.SetupError, match="too full") as caught:
        launcher.check_disk(packages, 1_000_000_000)
    assert "1.6 GB" in caught.value.lines[1]


@pytest.mark.parametrize(
    ("log", "what", "why"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full", "write"),
        (
            "WARNING: Retrying\nCould not fetch https://me:word@index.example/x: "
            "Failed to establish a new connection: [Errno -2] Name or service not known",
            "could not be downloaded",
            "https://***@index.example/x",
        ),
        ("ok\n  OSError: Readme file does not exist: README.md\nerror: failed", "", "Readme file"),
        ("ERROR: No matching distribution found for torch==2.13.0", "", "No matching"),
        ("Killed\n", "could not be installed", "Killed"),
        ("", "could not be installed", "without a word"),
    ],
)
def test_failed_installer_is_explained(launcher: ModuleType, log: str, what: str, why: str) -> None:
    error = launcher.explain(log, Path("install.log"))
    assert what in error.lines[0]
    assert why in error.lines[1]
    assert "word@" not in "".join(error.lines)
    assert len(error.lines) == 3


def test_progress_names_the_file_that_comes_now(launcher: ModuleType) -> None:
    log = "Collecting a==1 (from -r pins.txt (line 1))\n  Downloading a-1.whl (1 kB)\n"
    assert launcher.loading("") == ""
    assert launcher.loading(log) == "file 1: a (1 kB),"
    log += "Processing /wheels/torch-2.13.0%2Bcpu-cp311.whl (from -r pins.txt (line 2))\n"
    assert launcher.loading(log) == "file 2: torch,"
    assert launcher.loading(log + "\nInstalling collected packages: a, torch\n") == ""


def test_failed_program_raises_what_its_own_output_says(
    launcher: ModuleType, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("No space left on device, said another run\n")
    argv = [sys.executable, "-c", "raise ValueError('odd')"]
    with pytest.raises(launcher.SetupError) as caught:
        launcher.run_logged(argv, log)
    assert "ValueError: odd" in caught.value.lines[1]


def test_second_launch_waits_for_the_first(launcher: ModuleType, tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with launcher.Lock(tmp_path):
            entered.set()

    with launcher.Lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_constraints_pin_everything_and_keep_the_cpu_build_possible() -> None:
    rows = [
        row.partition(";")[0].strip()
        for row in (ROOT / "constraints.txt").read_text().splitlines()
        if row and not row.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s+@]+", row) for row in rows)
    names = {row.partition("==")[0].lower() for row in rows}
    assert "torch==2.13.0" in rows
    assert not any(name.startswith(("nvidia", "torchvision")) for name in names)
    assert not any("+" in row or "@" in row or "//" in row for row in rows)
    assert {"flask", "celery", "swift", "pytest", "mypy", "hatchling", "pip", "setuptools"} <= names


def test_uv_that_fails_gives_way_to_pip(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho dns error >&2\nexit 2\n")
    uv.chmod(0o755)
    installer = launcher.Installer(tmp_path / "venv", False)
    installer.work.mkdir(parents=True)
    assert not installer._try_uv(str(uv))
    assert "going on with pip" in capsys.readouterr().err


def test_interrupted_launcher_leaves_no_traceback(tmp_path: Path) -> None:
    copy = tmp_path / "stoker"
    copy.write_text(
        (ROOT / "stoker").read_text().replace("def set_up() -> None:\n", "def set_up() -> None:\n"
        "    raise KeyboardInterrupt\n")
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(copy), "demo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
