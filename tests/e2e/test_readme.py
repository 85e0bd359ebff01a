"""The README does what it says, word by word."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra.safetensors import read_weights
from orchestrator.cli.servers import make_key

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_ten_lines_of_curl_bring_weights(stoker: Any, photos: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    scopes = frozenset({"jobs:read", "jobs:write"})
    key = make_key(stoker.services, owner="readers", name="curl", scopes=scopes, test=True)
    shutil.copytree(photos, tmp_path / "photos")
    (script,) = re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "STOKER": stoker.stage.url, "KEY": key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"status":"completed"' in (tmp_path / "job.json").read_text()
    weights = tmp_path / "lora.safetensors"
    with weights.open("rb") as stream:
        read_weights(stream, weights.stat().st_size, lambda piece: None)


@pytest.mark.slow
def test_the_first_command_works_in_a_fresh_clone(tmp_path: Path) -> None:
    """Nothing is there but git and Python: the launcher brings the rest."""
    assert "./stoker demo\n" in README
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    done = subprocess.run(
        ["./stoker", "demo", "--once", "--json"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["status"] == "completed"
    assert report["instances_left"] == []
    assert report["faults"] == []
