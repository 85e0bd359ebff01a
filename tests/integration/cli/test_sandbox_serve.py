"""`stoker sandbox serve` as it is run: it says where it is, and ends with all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import requests

FAULTS = [{"op": "create", "kind": "no_id"}, {"kind": "abandoned", "rental": 1}]


def test_the_sandbox_serves_its_market_and_its_admin_page(tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text(json.dumps(FAULTS))
    options = ("--port", "0", "--faults", "faults.json", "--seed", "3", "--data", "machines")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "sandbox", "serve", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "SANDBOX_ACCOUNT_KEY": "k"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = dict(process.stdout.readline().strip().split("=", 1) for _ in range(3))
        assert (said["VAST_API_KEY"], said["STOKER_VAST_PACE"]) == ("k", "0")
        admin = process.stderr.readline().split()[-1]
        market = f"{said['VAST_URL']}/api/v0"
        key = {"Authorization": "Bearer k"}
        offers = requests.post(f"{market}/bundles/", json={}, headers=key, timeout=10).json()
        path = f"{market}/asks/{offers['offers'][0]['id']}/"
        made = requests.put(path, json={"image": "x"}, headers=key, timeout=10).json()
        assert made == {"success": True}
        (machine,) = requests.get(f"{admin}/admin/api/machines", timeout=10).json()
        assert (machine["actual_status"], machine["struck"]) == ("created", ["abandoned"])
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
