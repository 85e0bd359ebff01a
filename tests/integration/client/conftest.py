"""Tools of other people, installed apart: their dependencies do not go with ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stand.made import Made, make_client

REPOSITORY = Path(__file__).parents[3]
PACKAGES = (
    "openapi-typescript@7.13.0",
    "typescript@5.9.3",
    "standardwebhooks@1.1.1",
    "express@5.2.1",
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The client, generated from the committed description."""
    return make_client(tmp_path_factory.mktemp("client"))


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
