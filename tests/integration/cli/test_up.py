"""`stoker up` and the commands beside it, as processes, with everything real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.sandbox.server import running_sandbox

REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 60.0


class Operator:
    """Somebody at a terminal in a directory of their own, with nothing exported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(REPOSITORY),
            "STOKER_DATA": str(folder / "data"),
        }

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *words],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        with self.start(*words, **env) as process:
            out, err = process.communicate(timeout=PATIENCE_S)
            return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    return Operator(tmp_path_factory.mktemp("op"))


@pytest.fixture(scope="module")
def up(operator):
    """A running `stoker up`: its process and its address."""
    bind = f"127.0.0.1:{free_port()}"
    with running_sandbox(account_key="account-key-of-a-test") as sandbox:
        process = operator.start(
            "up", "--bind", bind,
            VAST_URL=sandbox.url, VAST_API_KEY="account-key-of-a-test", STOKER_VAST_PACE="0",
        )  # fmt: skip
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "next:" in line:
                    break
            assert f"Stoker runs at http://{bind}" in "".join(said)
            yield process, bind
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def doctor(operator, **env):
    code, out, _ = operator.run("doctor", "--json", **env)
    return code, {item["part"]: item for item in json.loads(out)["parts"]}


def test_commands_beside_it_know_its_settings(operator, up):
    """The doctor is asked in another terminal, where nothing is exported."""
    until = time.monotonic() + PATIENCE_S
    while True:
        _, parts = doctor(operator)
        unwell = {name for name, part in parts.items() if part["severity"] == "critical"}
        if unwell <= {"sweep"}:
            break
        assert time.monotonic() < until, parts
    assert operator.run("ps", "--json")[:2] == (0, "[]\n")


def test_the_doctor_names_each_fault_with_its_mend_and_no_secret(operator, up):
    code, out, err = operator.run(
        "doctor",
        REDIS_URL="redis://:hunter2@127.0.0.1:9/0",
        VAST_API_KEY="hunter2",
        S3_BUCKET="not-made-by-anybody",
    )
    assert code == 3
    lines = {line.split()[1]: line for line in out.splitlines()}
    for name, word in (("redis", "Redis does not answer"), ("vast", "401"), ("s3", "NoSuchBucket")):
        assert word in lines[name]
        assert "; mend: " in lines[name]
    assert lines["database"].startswith("✔")
    assert "hunter2" not in out + err


def test_keys_are_made_listed_used_and_revoked(operator, up):
    _, bind = up
    code, out, _ = operator.run("keys", "create", "my backend", "--scope", "jobs:read", "--json")
    assert code == 0
    key = json.loads(out)["key"]
    with_key = {"STOKER_URL": f"http://{bind}", "STOKER_API_KEY": key.strip()}
    assert operator.run("ps", "--json", **with_key)[0] == 0
    assert operator.run("cancel", "job_x", **with_key)[0] == 4
    code, out, _ = operator.run("keys", "ls", "--json")
    assert key.strip() not in out
    (made,) = [item for item in json.loads(out) if item["name"] == "my backend"]
    assert made["scopes"] == ["jobs:read"]
    assert operator.run("keys", "revoke", made["id"])[0] == 0
    assert operator.run("ps", "--json", **with_key)[0] == 4
    assert operator.run("keys", "revoke", "key_nobody")[0] == 5
    assert operator.run("keys", "create", "x", "--scope", "everything")[0] == 2


@pytest.mark.slow
def test_the_schema_can_be_brought_up_again(operator, up):
    _, before, _ = operator.run("db", "current")
    code, _, _ = operator.run("db", "upgrade")
    assert code == 0
    assert operator.run("db", "current")[1] == before
    told = json.loads(operator.run("db", "current", "--json")[1])
    assert told == {"revision": before.strip(), "newest": before.strip()}


def test_a_dry_sweep_touches_nothing(operator, up):
    code, out, _ = operator.run("sweep", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["destroyed"] == []


def test_a_second_one_is_refused(operator, up):
    _, bind = up
    code, _, err = operator.run("up", "--bind", bind, VAST_API_KEY="k")
    assert code == 1
    assert "is taken" in err
    code, _, err = operator.run("up", "--bind", f"127.0.0.1:{free_port()}", VAST_API_KEY="k")
    assert code == 1
    assert "another Stoker runs in" in err


def test_it_ends_with_a_signal_and_leaves_nothing_that_opens_a_door(operator, up):
    """Last in this file: nothing runs after it."""
    process, _ = up
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_S)
    assert process.returncode == 0
    assert not (operator.folder / "data" / "beside.json").exists()
    assert not (operator.folder / "data" / "running.json").exists()
    assert operator.run("ps")[0] == 4
