"""Our end of the supervisor process: start programs, hear of their ends, end them all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from infra.embedded.errors import EmbeddedError
from infra.embedded.program import Program

_READY_S = 60.0
_CLOSE_S = 30.0
_POLL_S = 0.05
#: so many ends before it was ready, and it is given up
_ENDS = 4


class Supervisor:
    """A process that runs programs for us and ends them when we end, in whatever way.

    Args:
        hold: a file descriptor (a lock) that it keeps open until its programs are gone.
    """

    def __init__(self, hold: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # it holds the lock too: a next Stoker waits until this one's servers are gone
            pass_fds=() if hold is None else (hold,),
            start_new_session=True,
        )
        # both are pipes, as asked for
        self._orders = cast(IO[bytes], self._process.stdin)
        self._reports = cast(IO[bytes], self._process.stdout)
        self._changed = threading.Condition()
        self._alive: dict[str, int] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        self._ends: Counter[str] = Counter()
        self._listener = threading.Thread(target=self._listen, name="supervisor", daemon=True)
        self._listener.start()

    @property
    def pids(self) -> dict[str, int]:
        """Of the supervisor itself and of each program that runs now, by name."""
        with self._changed:
            return {"supervisor": self._process.pid, **self._alive}

    def launch(self, program: Program) -> None:
        """Start `program`; returns at once."""
        line = json.dumps({"start": program.to_json()}) + "\n"
        with self._changed:
            self._orders.write(line.encode())
            self._orders.flush()

    def run_once(self, program: Program) -> None:
        """Start `program` and wait for its end. Raises: EmbeddedError, when it fails."""
        self.launch(program)
        with self._changed:
            self._changed.wait_for(lambda: program.name in self._ended, _READY_S)
            ended = self._ended.get(program.name)
        if ended is None or ended["code"] != 0:
            raise self._failed(program)

    def until(self, program: Program, ready: Callable[[], bool]) -> None:
        """Wait until a launched program is ready.

        It may end and be started again a few times: files or a port may still be held by its
        predecessor, which is just ending.

        Raises: EmbeddedError, when it does not become ready.
        """
        deadline = time.monotonic() + _READY_S
        while not ready():
            with self._changed:
                ends = self._ends[program.name]
            if ends >= _ENDS or time.monotonic() > deadline:
                raise self._failed(program)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End every program in good order, and then the supervisor."""
        self._orders.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)
        self._reports.close()

    def _failed(self, program: Program) -> EmbeddedError:
        with self._changed:
            ended = self._ended.get(program.name)
        how = (
            f"ended with code {ended['code']}" if ended else f"is not ready after {_READY_S:.0f} s"
        )
        why = (ended or {}).get("error") or _last_line(program.log)
        return EmbeddedError(
            f"{program.name} {how}: {why}" if why else f"{program.name} {how}",
            f"its log is {program.log}",
        )

    def _listen(self) -> None:
        for raw in self._reports:
            line = json.loads(raw)
            with self._changed:
                if line["event"] == "started":
                    self._alive[line["name"]] = line["pid"]
                else:
                    self._alive.pop(line["name"], None)
                    self._ended[line["name"]] = line
                    self._ends[line["name"]] += 1
                self._changed.notify_all()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace")[-4000:].split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
