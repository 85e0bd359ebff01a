"""The tutorial, followed word by word in an empty folder, with everything real."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.stage import free_port
from stand.running import running_from, until
from stand.snippets import REPOSITORY, snippets

SCRIPTS = [item.text for item in snippets() if item.page == "docs/tutorial.md"]
#: What somebody who follows the tutorial puts into its words.
KEY = "stk_test_…"
DESK = "http://127.0.0.1:3000/hooks/stoker"


def script(words: str) -> str:
    """The one script of the tutorial with these words."""
    (found,) = [text for text in SCRIPTS if words in text]
    return found


class Terminal:
    """A shell in the reader's folder. What was exported in it stays."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.said = folder / f"terminal-{id(self)}.txt"

    def run(self, text: str) -> str:
        """Run a script to its end; what it printed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder, env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def keep(self, text: str, words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one that does not end, from when it says `words` on; then press Ctrl-C."""
        with self.said.open("wb") as said:
            process = subprocess.Popen(
                ["bash", "-c", text],
                cwd=self.folder, env=self.env, stderr=said, start_new_session=True,
            )  # fmt: skip
        try:
            until(lambda: words in self.words() or process.poll() is not None, words, 120.0)
            assert process.poll() is None, self.words()
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.wait()

    def words(self) -> str:
        return self.said.read_text(errors="replace")


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    """Empty, but for a launcher of the checkout's own environment; photographs are at home."""
    launcher = tmp_path / "here" / "stoker"
    launcher.parent.mkdir()
    python = shlex.quote(sys.executable)
    launcher.write_text(f'#!/bin/sh\nexec {python} -m orchestrator.cli "$@"\n')
    launcher.chmod(0o755)
    shutil.copytree(photos, tmp_path / "Pictures" / "dog")
    return launcher.parent


@pytest.mark.slow
def test_the_tutorial_works_word_by_word(folder: Path, customer: Any) -> None:
    given = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder.parent),
        "PYTHONPATH": str(REPOSITORY),
        # others may listen on the usual ports of this machine
        "STOKER_BIND": f"127.0.0.1:{free_port()}",
        "STOKER_SANDBOX_SERVE_PORT": "0",
    }
    first, second, third, fourth = (Terminal(folder, dict(given)) for _ in range(4))
    with contextlib.ExitStack() as stack:
        stack.enter_context(first.keep(script("sandbox serve"), "the sandbox runs"))
        stack.enter_context(second.keep(script("./stoker up"), "Stoker runs at"))

        looked = third.run(script("./stoker doctor"))
        assert [line for line in looked.splitlines() if not line.startswith("✔")] == []

        make, export, *rest = script("keys create").splitlines()
        key = third.run(make).strip()
        assert export.startswith(f"export STOKER_API_KEY={KEY}")
        third.env["STOKER_API_KEY"] = fourth.env["STOKER_API_KEY"] = key
        listed = third.run("\n".join(rest))
        assert "completed" in listed
        third.run(script("test_host_dies"))
        assert jobs(third) == [("completed", 2), ("completed", 1)]

        words = script("stoker listen")
        assert DESK in words
        third.env["STOKER_LISTEN_SECRET"] = customer.secret
        with third.keep(words.replace(DESK, customer.url), "listening"):
            fourth.run(script("stoker trigger"))
            until(lambda: customer.has("job.completed"), "the sample came, well signed")
        del third.env["STOKER_API_KEY"]
        plan = script("--dry-run").splitlines()[0]
        assert "--dry-run" in plan
        third.run(plan)
    until(lambda: not running_from(folder), "nothing is left of it", 30.0)


def jobs(terminal: Terminal) -> list[tuple[Any, Any]]:
    shown = json.loads(terminal.run("./stoker ps -a --json"))
    return [(job["status"], job["attempt"]) for job in shown]
