"""The supervisor keeps what it was given running."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from infra import embedded
from infra.embedded import Program
from infra.embedded.supervisor import Supervisor
from stand.running import until


def test_a_program_that_cannot_be_started_again_now_is_tried_until_it_can(tmp_path: Path) -> None:
    """Else a disk that is full for a moment would leave an installation without a worker."""
    place, away = tmp_path / "place", tmp_path / "away"
    place.mkdir()
    program = Program(name="worker", argv=("sleep", "600"), log=tmp_path / "log", cwd=place)
    with contextlib.closing(Supervisor()) as supervisor:
        supervisor.launch(program)
        until(lambda: "worker" in supervisor.pids, "it runs")
        place.rename(away)
        os.kill(supervisor.pids["worker"], signal.SIGKILL)
        with pytest.raises(embedded.EmbeddedError, match="No such file"):
            supervisor.until(program, lambda: False)

        away.rename(place)

        until(lambda: "worker" in supervisor.pids, "it runs")


def test_a_program_that_could_never_be_started_is_given_up(tmp_path: Path) -> None:
    program = Program(name="worker", argv=("no-such-program",), log=tmp_path / "log", cwd=tmp_path)
    with contextlib.closing(Supervisor()) as supervisor:
        with pytest.raises(embedded.EmbeddedError, match="no-such-program"):
            supervisor.run_once(program)
        assert set(supervisor.pids) == {"supervisor"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_a_program_that_gave_up_root_finds_its_files_in_roots_home(tmp_path: Path) -> None:
    """Where root clones Stoker first; initdb asks access(2) for the `postgres` beside it."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "postgres").touch(mode=0o755)
    look = "import os, sys; sys.exit(os.geteuid() == 0 or not os.access(sys.argv[1], os.X_OK))"
    program = Program(
        name="initdb",
        argv=(sys.executable, "-c", look, str(home / "postgres")),
        log=tmp_path / "log",
        cwd=tmp_path,
        user="nobody",
        once=True,
    )
    with contextlib.closing(Supervisor()) as supervisor:
        supervisor.run_once(program)
