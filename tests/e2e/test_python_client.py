"""The generated client against a whole Stoker, as its page shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.safetensors import read_weights
from orchestrator.cli.servers import make_key
from stand.made import make_client
from stand.snippets import snippets


@pytest.mark.slow  # it installs the client; that, and what it verifies, the other tests show
def test_photographs_in_and_weights_out_as_the_page_says(
    stoker: Any, photos: Path, tmp_path: Path
) -> None:
    (program,) = [item.text for item in snippets() if "stoker.train(" in item.text]
    made = make_client(tmp_path)
    shutil.copytree(photos, made.folder / "photos")
    scopes = frozenset({"jobs:read", "jobs:write"})
    key = make_key(stoker.services, owner="readers", name="client", scopes=scopes, test=True)
    told = made.run(program, {"STOKER_URL": stoker.stage.url, "STOKER_API_KEY": key})
    assert "completed" in told
    weights = made.folder / "loras" / "lora.safetensors"
    with weights.open("rb") as stream:
        read_weights(stream, weights.stat().st_size, lambda piece: None)
