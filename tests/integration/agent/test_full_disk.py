"""A disk that is full: the job goes to another machine, and is told why."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """The agent's folder, on a disk without a single free byte."""
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(home)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk here")
    with (home / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    assert shutil.disk_usage(home).free == 0
    yield home
    (home / "filler").unlink()
    subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_machine_whose_disk_is_full_from_the_start_says_so_from_memory(
    stoker: Any, start: Any, full_disk: Path
) -> None:
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("host.disk_full", True)
    assert stoker.destroyed.is_set()
    assert not (full_disk / "spec.json").exists()


@pytest.mark.parametrize(
    "code",
    [
        "say('error', code='host.disk_full', message='full', retryable=True)",
        "raise OSError(28, 'No space left on device')",
    ],
)
def test_a_trainer_that_finds_the_disk_full_is_no_fault_of_the_job(
    stoker: Any, start: Any, code: str
) -> None:
    assert start(code).join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("host.disk_full", True)
