"""schemathesis reads our description, and a running Stoker does nothing that it does not say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.servers import make_key

CONFIG = Path(__file__).with_name("schemathesis.toml")


def test_nothing_is_answered_that_the_description_does_not_say(
    stoker: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scopes = frozenset({"jobs:read", "jobs:write", "operator"})
    key = make_key(stoker.services, owner="everything", name="all", scopes=scopes, test=True)
    url, thorough = stoker.stage.url, request.config.getoption("--slow")
    argv = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
    argv += [f"{url}/openapi.json", "--url", url, "-H", f"Authorization: Bearer {key}"]
    # whatever is allowed at its edges, and one step beyond; thorough: also at random, and in chains
    argv += ["--phases", "examples,coverage" + (",fuzzing,stateful" if thorough else "")]
    argv += ["--max-examples", "30", "--seed", "1", "--no-color", "--warnings", "off"]
    told = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert told.returncode == 0, told.stdout[-20000:] + told.stderr[-2000:]
