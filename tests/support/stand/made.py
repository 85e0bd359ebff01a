"""The Python client, generated and installed apart: its dependencies do not go with ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PYTHON = (
    *("openapi-python-client==0.29.1", "httpx==0.28.1", "python-dateutil==2.9.0.post0"),
    *("django==5.2.8", "standardwebhooks==1.1.0"),
)


@dataclass(frozen=True)
class Made:
    """The generated client, installed where its dependencies are."""

    folder: Path
    python: Path

    def run(self, program: str, env: Mapping[str, str] | None = None) -> str:
        """Run a program that uses it; what it printed. `env`: in place of ours."""
        return _run(self.python, "-c", program, cwd=self.folder, env=env)


def make_client(place: Path) -> Made:
    """Make it in an empty folder. Skips where no package index can be reached."""
    _run(sys.executable, "-m", "venv", place / "venv")
    binaries = place / "venv" / "bin"
    got = subprocess.run(
        [binaries / "python", "-m", "pip", "install", "--quiet", *PYTHON],
        capture_output=True,
        text=True,
        check=False,
    )
    away = "(from versions: none)" in got.stderr or "connection broken" in got.stderr
    if got.returncode and away:
        pytest.skip(f"no package index can be reached: {got.stderr[-300:]}")
    assert got.returncode == 0, got.stderr
    spec = REPOSITORY / "docs/openapi.json"
    generator = binaries / "openapi-python-client"
    out = place / "made"
    _run(sys.executable, "-m", "infra.client", "--spec", spec, "--generator", generator, out)
    return Made(out, binaries / "python")


def _run(*argv: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in argv], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout
