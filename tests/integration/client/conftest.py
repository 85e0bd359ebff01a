"""Tools of other people, installed apart: their dependencies do not go with ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PYTHON = (
    *("openapi-python-client==0.29.1", "httpx==0.28.1", "python-dateutil==2.9.0.post0"),
    *("django==5.2.8", "standardwebhooks==1.1.0"),
)
PACKAGES = (
    "openapi-typescript@7.13.0",
    "typescript@5.9.3",
    "standardwebhooks@1.1.1",
    "express@5.2.1",
)


def run(*argv: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in argv], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Made:
    """The generated client, installed where its dependencies are."""

    folder: Path
    python: Path

    def run(self, program: str) -> str:
        return run(self.python, "-c", program, cwd=self.folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The client, generated from the committed description."""
    place = tmp_path_factory.mktemp("client")
    run(sys.executable, "-m", "venv", place / "venv")
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
    run(sys.executable, "-m", "infra.client", "--spec", spec, "--generator", generator, out)
    return Made(out, binaries / "python")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages from npm that the documentation names."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node.js")
    place = tmp_path_factory.mktemp("node")
    (place / "package.json").write_text('{"private": true, "type": "module"}')
    argv = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    got = subprocess.run(argv, cwd=place, capture_output=True, text=True, check=False)
    if got.returncode and any(code in got.stderr for code in ("ENOTFOUND", "ECONN", "EAI_AGAIN")):
        pytest.skip(f"npm's registry cannot be reached: {got.stderr[-300:]}")
    assert got.returncode == 0, got.stderr
    return place


@pytest.fixture(scope="session")
def snippet() -> Callable[[str, str, str], str]:
    """`snippet(page, language, holds)`: the one snippet of a page of the docs that holds a text."""

    def find(page: str, language: str, holds: str) -> str:
        text = (REPOSITORY / "docs" / page).read_text()
        blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.M | re.S)
        (found,) = [
            re.sub(f"^{indent}", "", body, flags=re.M) for indent, body in blocks if holds in body
        ]
        return found

    return find
