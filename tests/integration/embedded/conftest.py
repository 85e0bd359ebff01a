"""A Stoker's servers on this machine, and a way to run them from a process that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import embedded
from infra.settings import Settings

ROOT = Path(__file__).parents[3]

_HOLDER = """
import json, sys, time
from pathlib import Path
from infra import embedded
from infra.settings import Settings
servers = embedded.start(Settings(data_dir=Path(sys.argv[1])))
print(json.dumps(servers.pids), flush=True)
sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        # a process that nobody has waited for yet is dead too
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, all generations."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether `condition` comes true; for processes, which have a clock of their own."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Holder:
    """A process that started the servers of `data_dir` and holds them."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.pids: dict[str, int] = json.loads(self.process.stdout.readline() or b"{}")

    def everything(self) -> set[int]:
        """Every process that must be gone with it."""
        return descendants(self.process.pid)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: making a PostgreSQL cluster takes longest. Only its owner may enter."""
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture
def hold(data_dir: Path) -> Iterator[Callable[[], Holder]]:
    held: list[Holder] = []

    def make() -> Holder:
        held.append(Holder(data_dir))
        return held[-1]

    yield make
    for holder in held:
        holder.close()


@pytest.fixture
def start(data_dir: Path) -> Iterator[Callable[..., embedded.Running]]:
    started: list[embedded.Running] = []

    def make(**arguments: Any) -> embedded.Running:
        started.append(embedded.start(Settings(data_dir=data_dir), **arguments))
        return started[-1]

    yield make
    for servers in started:
        servers.close()
