"""Without `--mutants` the catalogue is checked and no mutation is tried."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name == "test_mutants.py" and not config.getoption("--mutants"):
        return True
    return None
