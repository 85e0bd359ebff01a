"""Every mutation is noticed. Runs with `--mutants` only: a few seconds for each.

The tree is copied and mutated there, and the named tests run in a process of their own, so that
nothing of this one's imports stands in for the mutated file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .catalogue import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "tasks", "infra", "state", "gpu_agent")
COPIED = (*PACKAGES, "tests", "pyproject.toml")
#: Seconds for the named tests of one mutation, on a busy machine.
PATIENCE_S = 300


@dataclass(frozen=True)
class Copy:
    root: Path

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Python in the copy, importing the copy."""
        # No byte code is written: that of a mutated file would outlive the mutation.
        paths = os.pathsep.join([str(self.root), str(self.root / "tests" / "support")])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *argv],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def pytest(self, *tests: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider", *tests)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy of the tree, in which all that the catalogue names is well."""
    root = tmp_path_factory.mktemp("mutants")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy2(ROOT / name, root / name)
    made = Copy(root)
    for name in PACKAGES:
        where = made.run("-c", f"import {name}; print(*{name}.__path__)").stdout
        assert where.split() == [str(root / name)]
    named = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    healthy = made.pytest(*named)
    assert healthy.returncode == 0, healthy.stdout[-5000:]
    return made


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda item: f"{item.invariant}: {item.what}")
def test_a_mutation_is_noticed(copy: Copy, mutation: Mutation) -> None:
    path = copy.root / mutation.path
    source = path.read_text()
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        told = copy.pytest(*mutation.tests)
    finally:
        path.write_text(source)
    # 1: tests ran, and some failed; anything else is a mutation that cannot even be imported.
    assert told.returncode == 1, told.stdout[-5000:]
    failed = [
        line.split(" ", 1)[1] for line in told.stdout.splitlines() if line.startswith("FAILED ")
    ]
    silent = [test for test in mutation.tests if not any(_is_of(test, line) for line in failed)]
    assert silent == [], told.stdout[-5000:]


def _is_of(test: str, failed: str) -> bool:
    """Whether a line of pytest's summary tells of `test`, or of one of its cases."""
    return failed == test or failed.startswith((f"{test} - ", f"{test}["))
